"""`Store`: tensors on disk, mapped, so that memory holds the pages that are read at the moment and no more."""

import contextlib
import ctypes
import mmap
import os
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ir.errors import DataError
from ir.memory import map_large
from ir.tensor_file import ALIGNED, Entry, read_header

SMALL = 1 << 14  # bytes: tensors below stay in memory
APART = 1 << 26  # bytes: tensors from here on have a file each, which goes when they go; smaller ones share files
SHARED_FILE = 1 << 28  # bytes
FILES = 1 << 16  # that may be open at once, where the system lets us: every mapped one is
HANDED_OUT = 1 << 26  # bytes of weights that are read between two releases
NO_RESERVE = 0x4000 if sys.platform == "linux" else 0  # private pages are promised no memory: a file may be larger than there is
NAME = "fxpress_store"  # the attribute of a model whose weights are mapped
REMEDY = "free space, or name another folder for scratch files"


class _Map(mmap.mmap):
    """A mapped file. Tensors over it keep it alive; `private` ones keep what is written to them in memory, and not in the file."""

    address: int
    private: bool


class Store:
    """Tensors on disk.

    Scratch files have no name: the system removes them when the last tensor in them goes, or when the process ends, however it ends.

    Args:
        folder: where scratch files are made, on a disk; the system's folder for temporary files if None.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder or tempfile.gettempdir())
        self._maps: weakref.WeakSet[_Map] = weakref.WeakSet()
        self._shared: tuple[BinaryIO, _Map, int] | None = None  # the file that small tensors go to, and where the next one starts
        self._handed = 0
        self._lock = threading.RLock()
        _allow_files()
        map_large()

    def __deepcopy__(self, memo: Any) -> "Store":
        """Copies of a model share its store."""
        return self

    def moved(self, folder: str | Path) -> "Store":
        """A store of the same tensors, whose scratch files are made in another folder."""
        made = Store(folder)
        made._maps = self._maps
        return made

    def open(self, path: Path) -> dict[str, Tensor]:
        """The tensors in a safetensors file, by name. They may be written to: the file stays as it is.

        Raises:
            DataError: a damaged file, or a tensor of a dtype that torch does not have.
        """
        entries, start = read_header(path)
        if not entries:
            return {}
        with path.open("rb") as file:
            made = self._register(_private(file), private=True)
        return {name: _view(made, start, entry) for name, entry in entries.items()}

    def keep(self, tensor: Tensor, *, apart: bool = False) -> Tensor:
        """A mapped copy of a tensor, of the same strides where it is dense; itself if it is small, mapped already or on another device.

        Args:
            apart: a file of its own whatever its size, for what goes soon.

        Raises:
            DataError: the disk is full.
        """
        plain = type(tensor) in {Tensor, torch.nn.Parameter} and tensor.device.type == "cpu" and tensor.layout is torch.strided
        if not plain or tensor.nbytes < SMALL or self.holds(tensor):
            return tensor
        axes = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
        dense = tensor.detach().permute(axes).contiguous()
        try:
            stored = self._write(dense.flatten().view(torch.uint8), apart)
        except OSError as error:
            problem = f"cannot keep {dense.nbytes} bytes of weights there: {error.strerror or error}"
            raise DataError(problem, where=str(self.folder), remedy=REMEDY) from error
        return stored.view(dense.dtype).view(dense.shape).permute([axes.index(axis) for axis in range(tensor.ndim)])

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor's memory is mapped here."""
        at = tensor.untyped_storage().data_ptr()
        return any(one.address <= at < one.address + len(one) for one in self._maps)

    def count(self, size: int) -> None:
        """Note that so many bytes of weights are read now; pages are released every so often."""
        self._handed += size
        if self._handed >= HANDED_OUT:
            self.release()

    def release(self) -> None:
        """Let go of the pages in memory: they come back from the files when they are read. What was written to loaded weights stays."""
        self._handed = 0
        _trim()
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        maps = list(self._maps)
        written = list(_written()) if any(one.private for one in maps) else []
        for one in maps:
            if not one.private or not any(start < one.address + len(one) and one.address < end for start, end in written):
                one.madvise(mmap.MADV_DONTNEED)

    def _write(self, content: Tensor, apart: bool) -> Tensor:
        """Bytes in a scratch file, mapped."""
        with self._lock:
            if apart or len(content) >= APART:
                file, made = self._scratch(len(content))
                with file:
                    return _put(file, made, 0, content)
            if self._shared is None or self._shared[2] + len(content) > SHARED_FILE:
                if self._shared is not None:
                    self._shared[0].close()
                self._shared = (*self._scratch(SHARED_FILE), 0)
                weakref.finalize(self, self._shared[0].close)
            file, made, start = self._shared
            self._shared = (file, made, start + -(-len(content) // ALIGNED) * ALIGNED)
            return _put(file, made, start, content)

    def _scratch(self, size: int) -> tuple[BinaryIO, _Map]:
        file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 (open for as long as tensors are written to it)
        file.truncate(size)
        return file, self._register(_Map(file.fileno(), size), private=False)

    def _register(self, made: _Map, *, private: bool) -> _Map:
        made.address, made.private = torch.frombuffer(made, dtype=torch.uint8).data_ptr(), private
        self._maps.add(made)
        return made


def _trim() -> None:
    """Give back what was freed to the system: between tensors that stay, glibc holds on to gigabytes."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def _allow_files() -> None:
    """Raise the number of files that this process may have open: limits of 1024 are common, and a large model takes more."""
    if os.name == "nt":
        return
    import resource  # noqa: PLC0415 (a module of Unix)

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _private(file: BinaryIO) -> _Map:
    """A file, mapped so that writing to it changes memory only."""
    if os.name == "nt":
        return _Map(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return _Map(file.fileno(), 0, flags=mmap.MAP_PRIVATE | NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _view(made: _Map, start: int, entry: Entry) -> Tensor:
    """A tensor of a mapped file, with a storage of its own: tied weights are known by their storage."""
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=entry.dtype)
    content = torch.frombuffer(made, dtype=torch.uint8, offset=start + entry.begin, count=entry.end - entry.begin)
    aligned = content if content.data_ptr() % entry.dtype.itemsize == 0 else content.clone()
    return aligned.view(entry.dtype).view(entry.shape)


def _put(file: BinaryIO, made: _Map, start: int, content: Tensor) -> Tensor:
    """Write bytes to a mapped file. By a call and not by memory: a full disk is then an error and not the end of the process."""
    file.seek(start)
    file.write(content.numpy().data)
    file.flush()
    return torch.frombuffer(made, dtype=torch.uint8, offset=start, count=len(content))


def _written() -> Iterator[tuple[int, int]]:
    """The ranges of addresses that hold pages of no file, as the system tells: all, where it does not."""
    try:
        lines = Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines()
    except OSError:
        yield 0, sys.maxsize
        return
    bounds = 0, 0
    for line in lines:
        key, _, rest = line.partition(" ")
        if not key.endswith(":"):
            start, _, end = key.partition("-")
            bounds = int(start, 16), int(end, 16)
        elif key == "Anonymous:" and rest.split()[0] != "0":
            yield bounds


@contextlib.contextmanager
def kept_parameters(store: Store) -> Iterator[None]:
    """Put the parameters of models that are made meanwhile into a store, one by one."""

    def keep(module: torch.nn.Module, name: str, given: torch.nn.Parameter | None) -> torch.nn.Parameter | None:
        if given is None or (kept := store.keep(given)) is given:
            return None
        made = torch.nn.Parameter(kept, requires_grad=given.requires_grad)
        vars(made).update(vars(given))  # marks of who makes the model
        return made

    # Torch's own type of hooks leaves out that they may replace what is registered.
    handle = torch.nn.modules.module.register_module_parameter_registration_hook(keep)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def attach(model: torch.nn.Module, store: Store) -> None:
    """Let a model know the store of its weights: graphs captured from it use it, and its own runs release what they have read."""
    setattr(model, NAME, store)
    for module in model.modules():
        size = sum(parameter.nbytes for parameter in module.parameters(recurse=False))
        if size:
            module.register_forward_pre_hook(lambda module, args, size=size: store.count(size))


def store_of(model: torch.nn.Module) -> Store | None:
    """The store of a model's weights, if they are mapped."""
    found = getattr(model, NAME, None)
    return found if isinstance(found, Store) else None
