"""Folders of results: they appear whole or not at all, and only fxpress's own are ever replaced."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ir.errors import DataError, OptionError

MANIFEST = "fxpress.json"


def check_free(directory: Path, overwrite: bool) -> None:
    """Refuse a target folder that exists. Only what fxpress wrote, or an empty folder, is ever replaced.

    Raises:
        OptionError: it exists, and may not be overwritten.
    """
    if overwrite and directory.is_dir() and any(directory.iterdir()) and not (directory / MANIFEST).is_file():
        raise OptionError(f"the folder has no {MANIFEST}: fxpress did not write it", where=str(directory), remedy="choose another")
    if overwrite and directory.exists() and not directory.is_dir():
        raise OptionError("there is a file of that name", where=str(directory), remedy="choose another")
    if directory.exists() and not overwrite:
        raise OptionError("the output folder exists", where=str(directory), remedy="choose another, or overwrite=True (--overwrite)")


@contextmanager
def appearing_folder(directory: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `directory` that takes its name at the end, and is removed if anything goes wrong."""
    check_free(directory, overwrite)
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if directory.exists():
            old = directory.with_name(f".{directory.name}.old-{os.getpid()}")
            directory.rename(old)
            try:
                partial.rename(directory)
            except BaseException:
                old.rename(directory)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            partial.rename(directory)
    except OSError as error:
        raise DataError(
            f"cannot write: {error.strerror or error}", where=str(directory), remedy="free space, or choose another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
