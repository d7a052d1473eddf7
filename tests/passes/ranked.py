"""What tests of several processes run, in each of them: `python -m tests.passes.ranked FOLDER [CASE ...]`, with torchrun's variables."""

import json
import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.fx import GraphModule

import passes
from ir.errors import FxpressError
from passes.base import Context, Effect, Pass
from passes.ranks import Ranks

SHAPES = [(4, 24), (4, 24), (3, 16), (4, 24), (2, 24)]  # of batches
CASES = {
    "gptq": "annotate(scheme='W4A8'), quantize(weights=False), round_weights(propagation=0.5)",
    "guided": "annotate(scheme='W4A16'), round_weights(method='guided', groups=2)",
    "yaqa": "annotate(scheme='W4A16'), round_weights(method='yaqa')",
    "observed": "observe, annotate(scheme='W8A8', dynamic=False), quantize",
    "smooth": "fold_norm, annotate(scheme='W4A4'), smooth_channels(search=True), balance_channels(online=True), clip_activations",
    "bits": "annotate(scheme='W4A16'), assign_bits(bits=3.6, measure=96, corrections=1), round_weights",
    "cache": "quantize_cache(bits=7, widths=(4, 8), dynamic=False)",
    "prune": "prune(share=0.2, multiple=4)",
    "blocks": "prune(share=0.3, what=('blocks',), criterion='measured')",
    "wanda": "prune(share=0.2, multiple=4, criterion='wanda')",
    "learned": "annotate(scheme='W4A16'), sample_text(length=8), learn_rounding(steps=3, rows=2)",
}


def outcome(case: str, ranks: Ranks) -> tuple[dict[str, Tensor], list[str]]:
    """What a pipeline leaves: all tensors, and what it told."""
    from tests.families import load  # here: processes that only fail start sooner without models
    from tests.passes.samples import context, run, tokens, weights

    gm = load("llama").graph()
    data = [{"input_ids": tokens(rows, length, seed)} for seed, (rows, length) in enumerate(SHAPES)]
    ctx = replace(context(gm, data), ranks=ranks)
    run(gm, f"canonicalize, untie, {CASES[case]}", ctx=ctx)
    told = [*ctx.notes, *(str(node.meta.get("custom")) for node in gm.graph.nodes), json.dumps(ctx.tables, default=str)]
    return {name: tensor.detach().clone().contiguous() for name, tensor in weights(gm).items()}, told


@dataclass(frozen=True)
class Dies(Pass):
    """The second process ends without a word, or hangs."""

    hangs: bool = False
    effect: ClassVar[Effect] = Effect.OBSERVE

    def run(self, gm: GraphModule, ctx: Context) -> int:
        if not ctx.ranks.first:
            os.kill(os.getpid(), signal.SIGSTOP if self.hangs else signal.SIGKILL)
        return 0


def _fails(case: str, folder: Path, ranks: Ranks) -> None:
    """A whole compile in which a process dies, or was given something else."""
    data = [torch.randn(64, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3 + (case == "differs") * ranks.rank)]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
    annotate, round_weights = passes.Pipeline.parse("annotate(scheme='W4A16', group=32), round_weights")
    try:
        made = passes.compile(model, [annotate, Dies(case == "hangs"), round_weights], data, args=(data[0],), ranks=ranks)
        made.save(folder / "out")
    except FxpressError as error:
        print(error, file=sys.stderr)
        os._exit(1)


def main(folder: Path, cases: list[str]) -> None:
    """Run cases, and write what each leaves."""
    torch.set_num_threads(1)
    ranks = Ranks.from_environment(timeout=5 if "hangs" in cases else 100)
    assert Ranks.from_environment() == Ranks(ranks.rank, ranks.world)  # there is a group now
    for case in cases:
        if case not in CASES:
            _fails(case, folder, ranks)
            continue
        tensors, told = outcome(case, ranks)
        save_file(tensors, folder / f"{case}.{ranks.rank}.safetensors")
        (folder / f"{case}.{ranks.rank}.json").write_text(json.dumps(told), encoding="utf-8")
    ranks.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
