"""What a configuration says of compressed weights: `quantization_config` of the compressed-tensors format, as far as we write and read it.

    pack-quantized   integers of 2, 4 or 8 bits, packed into int32; inputs in floating point
    int-quantized    integers of 2 to 8 bits, one to a byte; inputs rounded too
    float-quantized  8-bit floats
    mixed-precision  several of these: each group of layers states its own
    dense            no rounded weights, only a rounded cache

Packed weights of other widths are kept in the next wider one, without zero points: `q − z` fits there. So they load everywhere, while
releases of compressed-tensors disagree on how 3, 5, 6 and 7 bits are packed (from 0.18 on words share codes).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ir.encoding import Encoding, Float, Int
from ir.packing import container

PACKED, INTEGER, FLOATING, MIXED, DENSE = "pack-quantized", "int-quantized", "float-quantized", "mixed-precision", "dense"
LEAST_BITS = 2  # the codes of one bit, −1 and 1, take two
Strategy = Literal["tensor", "channel", "group", "token", "attn_head"]
ACTIVATIONS: dict[tuple[tuple[int, ...], bool], Strategy] = {  # by block and dynamic
    ((1, -1), True): "token",
    ((-1,), True): "tensor",
    ((-1,), False): "tensor",
}
CACHES: dict[tuple[int, ...], Strategy] = {(-1,): "tensor", (-1, 1, -1, -1): "attn_head"}  # by block
STATED = "what can be stated is quantize_cache(dynamic=False, symmetric=True), in any width, with tensor=True and floats=True or without"


class Arguments(BaseModel):
    """How one tensor is rounded."""

    model_config = ConfigDict(frozen=True)

    num_bits: int
    type: Literal["int", "float"]
    symmetric: bool
    strategy: Strategy
    group_size: int | None = None
    dynamic: bool = False

    @classmethod
    def of(cls, encoding: Encoding, strategy: Strategy) -> "Arguments":
        """The arguments that mean `encoding`, with scales as the strategy says."""
        return cls(
            num_bits=encoding.bits,
            type="int" if isinstance(encoding.format, Int) else "float",
            symmetric=encoding.symmetric,
            strategy=strategy,
            group_size=encoding.block[-1] if strategy == "group" else None,
            dynamic=encoding.dynamic,
        )

    @property
    def encoding(self) -> Encoding:
        """The encoding that these arguments mean."""
        groups = (1, self.group_size or -1)
        blocks = {"tensor": (-1,), "channel": (1, -1), "token": (1, -1), "group": groups, "attn_head": (-1, 1, -1, -1)}
        number = Int(self.num_bits) if self.type == "int" else Float(4, 3)
        return Encoding(number, blocks[self.strategy], symmetric=self.symmetric, dynamic=self.dynamic)


class Scheme(BaseModel):
    """How the layers among `targets`, names of modules or of a class, are rounded and stored."""

    targets: tuple[str, ...] = ()
    weights: Arguments
    input_activations: Arguments | None = None
    output_activations: None = None
    format: str

    @classmethod
    def of(cls, weight: Encoding, given: Encoding | None, shape: Sequence[int]) -> "Scheme":
        """The scheme of a linear with a weight of `shape [N, K]`, for which `refusal` is None."""
        kind = FLOATING if isinstance(weight.format, Float) else PACKED if given is None else INTEGER
        inputs = None if given is None else Arguments.of(given, ACTIVATIONS[given.block, given.dynamic])
        return cls(weights=Arguments.of(kept(weight, given), _strategy(weight, shape)), input_activations=inputs, format=kind)


class Quantization(BaseModel):
    """`quantization_config` as a whole."""

    model_config = ConfigDict(extra="ignore")

    quant_method: Literal["compressed-tensors"] = "compressed-tensors"
    format: str
    quantization_status: Literal["compressed"] = "compressed"
    config_groups: dict[str, Scheme]
    ignore: list[str] = Field(default_factory=list)
    kv_cache_scheme: Arguments | None = None

    @classmethod
    def of(cls, schemes: Mapping[str, Scheme], linears: Sequence[str], cache: Arguments | None = None) -> "Quantization":
        """One group for each scheme that occurs.

        Args:
            schemes: by the name of the module, without targets.
            linears: the names of all modules of the class `Linear`.
            cache: how all keys and values are rounded; None if they are not.
        """
        groups: dict[str, list[str]] = {}
        for name, scheme in schemes.items():
            groups.setdefault(scheme.model_dump_json(), []).append(name)
        stated = [Scheme.model_validate_json(text).model_copy(update={"targets": tuple(names)}) for text, names in groups.items()]
        if len(stated) == 1:
            stated = [stated[0].model_copy(update={"targets": ("Linear",)})]
        formats = {scheme.format for scheme in stated}
        return cls(
            format=formats.pop() if len(formats) == 1 else MIXED if formats else DENSE,
            config_groups={f"group_{index}": scheme for index, scheme in enumerate(stated)},
            ignore=[name for name in linears if name not in schemes],
            kv_cache_scheme=cache,
        )

    def schemes(self, linears: Sequence[str]) -> dict[str, Scheme]:
        """The scheme of each of these modules that has one."""
        named = {target: scheme for scheme in self.config_groups.values() for target in scheme.targets}
        ignored = set(self.ignore)
        found = {name: named.get(name, named.get("Linear")) for name in linears if name not in ignored}
        return {name: scheme for name, scheme in found.items() if scheme is not None}

    def to_json(self) -> dict[str, Any]:
        """As `config.json` states it."""
        return self.model_dump(mode="json") | {"global_compression_ratio": None}


def kept(weight: Encoding, given: Encoding | None) -> Encoding:
    """The encoding in which a linear's weight is kept."""
    if isinstance(weight.format, Float):
        return weight
    bits = container(weight) if given is None else max(weight.bits, LEAST_BITS)
    symmetric = weight.symmetric or (given is None and bits > weight.bits)
    return replace(weight, format=Int(bits), symmetric=symmetric)


def _strategy(weight: Encoding, shape: Sequence[int]) -> Strategy:
    return "channel" if weight.block[-1] == -1 or weight.block[-1] >= shape[-1] else "group"


def refusal(operator: str, encodings: Mapping[str, Encoding], shape: Sequence[int]) -> str | None:
    """Why the format has no place for an operator with these encodings, as a sentence; None if it has.

    Args:
        operator: `Linear`, `Embedding`, or `Cache` for a cache of keys or values.
        encodings: by operand: `weight`, `input`; of a cache `key` and `value`.
        shape: of the weight, [N, K]; of a cache, heads and their width.
    """
    if operator == "Cache":
        return _cache_refusal(encodings)
    if operator == "Embedding":
        return "transformers loads no packed embedding, and this backend writes no quantized embedding; leave out embeddings=True"
    if operator != "Linear":
        return f"compressed checkpoints have quantized linears only, no quantized {operator.lower()}"
    weight, given = encodings.get("weight"), encodings.get("input")
    if weight is None:
        return "a linear with a rounded input has a rounded weight too in compressed checkpoints"
    return _weight_refusal(weight, shape) or (None if given is None else _input_refusal(weight, given))


def _cache_refusal(encodings: Mapping[str, Encoding]) -> str | None:
    if set(encodings) != {"key", "value"} or len(set(encodings.values())) > 1:
        return f"compressed checkpoints round all keys and values alike, or none; {STATED}"
    encoding = encodings["key"]
    if encoding.dynamic:
        return f"compressed checkpoints cannot state that scales of a cache are chosen at run time and kept in float16; {STATED}"
    if not encoding.symmetric:
        return f"compressed-tensors refuses zero points of a cache; {STATED}"
    if encoding.format == Float(5, 2):
        return f"compressed checkpoints know one 8-bit float, f8e4m3; {STATED}"
    if encoding.block not in CACHES:
        return f"scales of a cache are of a whole layer or of heads in compressed checkpoints, not {encoding}; {STATED}"
    return None


def _weight_refusal(weight: Encoding, shape: Sequence[int]) -> str | None:
    if weight.dynamic:
        return "weights are constants, their scales cannot be dynamic"
    if weight.format == Float(5, 2):
        return "compressed checkpoints know one 8-bit float, f8e4m3"
    if len(weight.block) != 2 or weight.block[0] != 1:
        return f"weights have one scale per channel [1,-1] or per group of a channel [1,128], not {weight}"
    if _strategy(weight, shape) == "channel":
        return None
    if isinstance(weight.format, Float):
        return f"8-bit floats have one scale per channel, not {weight}"
    return f"groups of {weight.block[-1]} do not divide rows of {shape[-1]}" if shape[-1] % weight.block[-1] else None


def _input_refusal(weight: Encoding, given: Encoding) -> str | None:
    if (given.block, given.dynamic) not in ACTIVATIONS:
        return f"inputs have one scale per token [1,-1]dynamic or per tensor [-1], not {given}"
    if given.clip != 1:
        return f"compressed checkpoints cannot state that scales cover {given.clip:g} of a token's range; leave out clip_activations"
    if isinstance(given.format, Float) != isinstance(weight.format, Float):
        return f"no format of compressed checkpoints has {weight} weights and {given} inputs"
    return "a sign of one bit is no input; use two bits" if given.bits < LEAST_BITS else None
