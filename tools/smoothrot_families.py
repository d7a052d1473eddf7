"""What `bench_smoothrot` compares: for one tensor and its readers, ways to quantize it; each a function from activations to outputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from ir import numerics
from ir.encoding import Encoding
from ir.hadamard import largest_block, orders
from ir.rounding import GPTQ, Evidence, Nearest, Rounding
from ir.smoothing import N1, N2, Policy, layer_error, magnitude, product, rounded, scales, transformed, weight_magnitude
from tools.block_stages import stages
from tools.scale_learning import Layer, Learned, Recipe, learn, learn_best

CHANNEL = Encoding.parse("i4[1,-1]")
RATIOS = [1 - 0.03 * i for i in range(12)]
BASE, PUBLISHED = "SmoothRot (α .5, q 1)", "SmoothRot, the papers' scale max/7"
PARTIAL = {"T1", "T2"}  # families of the selected places only
PAPER = 7.5 / 7  # the papers' scale, max / 7, is this library's, max / 7.5, with this clipping ratio


@dataclass
class Place:
    """One tensor with the linears that read it, and tokens of every part.

    Args:
        train: statistics and gradients come from these, `[tokens, in]`.
        held: choices and stops.
        test: errors; nothing is chosen on them.
    """

    path: str
    W: Tensor
    train: Tensor
    held: Tensor
    test: Tensor
    magnitudes: dict[float | str, Tensor] = field(default_factory=dict)

    def scales(self, policy: Policy) -> Tensor:
        """By a policy."""
        if policy.q not in self.magnitudes:
            self.magnitudes[policy.q] = magnitude(self.train, policy.q)
        return scales(self.magnitudes[policy.q], weight_magnitude(self.W), policy.alpha, normalised=True)

    def layer(self, start: Tensor | None) -> Layer:
        """What scales are learned from."""
        return Layer(self.train, self.W, self.held, start)


@dataclass(frozen=True)
class Quantized:
    """`x ↦ Q(x̂) Ŵᵀ`."""

    prepare: Callable[[Tensor], Tensor]
    weight: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return self.prepare(x) @ self.weight.T


Family = Callable[[Place], Quantized]


def error(at: Place, quantized: Quantized) -> float:
    """`E` on the test part."""
    return float((at.test @ at.W.T - quantized(at.test)).norm())


def scaled(s: Callable[[Place], Tensor | None], clip: float = 1.0) -> Family:
    """Scales, Hadamard, rounding to nearest."""

    def family(at: Place) -> Quantized:
        _, W = transformed(at.W[:1], at.W, s(at))
        return Quantized(lambda x: rounded(transformed(x, at.W, s(at))[0], 4, clip), rounded(W, 4, clip))

    return family


def smoothrot(at: Place) -> Quantized:
    """SmoothRot: α = .5, q = 1."""
    return scaled(lambda at: at.scales(Policy()))(at)


def clipped(found: Learned) -> Family:
    """Learned scales and clipping, rounding to nearest."""

    def family(at: Place) -> Quantized:
        _, W = transformed(at.W[:1], at.W, found.s)
        weight = rounded(W, 4, found.clip_w)
        return Quantized(lambda x: rounded(transformed(x, at.W, found.s)[0], 4, found.clip_x), weight)

    return family


def by(rounding: Rounding, clip: Tensor | float, prepare: Callable[[Tensor], Tensor], W: Tensor, at: Place) -> Quantized:
    """Weights rounded by a method that sees the quantized activations of the train part."""
    Q = rounded(prepare(at.train), 4, clip)
    codes, qparams = rounding.round_weight(W, CHANNEL, Evidence(gram=Q.T @ Q if isinstance(rounding, GPTQ) else None))
    return Quantized(lambda x: rounded(prepare(x), 4, clip), numerics.dequantize(codes, qparams, CHANNEL))


def compensated(found: Learned) -> Family:
    """Learned scales and clipping of activations, error-aware rounding of weights."""

    def family(at: Place) -> Quantized:
        _, W = transformed(at.W[:1], at.W, found.s)
        return by(GPTQ(), found.clip_x, lambda x: transformed(x, at.W, found.s)[0], W, at)

    return family


def blocked(blocks: Sequence[int], rounding: Rounding) -> Family:
    """Block transforms in closed form, Hadamard, the clipping ratio of activations searched on held-out tokens."""

    def family(at: Place) -> Quantized:
        X, W = at.train.double(), at.W.double()
        found = stages(X.T @ X, W.T @ W, blocks)

        def prepare(x: Tensor) -> Tensor:
            for stage in found:
                x = stage.activation(x)
            return transformed(x, x[:1])[0]

        W = at.W
        for stage in found:
            W = stage.weight(W)
        W = transformed(W[:1], W)[1]
        held, Y = prepare(at.held), at.held @ at.W.T
        clip = min(RATIOS, key=lambda ratio: float((Y - rounded(held, 4, ratio) @ W.T).norm()))
        return by(rounding, clip, prepare, W, at)

    return family


@dataclass
class Chosen:
    """What was chosen on held-out tokens, and the families that it makes.

    Args:
        families: by name; those in `PARTIAL` for the selected places only.
        notes: choices in words.
        learned: T3, by path.
        start: the policy that it started from.
    """

    families: dict[str, Family]
    notes: list[str]
    learned: dict[str, Learned]
    start: Policy


def choose(places: Sequence[Place], selected: Sequence[Place], recipe: Recipe, rates: Sequence[float]) -> Chosen:
    """Search policies and learn scales: on the selected places, the last families on all."""

    def held(policy: Policy) -> float:
        return sum(float(layer_error(at.held, at.W, at.scales(policy))[0]) for at in selected)

    first, second = ({policy: held(policy) for policy in grid} for grid in (N1, N2))
    grid = product([p.alpha for p in sorted(first, key=first.__getitem__)[:5]], [p.q for p in sorted(second, key=second.__getitem__)[:5]])
    third = {policy: held(policy) for policy in grid}
    n1, n2, n3 = (min(found, key=found.__getitem__) for found in (first, second, third))
    best = n3 if third[n3] <= min(first[n1], second[n2]) else min((n1, n2), key={**first, **second}.__getitem__)
    notes = [f"{name}: α = {p.alpha}, q = {p.q:.4f}" for name, p in (("N1", n1), ("N2", n2), ("N3", n3))]

    from_one, t1 = learn_best([at.layer(None) for at in selected], recipe, rates)
    from_best, t2 = learn_best([at.layer(at.scales(best)) for at in selected], recipe, rates)
    notes.append(f"learning rates: T1 {from_one.rate:.4f}, T2 {from_best.rate:.4f}")
    paths = [at.path for at in selected]
    known = dict(zip(paths, t2, strict=True))
    t3 = {at.path: known[at.path] if at.path in known else learn([at.layer(at.scales(best))], from_best)[0] for at in places}
    with_clip = {at.path: learn([at.layer(balanced(at.train, at.W))], replace(from_best, clip=True))[0] for at in places}
    for name in ("clip_x", "clip_w"):
        ratios = [float(getattr(each, name).mean()) for each in with_clip.values()]
        notes.append(f"{name} learned: {sum(ratios) / len(ratios):.2f} in the mean")

    n = places[0].W.shape[1]
    small, large = tuple(sorted(orders(largest_block(n)))), (divisor(n, 64),) * 2

    def of(found: dict[str, Learned], make: Callable[[Learned], Family]) -> Family:
        return lambda at: make(found[at.path])(at)

    families: dict[str, Family] = {
        "rotation only": scaled(lambda at: None),
        BASE: smoothrot,
        PUBLISHED: scaled(lambda at: at.scales(Policy()), PAPER),
        "N1": scaled(lambda at: at.scales(n1)),
        "N2": scaled(lambda at: at.scales(n2)),
        "N3": scaled(lambda at: at.scales(n3)),
        "T1": of(dict(zip(paths, t1, strict=True)), clipped),
        "T2": of(known, clipped),
        "T3": of(t3, clipped),
        "closed-form scales √(‖x‖ / ‖w‖)": scaled(lambda at: balanced(at.train, at.W)),
        "learned scales + clipping": of(with_clip, clipped),
        "learned scales + clipping + GPTQ": of(with_clip, compensated),
        f"blocks {small} + clipping": blocked(small, Nearest(search=True)),
        f"blocks {small} + clipping + GPTQ": blocked(small, GPTQ()),
        f"blocks {large} + clipping + GPTQ": blocked(large, GPTQ()),
    }
    return Chosen(families, notes, t3, best)


def balanced(x: Tensor, W: Tensor) -> Tensor:
    """`s_j = √(‖x_j‖ / ‖w_j‖)`, of geometric mean 1: both sides of a channel get the same norm; 1 at dead channels. No search, no tuning.

    These scales minimise `‖X Λ⁻¹‖_F ‖W Λ‖_F`, with which the errors of both sides grow once a rotation has spread every row
    (`ir.block_transform` with blocks of one).
    """
    a, w = (side.double().square().mean(0).sqrt() for side in (x, W))
    return scales(a, w, 0.5, normalised=True).float()


def divisor(n: int, most: int) -> int:
    """The greatest divisor of `n` that is at most `most`."""
    return next(b for b in range(min(n, most), 0, -1) if n % b == 0)
