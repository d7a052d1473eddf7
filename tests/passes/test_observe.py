import pytest
import torch
from torch import nn

from ir.capture import capture
from ir.errors import DataError
from passes.observe import Observe
from tests.families import load
from tests.passes.samples import CALIBRATION, Mlp, run, tokens, vectors


def hooked_inputs(model, calibration):
    """What every linear of a Hugging Face model reads, `[tokens, channels]` by module path."""
    seen = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, path=path: seen.setdefault(path, []).append(args[0].flatten(0, -2)))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        for batch in calibration:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return {path: torch.cat(parts) for path, parts in seen.items()}


def observed(family="llama", calibration=CALIBRATION, step="observe(gram=True)"):
    gm = load(family).graph()
    _, ctx = run(gm, f"canonicalize, {step}", calibration)
    return ctx.statistics


def test_statistics_are_those_of_the_inputs_that_the_model_sees():
    expected = hooked_inputs(load("llama").model, CALIBRATION)
    statistics = observed()
    assert set(statistics) < set(expected)
    for path, found in statistics.items():
        x = expected[path]
        assert found.count == len(x) == 2 * 4 * 24
        torch.testing.assert_close(found.absmax, x.abs().amax(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.mean, x.double().mean(0), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.gram, x.T @ x, rtol=1e-3, atol=1e-2)
        assert found.range == pytest.approx((float(x.min()), float(x.max())), rel=1e-3)


def test_layers_that_read_one_tensor_share_its_statistics():
    statistics = observed()
    assert "model.layers.0.self_attn.q_proj" in statistics
    assert "model.layers.0.self_attn.k_proj" not in statistics
    assert len(statistics) == 4 * 2 + 1


def test_the_state_does_not_grow_with_the_number_of_batches():
    def size(batches):
        statistics = observed("gpt2", [tokens(seed=seed) for seed in range(batches)])
        return sum(tensor.untyped_storage().nbytes() for kept in statistics.values() for tensor in kept.tensors().values())

    assert size(1) == size(5)


def test_inputs_of_the_model_itself_are_observed():
    gm = capture(Mlp(), args=(vectors(),))
    _, ctx = run(gm, "observe", [vectors(1), vectors(2)])
    assert set(ctx.statistics) == {"up", "down"}
    assert ctx.statistics["up"].count == 16


def test_a_file_is_written_once_and_read_after(tmp_path):
    file = tmp_path / "statistics.safetensors"
    step = str(Observe(gram=True, file=str(file)))
    measured = observed(step=step)
    written = file.read_bytes()
    loaded = observed(calibration=None, step=step)
    assert file.read_bytes() == written
    for path, found in measured.items():
        for name, tensor in found.tensors().items():
            assert torch.equal(loaded[path].tensors()[name], tensor)


@pytest.mark.parametrize("other", ["gpt2", "no-gram"])
def test_a_file_that_does_not_fit_is_refused(tmp_path, other):
    file = str(tmp_path / "statistics.safetensors")
    observed(family="llama" if other == "no-gram" else other, step=str(Observe(file=file)))
    with pytest.raises(DataError, match="no entry"):
        observed(step=str(Observe(gram=True, file=file)))


def test_observing_needs_data():
    with pytest.raises(DataError, match="needs calibration data"):
        observed(calibration=None)


class Divides(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 8)

    def forward(self, x):
        return self.linear(torch.log(x)).nan_to_num()


def test_values_that_are_not_finite_name_the_layer():
    gm = capture(Divides(), args=(vectors().abs() + 1,))
    with pytest.raises(DataError, match="not finite") as caught:
        run(gm, "observe", [vectors().abs() + 1, vectors()])
    assert "linear" in str(caught.value)
