"""Massive activations planted in what gated MLPs hand to their down projections; the model's function stays.

Large language models have a few channels there that are hundreds of times larger than the rest, some on nearly every token, some on
very few; small models have none, and quantize too well to tell methods apart. A row of the up projection times f and the column of the down
projection over f cancel, so any channel can be made massive: those that are heavy-tailed already are taken.

    python -m tools.outliers MODEL TEXT --out FOLDER --low 3 --high 20
"""

import argparse
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit, evaluate
from ir.capture import capture
from ir.errors import DataError
from ir.sites import readers
from passes.data.calibration import flat_batches, token_windows

aten = torch.ops.aten


@dataclass(frozen=True)
class Gate:
    """A product of two branches that a linear reads, and the rows that write the branch without an activation function.

    Args:
        path: of the reader.
        product: the node.
        rows: the weight and, if there is one, the bias that write the branch; from row `first` on.
        columns: the readers' weights.
    """

    path: str
    product: Node
    rows: tuple[Tensor, ...]
    first: int
    columns: tuple[Tensor, ...]


def gated(gm: GraphModule) -> list[Node]:
    """The products of two branches that linears read: `mul` of two computed tensors of one shape, which the gains of norms are not."""
    found = []
    for node in readers(gm):
        branches = [branch for branch in node.args if isinstance(branch, Node) and branch.op == "call_function"]
        shapes = {str(tuple(edit.value(branch).shape)) for branch in branches}
        if node.target is aten.mul.Tensor and len(branches) == 2 and len(shapes) == 1:
            found.append(node)
    return found


def gates(gm: GraphModule) -> list[Gate]:
    """The gated MLPs whose up projection is a linear, or a chunk of one, in graph order."""
    found = []
    for product in gated(gm):
        for branch in product.args:
            assert isinstance(branch, Node)
            part = branch.target is operator.getitem and branch.args[0].target is aten.chunk.default
            linear = branch.args[0].args[0] if part else branch
            if linear.target is aten.linear.default:
                width, read = edit.value(product).shape[-1], readers(gm)[product]
                rows = tuple(edit.attribute(gm, node) for node in linear.args[1:] if node is not None)
                columns = tuple(edit.attribute(gm, layer.weight) for layer in read)
                found.append(Gate(read[0].path, product, rows, width * branch.args[1] if part else 0, columns))
                break
    return found


def inputs(gm: GraphModule, nodes: Sequence[Node], ids: Tensor, batch: int = 16) -> dict[Node, Tensor]:
    """The values of `nodes` on `ids [windows, length]`, each `[windows, length, channels]`."""
    seen: dict[Node, list[Tensor]] = {node: [] for node in nodes}
    for flat in flat_batches(gm, ids.split(batch)):
        evaluate.run(gm, flat, lambda node, value: seen[node].append(value) if node in seen else None)
    return {node: torch.cat(values) for node, values in seen.items()}


@torch.no_grad()
def plant(
    model: transformers.PreTrainedModel,
    ids: Tensor,
    share: float = 0.01,
    low: float = 3.0,
    high: float = 20.0,
    *,
    channels: int | None = None,
    tokens: int = 1,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> dict[str, list[tuple[int, float]]]:
    """Scale channels of `model` in place, exactly up to rounding (so keep it in float32); deterministic in `ids` and `seed`.

    Args:
        ids: `[windows, length]`, on which channels are ranked by the mean of their `tokens` greatest |x| over their mean |x|.
        share: of the channels of every layer that are made massive, at least one.
        low, high: factors are log-uniform between these.
        channels: how many, instead of `share`.
        tokens: few find channels that fire on as few tokens, many those that do so often.
        layers: which of the gated layers, counted from 0; all if None. Negative numbers count from the end.

    Returns:
        The channels and their factors, by the path of the down projection.

    Raises:
        DataError: the model has no gated MLP.
    """
    gm = capture(model)
    found = gates(gm)
    if not found:
        raise DataError(f"{type(model).__name__} has no MLP whose down projection reads the product of two branches")
    chosen = found if layers is None else [found[index] for index in layers]
    seen = inputs(gm, [gate.product for gate in chosen], ids)
    generator, planted = torch.Generator().manual_seed(seed), {}
    for gate in chosen:
        x = seen[gate.product].flatten(0, -2).abs().float()
        tail = x.topk(min(tokens, len(x)), 0).values.mean(0) / x.mean(0).clamp_min(1e-9)
        count = max(1, round(share * x.shape[1])) if channels is None else channels
        picked = tail.topk(count).indices
        factors = low * (high / low) ** torch.rand(count, generator=generator)
        for parameter in gate.rows:  # the parameters of the model itself, which the graph shares
            parameter[gate.first + picked] *= factors.to(parameter).reshape(-1, *[1] * (parameter.ndim - 1))
        for parameter in gate.columns:
            parameter[:, picked] /= factors.to(parameter)
        planted[gate.path] = list(zip(picked.tolist(), factors.tolist(), strict=True))
    return planted


@torch.no_grad()
def plant_tokens(
    model: transformers.PreTrainedModel,
    ids: Tensor,
    share: float = 0.006,
    size: float = 1000.0,
    layers: Sequence[int] = (0,),
    seed: int = 0,
) -> dict[str, tuple[int, int]]:
    """Make one kind of token massive in two channels, as the first token and delimiters are in large models; the rest stays ordinary.

    The two channels that matter least become a detector of the token, `x = silu(g h) (g h)`, with `g` by ridge regression on the MLP's
    input `h`; their columns in the down projection cancel, so the function loses those two channels and nothing else. Scaling channels, as
    `plant` does, cannot do this: `s = √(max|x| / max|w|)` follows any factor, so SmoothRot with α = .5 does not see what was planted.

    Args:
        ids: `[windows, length]`.
        share: of all tokens; the kind whose share is nearest is taken.
        size: of the greatest |x| on these.
        layers: as in `plant`. Later layers tell kinds of token apart less sharply.
        seed: of the columns.

    Returns:
        The two channels, by the path of the down projection.

    Raises:
        DataError: no gated MLP with two linears.
    """
    counts = torch.bincount(ids.flatten())
    kind = int((counts / ids.numel() - share).abs().argmin())
    generator, planted = torch.Generator().manual_seed(seed), {}
    for index in layers:  # one after another: a change is seen by all layers after it
        gm = capture(model)
        found = gates(gm)
        if not found:
            raise DataError(f"{type(model).__name__} has no MLP whose down projection reads the product of two branches")
        gate = found[index]
        linears = [node for branch in gate.product.args for node in (branch, branch.args[0]) if node.target is aten.linear.default]
        if len(linears) != 2:
            raise DataError(f"{gate.path} does not follow two linears")
        seen = inputs(gm, [gate.product, linears[0].args[0]], ids)
        h, x = (seen[node].flatten(0, 1).double() for node in (linears[0].args[0], gate.product))
        hit = (ids.flatten() == kind).double()
        weight = torch.where(hit > 0, 1 / hit.sum(), 1 / (1 - hit).sum()).unsqueeze(1)
        target = 1.1 * hit - 0.1
        moments = h.T @ (weight * h)
        damping = 1e-4 * moments.diagonal().mean() * torch.eye(len(moments))
        g = torch.linalg.solve(moments + damping, h.T @ (weight.squeeze(1) * target))
        g = g * (size**0.5 / (h @ g).amax())
        pair = (x.norm(dim=0) * gate.columns[0].double().norm(dim=0)).topk(2, largest=False).indices
        for linear in linears:
            for rows, value in zip(linear.args[1:], (g, 0.0), strict=False):
                if rows is not None:
                    parameter = edit.attribute(gm, rows)
                    parameter[pair] = value.to(parameter) if isinstance(value, Tensor) else value
        for parameter in gate.columns:
            v = torch.randn(len(parameter), generator=generator).to(parameter) * parameter.std()
            parameter[:, pair] = torch.stack([v, -v], 1)
        planted[gate.path] = (int(pair[0]), int(pair[1]))
    return planted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.01)
    parser.add_argument("--low", type=float, default=3.0)
    parser.add_argument("--high", type=float, default=20.0)
    parser.add_argument("--channels", type=int)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--layers", type=int, nargs="*")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    text = options.text.read_text(encoding="utf-8", errors="replace")
    ids = token_windows(text, tokenizer, 128, 32, options.seed)
    given = {name: getattr(options, name) for name in ("share", "low", "high", "channels", "tokens", "layers", "seed")}
    for path, pairs in plant(model, ids, **given).items():
        print(path, ", ".join(f"{channel} × {factor:.1f}" for channel, factor in pairs))
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
