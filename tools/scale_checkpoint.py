"""Checkpoints of any size with random weights, written shard by shard, for `bench_scale`."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from ir.tensor_file import write_tensors

HEAD = 128
PIECE = 1 << 22  # elements that are drawn at once
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    hidden: int
    intermediate: int
    vocabulary: int

    def layer(self, index: int) -> dict[str, tuple[int, ...]]:
        """Shapes of one layer's weights."""
        n, m, prefix = self.hidden, self.intermediate, f"model.layers.{index}"
        return {
            **{f"{prefix}.self_attn.{name}_proj.weight": (n, n) for name in "qkvo"},
            **{f"{prefix}.mlp.{name}_proj.weight": (m, n) for name in ("gate", "up")},
            f"{prefix}.mlp.down_proj.weight": (n, m),
            **{f"{prefix}.{name}_layernorm.weight": (n,) for name in ("input", "post_attention")},
        }

    def ends(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what is no layer."""
        n, v = self.hidden, self.vocabulary
        return {"model.embed_tokens.weight": (v, n), "model.norm.weight": (n,), "lm_head.weight": (v, n)}

    def depth(self, gigabytes: float) -> int:
        """The number of layers whose 16-bit weights take at least that much."""
        layer, ends = (2 * sum(map(math.prod, shapes.values())) for shapes in (self.layer(0), self.ends()))
        return max(1, math.ceil((gigabytes * 1e9 - ends) / layer))

    def config(self, depth: int) -> transformers.LlamaConfig:
        """The configuration of a model of that depth."""
        return transformers.LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.intermediate, num_hidden_layers=depth,
            num_attention_heads=self.hidden // HEAD, num_key_value_heads=self.hidden // HEAD, head_dim=HEAD, max_position_embeddings=2048,
            architectures=["LlamaForCausalLM"], dtype="bfloat16",
        )  # fmt: skip


@dataclass(frozen=True)
class _Random:
    """A weight: vectors are ones, matrices normal so that what they make is of the size of what they read."""

    shape: tuple[int, ...]
    seed: int
    dtype: torch.dtype = torch.bfloat16

    def pieces(self) -> Iterator[Tensor]:
        """Parts of it, drawn one by one."""
        generator, left = torch.Generator().manual_seed(self.seed), math.prod(self.shape)
        while left:
            size = min(left, PIECE)
            ones = len(self.shape) == 1
            yield torch.ones(size, dtype=self.dtype) if ones else self._normal(size, generator)
            left -= size

    def _normal(self, size: int, generator: torch.Generator) -> Tensor:
        return (torch.randn(size, generator=generator) / math.sqrt(self.shape[1])).to(self.dtype)


def write_checkpoint(folder: Path, shape: Shape, depth: int) -> None:
    """Write a folder with one shard for each layer, and one for the rest."""
    folder.mkdir(parents=True)
    shards = {"model-ends.safetensors": shape.ends()}
    shards |= {f"model-{index:05}.safetensors": shape.layer(index) for index in range(depth)}
    seed = 0
    for name, shapes in shards.items():
        write_tensors(folder / name, {key: _Random(size, seed + i) for i, (key, size) in enumerate(shapes.items())})
        seed += len(shapes)
    _describe(folder, shape.config(depth), {key: name for name, shapes in shards.items() for key in shapes})


def shallower(source: Path, folder: Path, depth: int) -> Path:
    """A folder with the first layers of another, by links to its files."""
    folder.mkdir(exist_ok=True)
    own = {f"model-{index:05}.safetensors" for index in range(depth)} | {"model-ends.safetensors"}
    names = {key: name for key, name in json.loads((source / INDEX).read_text())["weight_map"].items() if name in own}
    for name in own:
        if not (folder / name).exists():
            os.link(source / name, folder / name)
    config = transformers.LlamaConfig.from_pretrained(source)
    config.num_hidden_layers = depth
    _describe(folder, config, names)
    return folder


def _describe(folder: Path, config: transformers.LlamaConfig, names: dict[str, str]) -> None:
    config.save_pretrained(folder)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}), encoding="utf-8")
