"""What tests of passes that keep the function share."""

from torch.fx import GraphModule

from passes.base import Context, Record
from passes.probe import relative_error
from tests.families import load
from tests.passes.samples import CALIBRATION, run

STEPS = (7, 1, 1)
OPENED = "canonicalize, untie, fold_norm, center_norm"
DECODERS = ("llama", "qwen3", "gemma2", "phi3", "gpt2", "opt", "gpt_neox")


def kept(family: str, pipeline: str) -> tuple[GraphModule, list[Record], Context, float]:
    """A family's graph after a pipeline, and the greatest relative error of its logits over a prompt and two steps with the cache."""
    gm = load(family).graph()
    before = load(family).steps(gm, lengths=STEPS)
    records, ctx = run(gm, pipeline, CALIBRATION)
    after = load(family).steps(gm, lengths=STEPS)
    return gm, records, ctx, max(relative_error((a,), (b,)) for a, b in zip(after, before, strict=True))
