"""Open a folder's checkpoint: its weights are mapped, not read, and converted one by one where another dtype is asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ir.errors import DataError
from ir.files import inside, read_json
from ir.store import Store, kept_parameters

SINGLE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
SPECIAL = ("quantization_config", "transformers_weights")  # of a configuration: the library decides what its files mean


class _Stored:
    """A stored tensor as transformers sees those of safetensors: sliced, then taken to its device and dtype. Converted ones are kept."""

    def __init__(self, tensor: Tensor, store: Store) -> None:
        self.tensor, self.store = tensor, store

    def __getitem__(self, where: Any) -> "_Stored":
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor in a dtype; devices are for others."""
        if dtype in {None, self.tensor.dtype}:
            return self.tensor
        self.store.count(self.tensor.nbytes)
        return self.store.keep(self.tensor.to(dtype))


def shards(folder: Path, config: Any) -> list[Path]:
    """The safetensors files of a checkpoint, or none if it is of another kind: then the library has to load it.

    Raises:
        DataError: a damaged index.
    """
    special = any(getattr(config, name, None) for name in SPECIAL) or getattr(type(config), "extra_files", None)
    if special or (folder / ADAPTER).is_file():
        return []
    if (folder / SINGLE).is_file():
        return [inside(folder, SINGLE)]
    if not (folder / INDEX).is_file():
        return []
    return [inside(folder, name) for name in sorted({str(name) for name in read_json(folder / INDEX)["weight_map"].values()})]


def open_shards(kind: type[PreTrainedModel], folder: Path, config: Any, files: Sequence[Path], dtype: str, store: Store) -> tuple[Any, Any]:
    """The model in a folder and what transformers tells of loading it. Weights that it changes, beside their dtype, are kept one by one.

    Args:
        kind: its class.
        files: its safetensors files.
        dtype: a name of torch's, or "auto" for the checkpoint's own.

    Raises:
        DataError: a damaged file, or a full disk.
    """
    stored: dict[str, Tensor] = {}
    for file in files:
        stored |= store.open(file)
    wanted = _own_dtype(config, stored) if dtype == "auto" else getattr(torch, dtype)
    with kept_parameters(store):
        model, info = kind.from_pretrained(
            None, config=config, state_dict={name: _Stored(t, store) for name, t in stored.items()}, dtype=wanted, output_loading_info=True
        )
    model.config.name_or_path = model.name_or_path = str(folder)
    if model.can_generate() and (folder / transformers.utils.GENERATION_CONFIG_NAME).is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model, info


def _own_dtype(config: Any, stored: dict[str, Tensor]) -> torch.dtype:
    """The dtype that a configuration states, or else that of the first weights in floating point."""
    stated: torch.dtype | str | None = getattr(config, "dtype", None)
    if stated is not None:
        return getattr(torch, stated) if isinstance(stated, str) else stated
    found = next((tensor.dtype for tensor in stored.values() if tensor.is_floating_point()), None)
    if found is None:
        raise DataError("the checkpoint has no weights in floating point", remedy="name the dtype")
    return found
