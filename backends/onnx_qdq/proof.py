"""The gate: a written model compared with its graph in ONNX Runtime, as a whole, or block by block where it is large.

A session holds its weights, and copies of many of them as its kernels want them. A block is opened by itself: it gets what enters it in
the graph, and has to return what leaves it there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as onir
import onnxruntime
from torch import Tensor
from torch.fx import GraphModule, Node

from backends.gate import activations, difference, tolerance, uncoded
from backends.onnx_qdq.cuts import Part, extracted, port_of
from backends.onnx_qdq.forms import SHARED
from backends.onnx_qdq.session import Executed, end_profile, open_session, run_flat
from ir import evaluate
from ir.errors import BackendError
from ir.signature import CACHE, Signature


@dataclass(frozen=True)
class Settings:
    """The settings of sessions.

    Args:
        exact: without further rounding.
        used: those that users get.
        level: the accuracy level that goes with these.
        threads: within an operator.
    """

    exact: Mapping[str, str]
    used: Mapping[str, str]
    level: int
    threads: int


@dataclass(frozen=True)
class Proof:
    """What was found.

    Args:
        exact: the greatest relative difference without further rounding.
        used: the same as users get it.
        executed: what ran.
        session: over the whole model, if there was one.
        blocks: the differences of every block, if they were compared one by one.
    """

    exact: float
    used: float
    executed: Executed
    session: onnxruntime.InferenceSession | None = None
    blocks: list[dict[str, Any]] = field(default_factory=list)


def whole(path: Path, settings: Settings, gm: GraphModule, probe: Sequence[Tensor]) -> Proof:
    """Compare a model on the probe.

    Raises:
        BackendError: it differs.
    """
    signature: Signature = gm.meta["signature"]
    oracle = uncoded(signature, evaluate.run(gm, probe))
    ours = run_flat(open_session(path, settings.exact, threads=settings.threads), probe)
    exact = _close(uncoded(signature, ours), oracle, gm, "on the probe")
    _state_level(path, settings.level)
    session = open_session(path, settings.used, threads=settings.threads, profile=path.with_name("profile"))
    used = difference(uncoded(signature, run_flat(session, probe)), oracle)
    return Proof(exact, used, end_profile(session), session)


def by_blocks(
    path: Path, settings: Settings, gm: GraphModule, probe: Sequence[Tensor], found: Sequence[Part], names: Mapping[Node, str]
) -> Proof:
    """Compare the blocks of a model, each on what enters it in the graph: on the probe's tokens, and on one more that reads their cache.

    Args:
        path: of the model.
        settings: of sessions.
        gm: the graph.
        probe: flat inputs.
        found: the graph's parts.
        names: of the values at their cuts, in the model.

    Raises:
        BackendError: a block differs.
    """
    signature: Signature = gm.meta["signature"]
    given: Sequence[Node] = gm.graph.output_node().args[0]  # type: ignore[assignment]
    called = {node: port.name for node, port in zip(given, signature.outputs, strict=True) if port not in signature.coded} | dict(names)
    runs = _runs(gm, probe, list(dict.fromkeys([*names, *given])))
    model = onir.load(path)
    blocks: list[dict[str, Any]] = []
    operators: dict[str, str] = {}
    for part in found:
        wanted = [node for node in part.exit if node in called]
        piece = extracted(model, {names[node]: port_of(node) for node in part.entry}, [called[node] for node in wanted], signature)
        feeds = [
            ({**inputs, **{names[node]: values[node] for node in part.entry}}, [values[node] for node in wanted]) for inputs, values in runs
        ]
        place = path.with_name(f".{path.name}.part")
        try:
            onir.save(piece, place)
            exact = _exact(place, settings, feeds, gm, part.label)
            _set_level(piece, settings.level)
            onir.save(piece, place)
            used, executed = _used(place, settings, feeds)
        finally:
            place.unlink(missing_ok=True)
        operators |= {f"{part.label}: {name}": operator for name, operator in executed.operators.items()}
        blocks.append({"block": part.label, "probe_difference_exact": exact, "probe_difference": used})
    _state_level(path, settings.level)
    exact, used = (max(block[key] for block in blocks) for key in ("probe_difference_exact", "probe_difference"))
    return Proof(exact, used, Executed(operators), None, blocks)


Feeds = Sequence[tuple[Mapping[str, Tensor], Sequence[Tensor]]]  # inputs by name, and what has to come out


def _runs(gm: GraphModule, probe: Sequence[Tensor], keep: Sequence[Node]) -> list[tuple[dict[str, Tensor], evaluate.Environment]]:
    """Inputs by name and the graph's values for them."""
    signature: Signature = gm.meta["signature"]
    nodes = list(gm.graph.nodes)

    def run(inputs: Sequence[Tensor]) -> tuple[dict[str, Tensor], evaluate.Environment]:
        by_name = {port.name: x for port, x in zip(signature.inputs, inputs, strict=True)}
        return by_name, evaluate.evaluate(gm, nodes[:-1], evaluate.bind(gm, inputs), keep)

    if not signature.causal:
        return [run(probe)]
    first = run(signature.bind(input_ids=probe[0]))
    cache = signature.cache_of([first[1][node] for node in nodes[-1].args[0]])
    return [first, run(signature.bind(input_ids=probe[0][:, -1:], **{CACHE: cache}))]


def _outputs(session: onnxruntime.InferenceSession, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    return run_flat(session, [inputs[port.name] for port in session.get_inputs()])


def _exact(path: Path, settings: Settings, feeds: Feeds, gm: GraphModule, label: str) -> float:
    session = open_session(path, settings.exact, threads=settings.threads)
    return max(_close(_outputs(session, inputs), oracle, gm, f"after {label}", label) for inputs, oracle in feeds)


def _used(path: Path, settings: Settings, feeds: Feeds) -> tuple[float, Executed]:
    session = open_session(path, settings.used, threads=settings.threads, profile=path.with_name("profile"))
    found = max(difference(_outputs(session, inputs), oracle) for inputs, oracle in feeds)
    return found, end_profile(session)


def _close(ours: Sequence[Tensor], oracle: Sequence[Tensor], gm: GraphModule, where: str, label: str = "") -> float:
    """The difference, which has to be one that rounding explains."""
    found, allowed = difference(ours, oracle), tolerance(activations(gm), oracle)
    if not found <= allowed:
        raise BackendError(
            f"ONNX Runtime's outputs differ from the graph's by {found:.1e} relative {where}, more than {allowed:.0e}",
            where=label,
            remedy="report the model and the ONNX Runtime version; the reference backend runs the graph itself",
        )
    return found


def _state_level(path: Path, level: int) -> None:
    model = onir.load(path)
    if _set_level(model, level):
        rewrite(model, path)


def _set_level(model: onir.Model, level: int) -> bool:
    """State the accuracy level of products that we write fused, for which sessions have no setting; until now they were exact."""
    nodes = [node for node in model.graph if node.op_type == SHARED.fused]
    for node in nodes:
        node.attributes["accuracy_level"] = onir.AttrInt64("accuracy_level", level)
    return bool(nodes)


def rewrite(model: onir.Model, path: Path) -> None:
    """Save a model that was loaded from `path` there; the weights' file is left as it is."""
    scratch = path.with_name(f".{path.name}")
    onir.save(model, scratch)
    scratch.replace(path)
