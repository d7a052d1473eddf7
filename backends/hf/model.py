"""The transformers model that a checkpoint describes: filled with its tensors, and compared with the graph."""

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers.initialization import no_init_weights

from backends.hf.cache import RoundedCache
from backends.hf.quantized import Rounded
from ir import edit, evaluate
from ir.signature import CACHE, Signature
from ir.store import Store
from passes.probe import relative_error

CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of the logits, relative
CLOSE_ROUNDED = ((8, 5e-2), (0, 0.5))  # the same where inputs have that many bits: a difference of 1e-7 can move one to the next code


def filled(
    config: Any, architecture: str, state: Mapping[str, Tensor], linears: Mapping[str, Rounded], dtype: torch.dtype, generation: Any = None
) -> transformers.PreTrainedModel:
    """The model of a configuration with tensors by their names, which it shares, and quantized linears in place of the class's own."""
    with no_init_weights():
        model = getattr(transformers, architecture)._from_config(config, dtype=dtype)
    parameters = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in state.items()}
    model.load_state_dict(parameters, strict=False, assign=True)
    for name, rounded in linears.items():
        rounded.bias = model.get_submodule(name).bias
        model.set_submodule(name, rounded)
    model.tie_weights()
    if generation is not None:
        model.generation_config = copy.deepcopy(generation)
    return model.eval()


def linear_names(model: nn.Module) -> list[str]:
    """The modules that the class `Linear` means in a compressed checkpoint's configuration."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Rounded)]


def allowed(dtype: torch.dtype, linears: Mapping[str, Rounded], cache: RoundedCache | None) -> float:
    """The difference up to which logits count as equal."""
    given = [linear.scheme.input_activations for linear in linears.values()] + ([] if cache is None else [cache.arguments])
    least = min((rounded.num_bits for rounded in given if rounded), default=0)
    rounded = next(bound for bits, bound in CLOSE_ROUNDED if least >= bits) if least else 0.0
    return max(CLOSE.get(dtype, 1e-4), rounded)


@torch.no_grad()
def difference(gm: GraphModule, model: transformers.PreTrainedModel) -> float:
    """Of the first outputs of graph and model on the example, relative; with a cache over two steps."""
    signature: Signature = gm.meta["signature"]
    given = {port.name: value for port, value in zip(signature.inputs, gm.meta["example"], strict=True) if not port.cached}
    given = {"input_ids": given["input_ids"]} if "input_ids" in given else given
    caches: list[dict[str, Any]] = [{}, {}]
    _count(model, gm.meta.get(edit.STORE))
    greatest = 0.0
    for _ in range(2 if signature.causal else 1):
        mine = signature.wrap(evaluate.run(gm, signature.bind(**given, **caches[0])))
        theirs = model(**given, **caches[1])
        greatest = max(greatest, relative_error((mine[0],), (theirs[0],)))
        caches = [{CACHE: found.get(CACHE)} if CACHE in found else {} for found in (mine, theirs)]
    return greatest


def _count(model: nn.Module, store: Store | None) -> None:
    """Let a model's modules count what they read of the graph's tensors, so that it is released again."""
    if store is None:
        return
    for module in model.modules():
        read = [module.stored] if isinstance(module, Rounded) else list(module.parameters(recurse=False))
        if read:
            module.register_forward_pre_hook(partial(_count_read, store, sum(tensor.nbytes for tensor in read)))


def _count_read(store: Store, size: int, *_: Any) -> None:
    store.count(size)
