"""Files: those that we write appear whole or not at all, those that we read may come from anybody."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ir.errors import DataError

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # half a character, unless its other half follows: such text cannot be written
LONGEST_TEXT = 1 << 26  # bytes: the graph of a hundred layers has a few million, and plain data takes 20 times as much in memory


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write under; what was written takes the place of `path` unless an error is raised."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def inside(folder: Path, name: str) -> Path:
    """The path of a file of a folder that may come from anybody.

    Links may lead to other files of the folder, and in a cache of the Hub, `snapshots/<revision>`, to the `blobs` beside.

    Raises:
        DataError: `name` is a path and no name, there is no such file, it is a pipe or a device, or a link leads out of the folder.
    """
    path = folder / name
    if name in {"", ".", ".."} or not set(name).isdisjoint("/\\\0:"):
        raise DataError(f"{name!r} is no name of a file in the folder", where=str(folder), remedy="do not use what this folder holds")
    try:
        home, real = folder.resolve(), path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links is a RuntimeError
        raise DataError(f"there is no {name}", where=str(folder)) from error
    homes = [home, *([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])]
    if not any(real.is_relative_to(allowed) for allowed in homes):
        raise DataError(f"{name} is a link that leads out of the folder", where=str(folder), remedy="copy the file that you mean there")
    if not real.is_file():
        raise DataError(f"{name} is no file", where=str(folder))
    return path


def read_text(path: Path, limit: int = LONGEST_TEXT) -> str:
    """The text of a file.

    Raises:
        DataError: there is no such file, it is a pipe or a device, has more than `limit` bytes, or is not UTF-8.
    """
    try:
        if path.exists() and not path.is_file():
            raise DataError("this is no file", where=str(path))
        with path.open("rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise DataError(f"files of this kind have at most {limit} bytes", where=str(path))
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError("it is not UTF-8", where=str(path)) from error
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise DataError(f"it cannot be read: {getattr(error, 'strerror', None) or error}", where=str(path)) from error


def read_json(path: Path) -> Any:
    """The plain data in a file of JSON.

    Raises:
        DataError: the file cannot be read, or is no JSON.
    """
    try:
        text = read_text(path)
        data = json.loads(text)
        if SURROGATE.search(text):
            json.dumps(data, ensure_ascii=False).encode()
        return data
    except (ValueError, RecursionError) as error:
        raise DataError(f"it is no JSON: {error}", where=str(path)) from error
