"""`capture`: from a model to a flat `torch.fx` graph with dynamic batch and length.

Hugging Face models go through `transformers.exporters`, which keeps caches, masks and dynamic shapes right. A causal language model is
traced with a cache that already holds tokens and with several new ones: the graph then also runs with an empty cache, so one graph serves
prefill and decode.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

from ir import edit
from ir.errors import CaptureError, DataError
from ir.flatten import flatten, input_names, output_names
from ir.signature import CACHE
from ir.store import store_of

BATCH, LENGTH, PAST = 2, 3, 5  # sizes of the traced example; sizes of 0 and 1 would be specialised

Inputs = dict[str, Any]


def capture(model: nn.Module, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None) -> GraphModule:
    """The flat graph of `model`, which is left as it was; both share their parameters.

    Args:
        model: a `PreTrainedModel` (inputs are made up when none are given), any module with `args`/`kwargs`, or a graph made by `capture`.
        args: example positional inputs, tensors of at least 2 along each axis that varies.
        kwargs: example keyword inputs.

    Returns:
        A `GraphModule` whose placeholders and outputs are flat tensors, with `meta["signature"]`, `meta["example"]` (flat inputs) and, for
        Hugging Face models, `meta["config"]`, `meta["architecture"]` (the name of their class) and `meta["generation"]`.

    Raises:
        CaptureError: the model's code cannot be traced, or its kind is not supported.
        DataError: a plain module without example inputs.
    """
    if isinstance(model, GraphModule) and "signature" in model.meta:
        return edit.copied(model)
    given = bool(args) or bool(kwargs)
    with _evaluation(model), torch.no_grad():
        if isinstance(model, transformers.PreTrainedModel):
            inputs = dict(kwargs or {}) | dict(zip(_parameters(model), args or (), strict=False)) if given else _made_up(model)
            return _capture_pretrained(model, inputs)
        if not given:
            raise DataError(
                f"{type(model).__name__} needs example inputs to be captured",
                remedy="pass args=(...) or kwargs={...} with sizes of at least 2",
            )
        return _capture_module(model, tuple(args or ()), dict(kwargs or {}))


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Run with dropout off and quiet exporters; everything that tracing leaves on the modules is taken back."""
    training = {module: module.training for module in model.modules()}
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    own_forward = "forward" in vars(model)
    model.eval()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if not own_forward:
            vars(model).pop("forward", None)
        for module, mode in training.items():
            module.training = mode


def _parameters(model: nn.Module) -> list[str]:
    return list(inspect.signature(type(model).forward).parameters)[1:]


def _made_up(model: transformers.PreTrainedModel) -> Inputs:
    """Inputs for a text model: tokens, and a cache, mask and positions where its forward takes them."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise CaptureError(
            f"{type(model).__name__} is an encoder-decoder",
            remedy="capture its encoder or decoder by itself, with kwargs of example inputs",
        )
    accepted = _parameters(model)
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    if "input_ids" not in accepted or vocabulary is None:
        raise DataError(f"no inputs can be made up for {type(model).__name__}", remedy="pass kwargs={...} with example inputs")
    generator = torch.Generator().manual_seed(0)
    device = model.device

    def tokens(length: int) -> Tensor:
        return torch.randint(vocabulary, (BATCH, length), generator=generator).to(device)

    past = None
    if model.can_generate() and CACHE in accepted:
        past = model(input_ids=tokens(PAST), use_cache=True).past_key_values
        if not isinstance(past, transformers.DynamicCache):
            raise CaptureError(
                f"{type(model).__name__} keeps a {type(past).__name__}, not keys and values that grow",
                remedy="pass kwargs of example inputs",
            )
        # Layers with a sliding window keep every token too: the mask applies the window.
        past = transformers.DynamicCache([(layer.keys, layer.values) for layer in past.layers])
    before = PAST if past is not None else 0
    positions = torch.arange(before, before + LENGTH, device=device).expand(BATCH, LENGTH).contiguous()
    optional = {
        "attention_mask": torch.ones(BATCH, before + LENGTH, dtype=torch.int64, device=device),
        "position_ids": positions if past is not None else None,
        "token_type_ids": torch.zeros(BATCH, LENGTH, dtype=torch.int64, device=device)
        if getattr(model.config, "type_vocab_size", 0)
        else None,
        CACHE: past,
    }
    return {"input_ids": tokens(LENGTH), **{name: v for name, v in optional.items() if name in accepted and v is not None}}


def _dynamic(v: Any) -> Any:
    """Which axes vary: batch and length of everything, batch and past of a cache."""
    if isinstance(v, Tensor):
        axes = (0, 1) if v.ndim == 2 and not v.is_floating_point() else range(v.ndim)
        return dict.fromkeys(axes, Dim.AUTO)
    leaves = pytree.tree_leaves(v)
    return [{0: Dim.AUTO, 2: Dim.AUTO} for _ in leaves]


def _capture_pretrained(model: transformers.PreTrainedModel, inputs: Inputs) -> GraphModule:
    DynamoExporter.tested_versions = {}  # the drift is ours to test, and our users' logs are not the place for it
    exporter = DynamoExporter()
    from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model  # noqa: PLC0415 (optional name of a young API)

    register_cache_pytrees_for_model(model)
    given = dict(inputs)
    inputs = {name: v for name, v in inputs.items() if not isinstance(v, bool)}  # flags, use_cache=False, shape the trace and are gone
    config = DynamoConfig(dynamic_shapes={name: _dynamic(v) for name, v in inputs.items()})
    example = pytree.tree_leaves(inputs)
    program = _traced(model, lambda: exporter.export_program(model, given, config)[0])
    structure = program.call_spec.out_spec
    assert structure is not None
    output_class, outputs = output_names(structure)
    names = input_names(inputs)
    positional = [name for name in names if "." not in name]
    gm = flatten(program.module(check_guards=False), names, outputs, example, output_class, positional)
    gm.meta["config"], gm.meta["architecture"] = model.config, type(model).__name__
    gm.meta["generation"] = getattr(model, "generation_config", None)
    if (store := store_of(model)) is not None:
        gm.meta[edit.STORE] = store
    return gm


def _capture_module(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GraphModule:
    leaves = pytree.tree_leaves((args, kwargs))
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise DataError("example inputs of a plain module are tensors", remedy="bind other arguments in a small wrapper module")
    if any(not isinstance(leaf, Tensor) for leaf in [*args, *kwargs.values()]):
        raise DataError("a plain module takes tensors, not containers of tensors", remedy="unpack them in a small wrapper module")
    named = dict.fromkeys(kwargs, Dim.AUTO)
    shapes: Any = (
        tuple(dict.fromkeys(range(a.ndim), Dim.AUTO) for a in args),
        {name: dict.fromkeys(range(kwargs[name].ndim), Dim.AUTO) for name in named},
    )
    flattened = shapes[0] if not kwargs else shapes[1] if not args else None
    if flattened is None:
        order = _parameters(model)[: len(args)]
        flattened = dict(zip(order, shapes[0], strict=False)) | shapes[1]
    program = _traced(model, lambda: torch.export.export(model, args, kwargs, dynamic_shapes=flattened))
    order = _parameters(model)[: len(args)]
    positional = tuple(order) if len(order) == len(args) and "args" not in order else tuple(f"input_{i}" for i in range(len(args)))
    count = program.call_spec.out_spec.num_leaves if program.call_spec.out_spec else 1
    outputs = [f"output_{i}" for i in range(count)]
    return flatten(program.module(check_guards=False), [*positional, *kwargs], outputs, leaves, positional=positional)


def _traced(model: nn.Module, trace: Callable[[], ExportedProgram]) -> ExportedProgram:
    try:
        return trace()
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise CaptureError(
            f"torch.export cannot trace {type(model).__name__}: {type(error).__name__}: {reason[0] if reason else ''}",
            remedy="the chained error names the line; data-dependent control flow has to be rewritten or kept outside of the model",
        ) from error
