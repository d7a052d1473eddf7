"""A model's files, as transformers writes them, with one tensor in memory at a time.

Names, ties and the division into files are transformers' own: it sees tensors without memory in place of those that are yet to be made.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from huggingface_hub import split_state_dict_into_shards_factory
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ir.deferred import Deferred, counted
from ir.errors import BackendError
from ir.store import Store
from ir.tensor_file import write_tensors

PATTERN = "model{suffix}.safetensors"
METADATA = {"format": "pt"}


def write_model(
    model: transformers.PreTrainedModel, tensors: Mapping[str, Deferred], directory: Path, shard: str, store: Store | None
) -> None:
    """Write a model's configuration, tensors, and an index if there are several files of them.

    Args:
        model: the model.
        tensors: as `named` gives them.
        directory: an existing folder.
        shard: the greatest size of a file, "5GB".
        store: that holds tensors that these are made of.
    """
    model.save_pretrained(directory, state_dict={})  # all but the tensors
    split = split_state_dict_into_shards_factory(
        dict(tensors), get_storage_size=lambda tensor: tensor.nbytes, filename_pattern=PATTERN, max_shard_size=shard
    )
    for file, names in split.filename_to_tensors.items():
        write_tensors(directory / file, {name: counted(tensors[name], store) for name in names}, METADATA)
    if split.is_sharded:
        index = {"metadata": {"total_parameters": model.num_parameters(), **split.metadata}, "weight_map": split.tensor_to_filename}
        (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def named(model: transformers.PreTrainedModel, made: Mapping[str, Deferred]) -> dict[str, Deferred]:
    """All tensors of a model, its own and those that are yet to be made, as the class's checkpoints name them.

    Raises:
        BackendError: transformers stores the class's tensors in another form, which these further ones have not.
    """
    standing = {name: torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape) for name, tensor in made.items()}
    state = {**model.state_dict(), **standing}
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    state = revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))
    waiting = {tensor.data_ptr(): made[name] for name, tensor in standing.items()}
    found = {name: waiting.get(tensor.data_ptr() if tensor.numel() else 0) for name, tensor in state.items()}
    kept = {name: tensor for name, tensor in found.items() if tensor is not None}
    if len(kept) != len(made) or any(tuple(state[name].shape) != tensor.shape for name, tensor in kept.items()):
        raise BackendError(
            f"{type(model).__name__} stores its linears otherwise than as one tensor each, which compressed weights do not fit",
            where="backend hf",
            remedy="ignore the layers that its checkpoints join or split, or use backend='onnx'",
        )
    return {name: kept.get(name) or Deferred.of(tensor) for name, tensor in state.items()}
