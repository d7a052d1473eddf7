"""`assign_bits`: choose the widths of every weight and input by what rounding costs the whole model, under one budget."""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from passes.base import Context, Effect
from passes.budget.budgeted import Budgeted


@dataclass(frozen=True)
class AssignBits(Budgeted):
    """Give annotated linears the widths and groups with the least predicted loss that a budget allows.

    Before::

        %2 = aten.linear(%1, %q) {weight: u4[1,64]}; %9 = aten.linear(%8, %down) {weight: u4[1,64]}

    After::

        %2 = aten.linear(%1, %q) {weight: u2[1,64]}; %9 = aten.linear(%8, %down) {weight: u3[1,64]}

    An option is a pair, the encodings of a linear's weight and of its input. Its loss is predicted from one run:
    `½ Σ_n h_n ((ΔW G ΔWᵀ)_nn + (Ŵ D Ŵᵀ)_nn)` nats a token, with `G = E[xxᵀ]` of the layer's inputs, `h_n` the mean squared gradient of the
    model's log likelihood at output `n` (the diagonal of its Fisher information), `ΔW` what the rounding really leaves of the weight, and
    `D = E[Δx Δxᵀ]` of the inputs. Options are chosen by an exact knapsack (HiGHS), whose bound is reported. Linears that read one tensor
    share their encodings, since runtimes fuse them. A budget in bits or bytes counts weights only: of options that differ in their inputs
    alone the one with less loss is taken, the wider. A latency counts both.

    `measure` holds tokens out of the predictions and measures on them: the KL `K(all)` of the model from itself with all chosen encodings;
    with one site at a time in floating point, what each adds, `K(all) − K(all∖i)`; and for pairs of the greatest
    `K(all) − K(all∖i) − K(all∖j) + K(all∖{i,j})`. A correction multiplies the predicted costs of a site by measured over predicted and
    solves again; the allocation that measured least is kept. Weights and inputs are rounded as for the predictions.

    Limits: 1. whole linears: columns of one linear share their widths, unless `split_channels` has made linears of them; 2. interactions
    between layers are not predicted, only measured; 3. static inputs are predicted and measured over each batch's own range; 4. the clips
    of inputs stay as annotated, whatever the width: choose them afterwards, by `clip_activations`.

    Args:
        bits: budget: bits per weight of the annotated linears, with scales and zero points.
        memory: budget in place of `bits`: bits over 16, the share that is left of the size in FP16.
        bytes: budget in place of `bits`: bytes of the model as it will be stored, with everything that is not quantized.
        latency: budget in place of `bits`: milliseconds that all annotated linears together take for one token on the target.
        latencies: the file with the target's table of latencies; if there is none, it is measured on this machine and written there.
        widths: to choose among: of weights, 1 to 8, inputs as they are annotated; or schemes such as "W4A8", which state both.
        groups: group sizes to choose among, -1 for whole channels; none: as annotated.
        fused: linears that read one tensor share their encoding.
        loss: "model", or "layer": the relative squared error of each layer's own output, which knows nothing of the others.
        rounding: that predictions are made with, "gptq" or "nearest".
        tokens: that gradients are taken from.
        file: load predictions from this file if it exists, else write them there: another budget is then chosen in seconds.
        measure: tokens held out to measure on, at most half of the samples; 0 measures nothing. Each site is left out in turn: time grows
            with the square of the layers.
        corrections: rounds of measuring, correcting and solving again.
        seed: of what is drawn.

    Raises:
        OptionError: a width that there is not, a budget that nothing fits into; the remedy names the nearest that works.
        CoverageError: the backend has no form for any of the options.
        DataError: no calibration data, or a file that does not fit.
    """

    effect: ClassVar[Effect] = Effect.ANNOTATE

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Decide, and annotate; returns the number of linears whose encoding changes."""
        chosen = self.decide(gm, ctx, self.linked(gm, ctx, self.sites(gm), scored=True)).forms()
        changed = sum(layer.mark != form.mark for layer, form in chosen.items())
        for layer, form in chosen.items():
            layer.annotate(form.mark)
        return changed
