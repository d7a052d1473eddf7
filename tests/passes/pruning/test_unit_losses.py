import pytest
import torch

import passes
from passes.measure import divergence
from passes.pruning.kinds import BLOCKS
from passes.pruning.prunable import found_units
from passes.pruning.unit_losses import losses
from tests.families import load
from tests.passes.samples import CALIBRATION, compiled, context, run


def test_it_is_what_dropping_a_branch_costs():
    gm = load("llama").graph()
    run(gm, "canonicalize")
    units, _ = found_units(gm, [BLOCKS], ())
    found = losses(gm, context(gm, CALIBRATION), units, 10_000)
    assert len(found) == 4
    least = min(range(4), key=lambda index: float(found[index]))
    share = 0.2 if least % 2 == 0 else 0.3  # attentions have 20 % of the weights each, MLPs 30 %
    made = passes.compile(load("llama").captured, f"canonicalize, prune(share={share}, what=['blocks'], criterion='measured')", CALIBRATION)
    rows = {row["layer"]: row["kept"] for row in made.report().tables["pruned"]}
    assert rows[units[least].path] == 0
    ids = torch.cat([batch["input_ids"] for batch in CALIBRATION])
    assert divergence(made, compiled("llama", "canonicalize"), ids) == pytest.approx(float(found[least]), rel=1e-3)
