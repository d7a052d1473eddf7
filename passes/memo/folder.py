"""`Memo`: a folder of results that compiles have computed. Files appear whole, are checked as they are read, and go when room is short."""

import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from ir.files import appearing
from passes.recipe import fingerprint

Tensors = dict[str, Tensor]

FORMAT = "fxpress-memo-1"
SIZE = 20 * 10**9  # bytes
SECONDS = 30.0  # between two states of a long loop
ROOM = 0.9  # of the size is filled again once it is exceeded
DEAD = 60.0  # seconds after which a draft of a process that is gone was left by it
ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
DRAFT = re.compile(r"\.[0-9a-f]{64}\.safetensors\.(\d+)")
DAMAGE = (safetensors.SafetensorError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Entry:
    """A result in the folder: what it is, of which compile, its bytes, and when it was made and last used, in seconds since 1970."""

    what: str
    of: str
    bytes: int
    made: float
    used: float


class Memo:
    """Tensors by key, in a folder that several processes may use at once.

    An entry is a safetensors file that is named by its key and has plain text as metadata: nothing of it is executed. It is written under
    a temporary name first, so that readers see the whole of it or nothing. Its checksum tells damage: such an entry is removed, and told.
    What cannot be written, on a full disk or in a folder of others, is told once and not kept; the compile goes on.

    Args:
        folder: where; `default_folder()` if None. Other files in it are left alone.
        size: bytes that all entries may take; those that were used least recently go first.
        seconds: between two states of a long loop.
    """

    def __init__(self, folder: str | Path | None = None, size: int = SIZE, seconds: float = SECONDS) -> None:
        self.folder, self.size, self.seconds = Path(folder) if folder else default_folder(), size, seconds
        self.writes = True
        self._remarks: dict[str, bool] = {}  # told already?
        self._own: set[Path] = set()

    @classmethod
    def of(cls, cache: "Memo | str | Path | bool | None") -> "Memo | None":
        """What the option `cache` of `passes.compile` means: True is the default folder, None and False are none."""
        if isinstance(cache, Memo):
            return cache
        return None if cache is None or cache is False else cls(None if cache is True else cache)

    def has(self, key: str) -> bool:
        """Whether there is an entry, whole or not."""
        return self._path(key).is_file()

    def get(self, key: str) -> Tensors | None:
        """An entry's tensors, in memory of their own; None if there is none, or a damaged one."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                stated = file.metadata() or {}
                # Copies, aligned as torch aligns memory, which decides the last bit of products.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - a file is no mapping
        except FileNotFoundError:  # another process has removed it meanwhile
            return None
        except OSError as error:
            self._say(f"the cache cannot be read, and results are computed anew: {error.strerror or error}: {self.folder}")
            return None
        except DAMAGE:
            tensors, stated = {}, {}
        if (stated.get("format"), stated.get("key"), stated.get("checksum")) != (FORMAT, key, _checksum(tensors)):
            self.damaged(key)
            return None
        with suppress(OSError):
            os.utime(path)
        self._own.add(path)
        return tensors

    def damaged(self, key: str) -> None:
        """Remove an entry that does not hold what it should."""
        self._say(f"the cache had a damaged entry, {self._path(key).name}: it was computed anew")
        self.forget(key)

    def put(self, key: str, tensors: Mapping[str, Tensor], what: str = "", of: str = "") -> None:
        """Keep tensors under a key, in place of what there was.

        Args:
            what, of: what they are and of which compile, for `fxpress cache`.
        """
        if not self.writes:
            return
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size > self.size:
            self._say(f"a result of {size / 1e9:.1f} GB is larger than the cache, and was not kept: give it more room (--cache-size)")
            return
        stored = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        stated = {"format": FORMAT, "key": key, "checksum": _checksum(stored), "what": what, "of": of, "made": str(int(time.time()))}
        path = self._path(key)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with appearing(path) as draft:
                save_file(stored, draft, stated)
            self._own.add(path)
            self._make_room(path)
        except (OSError, safetensors.SafetensorError) as error:
            self.writes = False
            reason = getattr(error, "strerror", None) or error
            self._say(f"the cache cannot be written, and keeps nothing of this compile from here on: {reason}: {self.folder}")

    def forget(self, key: str) -> None:
        """Remove an entry, if there is one and it may be removed."""
        with suppress(OSError):
            self._path(key).unlink()

    def entries(self) -> list[Entry]:
        """All entries, the last used first; those that cannot be read have no description."""
        found = []
        for path, size, used in self._files():
            try:
                with safetensors.safe_open(path, framework="pt") as file:
                    stated = file.metadata() or {}
                found.append(Entry(stated.get("what", ""), stated.get("of", ""), size, float(stated.get("made", used)), used))
            except (OSError, *DAMAGE):
                found.append(Entry("damaged", "", size, used, used))
        return sorted(found, key=lambda entry: -entry.used)

    def clear(self) -> int:
        """Remove all entries; returns their bytes. Other files in the folder stay."""
        freed = 0
        for path, size, _ in self._files():
            with suppress(OSError):
                path.unlink()
                freed += size
        return freed

    def remarks(self) -> list[str]:
        """What there is to tell that was not told yet, once each."""
        new = [text for text, told in self._remarks.items() if not told]
        self._remarks.update(dict.fromkeys(new, True))
        return new

    def _say(self, text: str) -> None:
        self._remarks.setdefault(text, False)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _files(self) -> Iterator[tuple[Path, int, float]]:
        """Every entry with its bytes and when it was used; drafts that a killed process left are removed on the way."""
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError), os.scandir(self.folder) as found:
            for file in found:
                draft = DRAFT.fullmatch(file.name)
                if not draft and not ENTRY.fullmatch(file.name):
                    continue
                with suppress(OSError):  # another process may have removed it
                    stat = file.stat(follow_symlinks=False)
                    if not draft:
                        yield Path(file.path), stat.st_size, stat.st_mtime
                    elif time.time() - stat.st_mtime > DEAD and not _alive(int(draft[1])):
                        Path(file.path).unlink()

    def _make_room(self, newest: Path) -> None:
        """Remove what was used least recently until the rest is small enough."""
        files = sorted(self._files(), key=lambda file: file[2])
        total = sum(size for _, size, _ in files)
        limit = self.size if total <= self.size else ROOM * self.size
        for path, size, _ in files:
            if total <= limit:
                return
            if path != newest:
                if path in self._own:
                    self._say("the cache is too small for all results of this compile: give it more room (--cache-size)")
                with suppress(OSError):
                    path.unlink()
                total -= size


def default_folder() -> Path:
    """`$FXPRESS_CACHE`, or `fxpress` in `$XDG_CACHE_HOME` or in `~/.cache`."""
    named = os.environ.get("FXPRESS_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxpress"


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bytes."""
    return fingerprint(sorted(tensors.items()))


def _alive(process: int) -> bool:
    """Whether there is a process of that number on this machine, as far as can be told."""
    if sys.platform == "win32":  # where signal 0 is no question
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
