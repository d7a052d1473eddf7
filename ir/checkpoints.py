"""Checkpoints of transformers as they may come from anybody: what a folder may name and state before its model is made."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules import module as hooks

from ir.errors import DataError
from ir.files import inside, read_json

CONFIG, TOKENIZER_CONFIG, INDEX = "config.json", "tokenizer_config.json", "*.index.json"
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
PER_BYTE = 4  # elements in a byte of the narrowest weights that are stored packed
ROOM = 1 << 26  # elements beside those that are stored: masks and tables that follow from the configuration
MODULES = 1 << 20
COUNT = 1_000_000  # layers, heads, labels: configurations make lists of that length


def check_checkpoint(folder: Path) -> None:
    """Look at a folder before transformers reads it: links and shards stay within it, and no count is absurd.

    Raises:
        DataError: a link or a name that leads out of the folder, a damaged index, or a configuration with more than a million of something.
    """
    for path in folder.iterdir():
        if path.is_symlink() and not path.is_dir():
            inside(folder, path.name)
        elif path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"{path.name} is a link that leads out of the folder", where=str(folder))
    for index in folder.glob(INDEX):
        shards = _mapping(_mapping(read_json(index), index).get("weight_map"), index)
        for shard in {str(shard) for shard in shards.values()}:
            inside(folder, shard)
    if (folder / CONFIG).is_file():
        _check_counts(_mapping(read_json(folder / CONFIG), folder / CONFIG), folder / CONFIG)
    if (folder / TOKENIZER_CONFIG).is_file():
        for key, value in _mapping(read_json(folder / TOKENIZER_CONFIG), folder / TOKENIZER_CONFIG).items():
            if key.endswith("_file") and isinstance(value, str):
                inside(folder, value)


def _mapping(data: Any, path: Path) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise DataError("it holds no object", where=str(path))
    return data


def _check_counts(config: dict[str, Any], path: Path) -> None:
    left: list[dict[str, Any]] = [config]
    while left:
        for key, value in left.pop().items():
            if isinstance(value, dict):
                left.append(value)
            counts = key.startswith(("num_", "n_")) or "layer" in key or "depth" in key
            if counts and isinstance(value, int | float) and not abs(value) <= COUNT:
                raise DataError(f"{key} is {value}", where=str(path), remedy="do not use this checkpoint")


@contextmanager
def bounded(folder: Path) -> Iterator[None]:
    """Refuse models that are greater than what a folder stores, as they are made: a configuration alone takes no memory and no time.

    Raises:
        DataError: parameters and buffers have more than four elements for each byte of the files of weights, and some room beside.
    """
    stored = sum(path.stat().st_size for pattern in WEIGHTS for path in folder.glob(pattern))
    room, made = PER_BYTE * stored + ROOM, 0
    sizes: dict[tuple[int, str], int] = {}

    def tensor(module: nn.Module, name: str, given: Any) -> None:
        nonlocal room
        size = 0 if given is None else math.prod(given.shape)
        room += sizes.get((id(module), name), 0) - size
        sizes[id(module), name] = size
        if room < 0:
            problem = f"the configuration describes a model that is greater than its weights, {stored} bytes"
            raise DataError(problem, where=str(folder), remedy="complete the checkpoint")

    def submodule(module: nn.Module, name: str, given: nn.Module | None) -> None:
        nonlocal made
        made += 1
        if made > MODULES:
            raise DataError(f"the configuration describes more than {MODULES} modules", where=str(folder))

    handles = [
        hooks.register_module_parameter_registration_hook(tensor),
        hooks.register_module_buffer_registration_hook(tensor),
        hooks.register_module_module_registration_hook(submodule),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
