"""`Student`: a graph as it will be after maps, rotations and rounding that are still being learned, evaluated with gradients."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ir import edit, evaluate, hadamard, maps
from ir.channels import ChannelGroup, Map, Member
from ir.encoding import Encoding
from ir.match import operand
from ir.numerics import choose_qparams, compute_dtype
from ir.rounding import search_qparams
from ir.sites import Layer, readers
from ir.straight_through import clip_shape, fake_quantize

Values = dict[Node, Any]


class Student(nn.Module):
    """Parameters, and the graph that they make.

    A scale group has `log s`, whose mean is kept at zero: a common factor changes nothing (2606.09927). A rotation group has a skew matrix
    `A`, and `R = (I − A/2)⁻¹(I + A/2)` (Cayley; SpinQuant, 2405.16406, moves on the same manifold step by step). A tensor that is rounded
    with dynamic scales has the clip of these, `exp(−softplus(p))`; so has every block of a weight, from the ratio that a search finds best.

    Args:
        gm: the graph, whose layers are annotated; it is not changed.
        groups: channel groups that are free, of kinds SCALE and ROTATE; maps are applied to a tensor in this order.
        online: inputs that a Hadamard operator will rotate before they are rounded, with its order.
        clip: the ratio that dynamic activations start from; None learns no clips: activations keep those of their encodings.
    """

    def __init__(self, gm: GraphModule, groups: Sequence[ChannelGroup], online: Mapping[Node, int], clip: float | None) -> None:
        super().__init__()
        self.gm, self.groups, self.online = gm, list(groups), dict(online)
        self.layers: dict[Node, Layer] = {
            layer.node: layer
            for found in readers(gm).values()
            for layer in found
            if layer.site("weight").encoding and layer.weight.op == "get_attr"
        }
        self.maps = nn.ParameterList([_neutral(group) for group in self.groups])
        self.input_clips: dict[Node, nn.Parameter] = {}
        self.weight_clips: dict[Node, nn.Parameter] = {}
        for node, layer in self.layers.items():
            encoding = layer.site("input").encoding
            if clip is not None and encoding is not None and encoding.dynamic:
                self.input_clips[layer.site("input").operand] = nn.Parameter(_inverse_of(torch.tensor(min(clip, 0.995))))
            self.weight_clips[node] = nn.Parameter(self._best_clip(layer), requires_grad=clip is not None)
        self.clips = nn.ParameterList([*self.input_clips.values(), *self.weight_clips.values()])

    def _best_clip(self, layer: Layer) -> Tensor:
        """What `search_qparams` finds, as parameters."""
        encoding = _of(layer, "weight")
        weight = self._turned(layer, edit.attribute(self.gm, layer.weight).detach().float())
        found = search_qparams(weight, encoding, torch.ones(weight.shape[1])).scale.float()
        widest = choose_qparams(weight, encoding).scale
        return _inverse_of((found / widest).clamp(0.05, 0.995)).reshape(clip_shape(tuple(weight.shape), encoding))

    def matrix(self, index: int) -> Tensor:
        """The map of a group: factors, or matrices."""
        group, parameter = self.groups[index], self.maps[index]
        if parameter.ndim == 1:
            factors: Tensor = (parameter.mean() - parameter).exp()  # 1/s
            return factors
        skew = parameter - parameter.mT
        eye = torch.eye(group.block, dtype=skew.dtype)
        rotation: Tensor = torch.linalg.solve(eye - skew / 2, eye + skew / 2)
        return rotation.expand(group.blocks, -1, -1)

    def within(self, nodes: Collection[Node]) -> list[int]:
        """The groups that change what some of `nodes` read."""
        return [index for index, group in enumerate(self.groups) if any(user in nodes for member in group.members for user in uses(member))]

    def tensors(self, indices: Iterable[int] | None = None) -> dict[Node, Tensor]:
        """The stored tensors that the maps of all groups, or of some, change, by get_attr node; by norm, where that has no gain yet."""
        changed: dict[Node, Tensor] = {}
        for index in range(len(self.groups)) if indices is None else indices:
            M = self.matrix(index)
            for member in self.groups[index].members:
                old = changed[member.node] if member.node in changed else self._stored(member.node)
                changed[member.node] = maps.mapped(old, member, M.to(old.dtype))
        return changed

    def _stored(self, node: Node) -> Tensor:
        if node.op == "get_attr":
            return _wide(edit.attribute(self.gm, node).detach())
        return torch.ones(operand(node, "normalized_shape"), dtype=compute_dtype(edit.value(node).dtype))

    def run(self, nodes: Sequence[Node], given: Values, keep: Sequence[Node], tensors: Mapping[Node, Tensor]) -> Values:
        """The values of `keep` after `nodes` are evaluated in order, with gradients where they are enabled."""
        stored = {node: tensor.to(edit.value(node).dtype) for node, tensor in tensors.items()}
        instead: dict[Node, Callable[..., Tensor]] = {node: partial(self._linear, layer) for node, layer in self.layers.items()}
        instead |= {node: partial(_with_gain, node, gain) for node, gain in stored.items() if node.op == "call_function"}
        whole = {node: tensor for node, tensor in stored.items() if node.op == "get_attr"}
        return evaluate.evaluate(self.gm, nodes, given | whole, keep, instead=instead, grad=torch.is_grad_enabled())

    def _linear(self, layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A linear with both operands rounded."""
        source, encoding = layer.site("input").operand, layer.site("input").encoding
        weight = self._turned(layer, weight)
        if source in self.online:
            x = hadamard.transform(x, self.online[source])
        if encoding is not None:
            clip = ratio(self.input_clips[source]) if source in self.input_clips else encoding.clip
            x = fake_quantize(_wide(x), encoding, clip).to(x.dtype)
        weight = fake_quantize(_wide(weight), _of(layer, "weight"), ratio(self.weight_clips[layer.node])).to(weight.dtype)
        return torch.nn.functional.linear(x, weight, bias)

    def _turned(self, layer: Layer, weight: Tensor) -> Tensor:
        order = self.online.get(layer.site("input").operand)
        return weight if order is None else hadamard.transform(weight, order)


def _with_gain(norm: Node, gain: Tensor, x: Tensor, shape: list[int], weight: Tensor | None = None, *rest: Any, **others: Any) -> Any:
    """A norm without a gain of its own, with one."""
    return norm.target(x, shape, gain, *rest, **others)  # type: ignore[operator]


def uses(member: Member) -> Iterable[Node]:
    """The calls that a member takes part in."""
    return member.node.users if member.node.op == "get_attr" else [member.node]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(compute_dtype(tensor.dtype))


def ratio(parameter: Tensor) -> Tensor:
    """The ratio that a parameter stands for, between 0 and 1."""
    return torch.exp(-torch.nn.functional.softplus(parameter))


def _inverse_of(ratio: Tensor) -> Tensor:
    return torch.expm1(-ratio.log()).log()


def _neutral(group: ChannelGroup) -> nn.Parameter:
    """The parameters of the identity."""
    return nn.Parameter(torch.zeros(group.block, group.block) if group.kind is Map.ROTATE else torch.zeros(group.size))


def _of(layer: Layer, name: str) -> Encoding:
    encoding = layer.site(name).encoding
    assert encoding is not None
    return encoding
