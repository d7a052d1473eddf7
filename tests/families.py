"""Tiny, seeded, randomly initialised models of the families that fxpress is tested on."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.fx import GraphModule
from transformers import PreTrainedModel

from ir.capture import capture
from ir.signature import Signature

VOCABULARY, HIDDEN, LAYERS, HEADS, HEAD_DIM = 128, 64, 2, 4, 16

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}  # grouped-query attention: two heads of queries for each of keys
_GEMMA = {**_GROUPED, "head_dim": HEAD_DIM, "sliding_window": 8, "query_pre_attn_scalar": HEAD_DIM}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_GROUPED),
    "llama_tied": lambda: transformers.LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**_GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**_GROUPED, head_dim=HEAD_DIM),
    "mistral": lambda: transformers.MistralConfig(**_GROUPED, sliding_window=8),
    "gemma2": lambda: transformers.Gemma2Config(**_GEMMA),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_GEMMA, layer_types=["sliding_attention", "full_attention"]),
    "phi3": lambda: transformers.Phi3Config(**_GROUPED),
    "olmo2": lambda: transformers.Olmo2Config(**_GROUPED),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
    "opt": lambda: transformers.OPTConfig(**{**_SIZES, "ffn_dim": 96, "word_embed_proj_dim": HIDDEN}),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_SIZES),
    "bert": lambda: transformers.BertConfig(**_SIZES),
}

DISTINCT = ("llama", "gemma3", "phi3", "gpt2")
"""Families that have everything between them: grouped queries, windows, norms behind, fused projections, biases, LayerNorm."""

RMS_NORMS = {
    **dict.fromkeys(("llama", "llama_tied", "qwen2", "mistral", "phi3"), 2 * LAYERS + 1),
    **dict.fromkeys(("qwen3", "gemma2", "olmo2"), 4 * LAYERS + 1),
    "gemma3": 6 * LAYERS + 1,
    **dict.fromkeys(("gpt2", "opt", "gpt_neox", "bert"), 0),
}
"""How many RMS norms the model of each family has."""


def distinct_first() -> list[Any]:
    """Every family, as parameters of a costly test: those that are not distinct are left to `make test-all`."""
    return [pytest.param(name, marks=() if name in DISTINCT else pytest.mark.thorough) for name in FAMILIES]


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a family in inference mode; every vector (norm weights, biases) is random, so that errors in them show."""
    torch.manual_seed(0)
    config = FAMILIES[name]()
    automatic = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    model = automatic.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            else:
                parameter.mul_(4)
    return model.to(dtype)


@dataclass(frozen=True)
class Family:
    """A model and its captured graph, shared by tests: change neither."""

    name: str
    model: PreTrainedModel
    captured: GraphModule

    @property
    def signature(self) -> Signature:
        """The names of the graph's inputs and outputs."""
        signature: Signature = self.captured.meta["signature"]
        return signature

    def graph(self) -> GraphModule:
        """A copy of the captured graph, which a test may change."""
        return capture(self.captured)

    def steps(self, gm: GraphModule, batch: int = 3, lengths: tuple[int, ...] = (7, 1)) -> list[Tensor]:
        """The logits of `gm` over chained calls of `lengths` random tokens, the cache carried on."""
        generator = torch.Generator().manual_seed(1)
        signature, past, logits = gm.meta.get("signature", self.signature), None, []
        for length in lengths if signature.layers else lengths[:1]:
            tokens = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
            with torch.no_grad():
                result = signature.wrap(gm(*signature.bind(input_ids=tokens, past_key_values=past)))
            logits.append(result.logits)
            past = result.get("past_key_values")
        return logits


def load(name: str, dtype: torch.dtype = torch.float32) -> Family:
    """The family of that name, built and captured once per session."""
    return _load(name, dtype)


@cache
def _load(name: str, dtype: torch.dtype) -> Family:
    model = build(name, dtype)
    return Family(name, model, capture(model))
