"""Folders of results: they appear whole or not at all, only fxpress's own are ever replaced, and one process at a time writes one."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ir.errors import DataError, OptionError

MANIFEST = "fxpress.json"
PARTIAL, OLD = "partial", "old"  # kinds of folders beside the result, `.name.partial-…`, while it is written


def check_free(directory: Path, overwrite: bool) -> None:
    """Refuse a target folder that exists, or cannot be made. Only what fxpress wrote, or an empty folder, is ever replaced.

    Raises:
        OptionError: it exists, and may not be overwritten; nothing can be written there.
    """
    if overwrite and directory.is_dir() and any(directory.iterdir()) and not (directory / MANIFEST).is_file():
        raise OptionError(f"the folder has no {MANIFEST}: fxpress did not write it", where=str(directory), remedy="choose another")
    if overwrite and directory.exists() and not directory.is_dir():
        raise OptionError("there is a file of that name", where=str(directory), remedy="choose another")
    if directory.exists() and not overwrite:
        raise OptionError("the output folder exists", where=str(directory), remedy="choose another, or overwrite=True (--overwrite)")
    above = next(place for place in directory.absolute().parents if place.exists())
    if not above.is_dir():
        raise OptionError("there is a file where a folder is to be", where=str(above), remedy="choose another folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise OptionError("nothing can be written there", where=str(above), remedy="choose another folder")


@contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Let no other process write the folder meanwhile, and clear what one that was killed has left beside it.

    The claim is a locked file beside the folder. The system lifts the lock when its process ends in whatever way; the same process may
    claim a folder again. Windows has no such locks: there the process that is done first wins.

    Raises:
        DataError: another process writes it.
    """
    directory = directory.absolute()
    if sys.platform == "win32":
        yield
        return
    with refused_in_words(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = directory.with_name(f".{directory.name}.lock")
        file = _locked(lock, directory)
    try:
        _recover(directory)
        yield
    finally:
        with suppress(OSError):
            if _same(file, lock):
                lock.unlink()  # before it is closed: who opens the name hereafter makes a new file
        os.close(file)


def _locked(lock: Path, directory: Path) -> int:
    """A descriptor of the file, locked."""
    import fcntl  # noqa: PLC0415 (a module of Unix)

    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(file)
            raise DataError(
                "another process is writing this folder", where=str(directory), remedy="wait for it, or choose another"
            ) from error
        if _same(file, lock):
            return file
        os.close(file)  # it was removed between opening and locking


def _same(file: int, path: Path) -> bool:
    """Whether an open file still has that name."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _recover(directory: Path) -> None:
    """Clear what is left of processes that were killed; a result that one was about to replace gets its name back."""
    for old in _beside(directory, OLD):
        if not directory.exists():
            old.rename(directory)
        shutil.rmtree(old, ignore_errors=True)
    for partial in _beside(directory, PARTIAL):
        shutil.rmtree(partial, ignore_errors=True)


def beside(directory: Path, kind: str) -> Path:
    """The name of a folder beside the result that a process of ours may leave and a later one clears."""
    return directory.with_name(f".{directory.name}.{kind}-{os.getpid()}")


def _beside(directory: Path, kind: str) -> list[Path]:
    prefix = f".{directory.name}.{kind}-"
    return [path for path in directory.parent.iterdir() if path.name.startswith(prefix) and path.is_dir() and not path.is_symlink()]


@contextmanager
def appearing_folder(directory: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `directory` that takes its name at the end, and is removed if anything goes wrong.

    Raises:
        OptionError: as of `check_free`.
        DataError: it cannot be written, or another process writes it.
    """
    check_free(directory, overwrite)
    partial = beside(directory, PARTIAL)
    with claimed(directory):
        check_free(directory, overwrite)  # another process may just have written it
        try:
            with refused_in_words(directory):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                yield partial
                _take_place(partial, directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _take_place(partial: Path, directory: Path) -> None:
    """Give a folder the name of another, which goes."""
    if not directory.exists():
        partial.rename(directory)
        return
    old = beside(directory, OLD)
    directory.rename(old)
    try:
        partial.rename(directory)
    except BaseException:
        old.rename(directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def refused_in_words(directory: Path, remedy: str = "free space, or choose another folder") -> Iterator[None]:
    """What the system refuses to write is an error of ours.

    Raises:
        DataError: the reason, and where.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot write: {reason}", where=str(directory), remedy=remedy) from error


@contextmanager
def temporary_files() -> Iterator[None]:
    """What is done meanwhile, such as lowering, may write temporary files.

    Raises:
        DataError: it could not.
    """
    with refused_in_words(Path(tempfile.gettempdir()), "free space there, or set TMPDIR to a folder on another disk"):
        yield
