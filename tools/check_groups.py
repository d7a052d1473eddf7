"""The table of channel groups: which maps the models of many families tolerate, what freezes the rest, and what random maps change.

python -m tools.check_groups --out tools/results/groups.md

The families are those of the tests, and 16 more, drawn at random from all causal language models of transformers. The analysis was
completed on the first eight of these; it met the second eight only afterwards.
"""

import random
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
import typer
from torch.fx import GraphModule
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ir import edit
from ir.canonical import canonicalize
from ir.capture import capture
from ir.channels import ChannelGroup, Map
from passes.base import Context
from passes.center_norm import CenterNorm
from passes.fold_norm import FoldNorm
from passes.probe import relative_error
from passes.untie import Untie
from tests import families
from tests.families import FAMILIES, HEAD_DIM, HIDDEN, LAYERS, VOCABULARY, Family
from tests.mapping import map_all
from tests.wide import in_float64

SEED, EACH, PARAMETERS, LENGTHS = 2026, 8, 30_000_000, (7, 1, 1)
KINDS = (Map.ROTATE, Map.PERMUTE, Map.LINEAR, Map.SCALE)  # scales last: they put gains back into the norms
SIZES: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "head_dim": HEAD_DIM, "max_position_embeddings": 128},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **{"num_experts_per_tok": 2, "is_decoder": True},
}
LATENT = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
OVERRIDES: dict[str, dict[str, Any]] = {
    "axk2": {**LATENT, "head_dim": 8, "index_topk": 4, "index_head_dim": 16, "index_n_heads": 2},
    "beam": {"n_group": 2, "topk_group": 1},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
    },
    "kimi_linear": {**LATENT, "linear_head_dim": 16, "linear_num_heads": 4},
}


def drawn() -> list[str]:
    """All causal language models that the tests do not have, in the order they were drawn."""
    known = {make().model_type for make in FAMILIES.values()}
    names = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - known)
    random.Random(SEED).shuffle(names)
    return names


def tiny(config_class: Any) -> dict[str, Any]:
    """Arguments for a small configuration, nested ones included; lists with an entry for each layer keep the first and the last."""
    full = config_class()
    mapped = getattr(config_class, "attribute_map", None) or {}
    sizes = {name: size for name, size in SIZES.items() if name in vars(full) or name in mapped}
    depth = getattr(full, "num_hidden_layers", None)
    lists = {name: [each[0], each[-1]] for name, each in vars(full).items() if isinstance(each, list) and len(each) == depth and depth}
    nested = {
        name: tiny(type(getattr(full, name))) for name in getattr(config_class, "sub_configs", {}) if getattr(full, name, None) is not None
    }
    return sizes | lists | nested


def build(model_type: str) -> transformers.PreTrainedModel:
    """A tiny model; every vector is random, so that errors in them show."""
    config_class = transformers.CONFIG_MAPPING[model_type]
    arguments = tiny(config_class) | OVERRIDES.get(model_type, {})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config_class(**arguments))
        size = sum(parameter.numel() for parameter in model.parameters())
    if size > PARAMETERS:
        raise ValueError(f"its configuration does not get small: {size:,} parameters")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**arguments)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3) if parameter.ndim == 1 else parameter.mul_(4)
    return model


def prepared(gm: GraphModule) -> GraphModule:
    for each in (Untie(), FoldNorm(), CenterNorm()):
        each.run(gm, Context())
        edit.clean(gm)
    return gm


def mapped(family: Family, gm: GraphModule) -> tuple[dict[Map, list[ChannelGroup]], float]:
    """The groups of every kind, and the greatest error of the logits after random maps of all that are free."""
    before, worst, groups = family.steps(gm, lengths=LENGTHS), 0.0, {}
    for kind in KINDS:
        groups[kind] = map_all(gm, kind)
        after = family.steps(gm, lengths=LENGTHS)
        worst = max([worst, *(relative_error((a,), (b,)) for a, b in zip(after, before, strict=True))])
    return groups, worst


def row(name: str, family: Family) -> str:
    """One line of the table."""
    gm = family.graph()
    canonicalize(gm)
    layer_norms = sum(node.target is torch.ops.aten.layer_norm.default for node in gm.graph.nodes)
    prepared(gm)
    left = sum(node.target is torch.ops.aten.layer_norm.default for node in gm.graph.nodes)
    wide = in_float64(gm)
    groups, exact = mapped(family, wide)
    _, rounded = mapped(family, gm)
    cells = [name, *(shapes(groups[kind]) for kind in KINDS), f"{layer_norms - left} of {layer_norms}", reasons(groups)]
    return f"| {' | '.join(cells)} | {exact:.0e} | {rounded:.0e} |"


def shapes(groups: list[ChannelGroup]) -> str:
    """How many groups there are, and those that are free: `5 of 12: 64, 4 × [2·16]`."""
    free = Counter(
        f"{group.size}" if group.kind is Map.SCALE or group.blocks == 1 else f"[{group.blocks}·{group.block}]"
        for group in groups
        if not group.reason
    )
    listed = ", ".join(f"{count} × {shape}" if count > 1 else shape for shape, count in free.items())
    return f"{sum(free.values())} of {len(groups)}" + f": {listed}" * bool(listed)


def reasons(groups: dict[Map, list[ChannelGroup]], most: int = 6) -> str:
    """What froze rotations and scales, most frequent first, without places."""
    given = [group.reason for kind in (Map.ROTATE, Map.SCALE) for group in groups[kind] if group.reason]
    short = Counter(re.sub(r" in [\w.]+", "", re.sub(r"the norm [\w.]*?(\w+)\b(?![.\w])", r"the norm \1", reason)) for reason in given)
    return "; ".join(f"{reason} ({count})" for reason, count in short.most_common(most)) + "; …" * (len(short) > most)


def drawn_family(name: str) -> tuple[Family | None, str]:
    """A drawn model that runs with the cache, or why there is none."""
    try:
        model = build(name)
        family = Family(name, model, capture(model))
        family.steps(family.captured, lengths=LENGTHS)
    except Exception as error:  # any model's own code: the table says what it raised
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return family, ""


INTRODUCTION = f"""# Channel groups

`python -m tools.check_groups`, torch {torch.__version__}, transformers {transformers.__version__}. Tiny random models, after
`canonicalize, untie, fold_norm, center_norm`. A group is all weight axes that take one map; `[2·16]` are two blocks of 16 channels, each
with a map of its own. The last columns: the greatest relative error of the logits over a prompt and two steps with the cache, after random
maps of all free groups, kind after kind, in a graph that computes in float64 throughout, and as it is.

The drawn families are the first of a shuffled list of all causal language models. The analysis was completed on the first eight. It met the
second eight afterwards, and was changed since only where small test graphs showed that a free group changed the function.
"""

HEAD = """| family | rotate | permute | linear | scale | layer norms centered | what froze rotations and scales | fp64 | fp32 |
|---|---|---|---|---|---|---|---|---|"""


def report(only: str = "") -> Iterator[str]:
    yield INTRODUCTION
    if only in {"", "tests"}:
        yield f"## Families of the tests\n\n{HEAD}"
        for name in FAMILIES:
            yield row(name, families.load(name))
    found = 0
    passed_over: list[str] = []
    for name in drawn() if only in {"", "drawn"} else ():
        family, reason = drawn_family(name)
        if family is None:
            passed_over.append(f"- {name}: {reason}")
            continue
        if found % EACH == 0:
            yield f"\n## {'Drawn and looked at' if found == 0 else 'Drawn afterwards, not looked at'}\n\n{HEAD}"
        yield row(name, family)
        found += 1
        if found == 2 * EACH:
            break
    if passed_over:
        yield "\n## Drawn and passed over: no tiny model could be built or captured\n\n" + "\n".join(passed_over)


def main(out: Path | None = None, only: str = "") -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    lines = []
    for line in report(only):
        print(line, flush=True)
        lines.append(line)
    if out is not None:
        out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    typer.run(main)
