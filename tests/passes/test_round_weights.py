import copy
from functools import cache

import pytest
import torch
from torch import nn

import passes
from ir import edit, numerics
from ir.capture import capture
from ir.encoding import Encoding
from ir.errors import DataError, OptionError
from ir.match import find
from ir.ops import DEQUANTIZE
from ir.rounding import GPTQ, METHODS, Evidence, Nearest
from ir.sites import layers, quantized, stored_weight
from tests.families import LAYERS, load
from tests.passes.samples import CALIBRATION, Mlp, run, tokens, vectors

ENCODING = Encoding.parse("u3[1,32]")
ANNOTATE = "canonicalize, untie, annotate(scheme='W3A16', group=32, symmetric=False)"
# The linears of a Llama's layer in the order that they run, those with one input together.
ORDER = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@cache
def rounded(step="round_weights", family="llama", annotate=ANNOTATE):
    """The graph of a family with rounded weights."""
    gm = load(family).graph()
    run(gm, f"{annotate}, {step}", CALIBRATION)
    return gm


def codes(gm):
    """Codes by the path of the layer that reads them."""
    return {layer.path: edit.attribute(gm, stored_weight(layer.node)) for layer in layers(gm) if layer.weight.target is DEQUANTIZE}


def by_hooks(prefix_rounded):
    """GPTQ with forward hooks on the Hugging Face model, straightforwardly: the whole model runs for every group of linears."""
    original = load("llama").model
    model, found = copy.deepcopy(original), {}
    for index in range(LAYERS):
        for group in ORDER:
            paths = [f"model.layers.{index}.{name}" for name in group]
            gram, count = torch.zeros(()), 0

            def add(_, args):
                nonlocal gram, count
                x = args[0].flatten(0, -2).float()
                gram, count = gram + x.T @ x, count + len(x)

            source = model if prefix_rounded else original
            hook = source.get_submodule(paths[0]).register_forward_pre_hook(add)
            with torch.no_grad():
                for batch in CALIBRATION:
                    source(**batch)
                hook.remove()
                for path in paths:
                    linear = model.get_submodule(path)
                    found[path], qparams = GPTQ().round_weight(linear.weight, ENCODING, Evidence(gram=gram / count))
                    linear.weight.copy_(numerics.dequantize(found[path], qparams, ENCODING))
    return found


def agreement(a, b, layer):
    paths = [path for path in a if f"layers.{layer}." in path]
    return sum(int((a[path] == b[path]).sum()) for path in paths) / sum(a[path].numel() for path in paths)


def test_inputs_come_from_the_rounded_prefix():
    found = codes(rounded())
    sequential, parallel = by_hooks(True), by_hooks(False)
    assert found.keys() == sequential.keys()
    for layer in range(LAYERS):
        assert agreement(found, sequential, layer) > 0.99
    assert agreement(found, parallel, LAYERS - 1) < 0.95


def test_nearest_is_what_numerics_says():
    gm = rounded("round_weights(method='nearest')")
    for layer in layers(gm):
        if layer.weight.target is DEQUANTIZE:
            W = load("llama").model.get_submodule(layer.path).weight.detach()
            expected, qparams = Nearest().round_weight(W, ENCODING)
            assert torch.equal(codes(gm)[layer.path], expected)
            assert torch.equal(edit.attribute(gm, layer.weight.args[1]), qparams.scale)


def output_error(gm):
    """The mean squared error of the logits on the calibration data."""
    signature = load("llama").signature
    errors = []
    with torch.no_grad():
        for batch in CALIBRATION:
            logits = gm(*signature.bind(**batch))[0]
            errors.append((logits - load("llama").model(**batch).logits).square().mean())
    return float(torch.stack(errors).mean())


@pytest.mark.parametrize("options", ["", "(act_order=True)"])
def test_gptq_has_a_lower_output_error_than_nearest(options):
    assert output_error(rounded(f"round_weights{options}")) < 0.8 * output_error(rounded("round_weights(method='nearest')"))


def test_readers_of_one_tensor_get_one_gram_matrix(monkeypatch):
    grams = []
    original = GPTQ.round_weight

    def spy(self, W, encoding, evidence):
        grams.append(evidence.gram)
        return original(self, W, encoding, evidence)

    monkeypatch.setattr(GPTQ, "round_weight", spy)
    gm = load("llama").graph()
    run(gm, f"{ANNOTATE}, round_weights", CALIBRATION)
    assert len(grams) == 7 * LAYERS
    assert len({id(gram) for gram in grams}) == len(ORDER) * LAYERS


def test_floating_point_weights_leave_the_graph():
    gm = rounded()
    names = {name for name, _ in [*gm.named_parameters(), *gm.named_buffers()]}
    assert not any(name.endswith("proj.weight") for name in names)
    assert "lm_head.weight" in names
    assert len(list(quantized(gm))) == 7 * LAYERS


def test_a_tied_embedding_takes_the_codes_of_the_head():
    annotate = "canonicalize, {}annotate(scheme='W4A16', group=32, symmetric=False, head=True, embeddings=True)"
    tied = codes(rounded(family="llama_tied", annotate=annotate.format("")))
    apart = codes(rounded(family="llama_tied", annotate=annotate.format("untie, ")))
    assert tied["model.embed_tokens"] is tied["lm_head"]
    assert not torch.equal(apart["model.embed_tokens"], apart["lm_head"])


def test_embeddings_are_rounded_before_the_linears_that_depend_on_them():
    annotate = "canonicalize, untie, annotate(scheme='W2A16', group=-1, embeddings=True)"
    found = codes(rounded("round_weights", "llama", annotate))
    gm = load("llama").graph()
    run(gm, f"{annotate}, annotate(scheme='W2A16', group=-1, targets=('q_proj',))", CALIBRATION)
    embedding = next(layer for layer in layers(gm) if layer.kind == "Embedding")
    encoding = Encoding.parse("i2[1,-1]")
    W = edit.attribute(gm, embedding.weight)
    rounded_rows = numerics.fake_quantize(W, encoding, numerics.choose_qparams(W, encoding, torch.float16))
    model = copy.deepcopy(load("llama").model)
    model.model.embed_tokens.weight.data.copy_(rounded_rows)
    seen = []
    q = model.model.layers[0].self_attn.q_proj
    q.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in CALIBRATION:
            model(**batch)
    x = torch.cat(seen)
    expected, _ = GPTQ().round_weight(q.weight.detach(), encoding, Evidence(gram=x.T @ x / len(x)))
    assert (found["model.layers.0.self_attn.q_proj"] == expected).float().mean() > 0.99


def test_a_second_run_has_nothing_to_do():
    gm = capture(rounded())
    (record,), _ = run(gm, "round_weights", CALIBRATION)
    assert record.sites == 0


def test_nothing_annotated_is_nothing_to_do():
    gm = capture(Mlp(), args=(vectors(),))
    (record,), _ = run(gm, "round_weights(method='nearest')")
    assert record.sites == 0


@pytest.mark.parametrize(
    ("calibration", "message"),
    [(None, "needs calibration data"), ([tokens(2, 63)], "126 calibration tokens are too few"), ([tokens(1, 64)], "64 calibration tokens")],
)
def test_gptq_needs_enough_data(calibration, message):
    gm = load("llama").graph()
    with pytest.raises(DataError, match=message):
        run(gm, f"{ANNOTATE}, round_weights", calibration)


def test_vectors_count_as_tokens_by_row():
    gm = capture(Mlp(), args=(vectors(),))
    with pytest.raises(DataError, match="64 calibration tokens"):
        run(gm, "annotate, round_weights", [vectors(1, 64)])


class Residual(nn.Module):
    """A stream without names that anyone knows: linears in parallel, in series, and one called twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        x = x + self.a(x) * torch.sigmoid(self.b(x))
        x = x + self.c(torch.tanh(x))
        return x + self.c(torch.tanh(x))


def test_any_module_is_rounded():
    gm = capture(Residual(), args=(vectors(width=16),))
    records, _ = run(gm, "canonicalize, untie, annotate(scheme='W4A16', group=16), round_weights", [vectors(1, 200, 16)])
    assert records[-1].sites == 4
    assert 0 < records[-1].difference < 0.2
    assert len(find(gm, DEQUANTIZE)) == 4


# What each method asks of the encoding, and options of its own.
MADE = {
    "nearest": ("W2A16", False, "search=True"),
    "gptq": ("W2A16", False, "damping=0.02, act_order=True, search=False, sweeps=1, propagation=0.5"),
    "gptaq": ("W2A16", False, "act_order=True, propagation=0.5"),
    "qronos": ("W2A16", False, "damping=0.001"),
    "guided": ("W2A16", False, "groups=2, propagation=0.25"),
    "yaqa": ("W2A16", False, "damping=0.05, sweeps=1"),
    "exact_scales": ("W2A16", False, "search=False, sweeps=2"),
    "ternary": ("W2A16", True, "act_order=True"),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_compiles_a_model(method):
    scheme, symmetric, options = MADE[method]
    annotate = f"canonicalize, untie, annotate(scheme={scheme!r}, group=32, symmetric={symmetric})"
    made = [
        passes.compile(load("llama").captured, f"{annotate}, round_weights({given})", CALIBRATION)
        for given in ("method='nearest'", f"method={method!r}", f"method={method!r}, {options}")
    ]
    nearest, plain, other = (compiled.trace[-1].difference for compiled in made)
    assert plain < nearest or method == "nearest"
    assert other < nearest
    assert all(compiled.trace[-1].sites == 7 * LAYERS for compiled in made)
    if method == "ternary":
        assert {int(code) for found in codes(made[1].graph).values() for code in found.unique()} == {-1, 0, 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("method='nearest', damping=0.1", "'nearest' has no option damping"),
        ("method='nearest', sweeps=1", "'nearest' has no option sweeps"),
        ("method='exact_scales', act_order=True", "'exact_scales' has no option act_order"),
        ("method='ternary', search=True", "'ternary' has no option search"),
        ("method='yaqa', groups=2", "'yaqa' has no option groups"),
        ("groups=2", "'gptq' has no option groups"),
        ("method='nearest', propagation=0.5", "nearest does not look at inputs"),
        ("method='nothing'", "there is no rounding 'nothing'"),
        ("sweeps=1.5", "the option is a int"),
        ("act_order=1", "the option is a bool"),
        ("damping='much'", "the option is a float"),
        ("damping=1.5", "damping is a share"),
        ("propagation=True", "propagation lies from 0 to 1"),
        ("propagation=1.5", "propagation lies from 0 to 1"),
    ],
)
def test_options_that_a_method_does_not_have_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        passes.Pipeline.parse(f"round_weights({options})")


@pytest.mark.parametrize("method", [method for method in METHODS if METHODS[method].needs])
def test_every_method_that_looks_at_data_needs_them(method):
    gm = load("llama").graph()
    with pytest.raises(DataError, match=f"method='{method}'.* needs calibration data"):
        run(gm, f"{ANNOTATE}, round_weights(method={method!r})")


@pytest.mark.parametrize("method", ["gptaq", "qronos"])
def test_towards_exact_outputs_without_a_share_is_gptq(method):
    given = (f"method={method!r}, propagation=0.0", "method='gptq'")
    found, expected = (codes(rounded(f"round_weights({options}, damping=0.01, search=False)")) for options in given)
    for layer in range(LAYERS):
        assert agreement(found, expected, layer) > 0.97


@pytest.mark.parametrize("method", ["guided", "yaqa"])
def test_any_module_is_rounded_by_its_gradients(method):
    gm = capture(Residual(), args=(vectors(width=16),))
    records, _ = run(
        gm, f"canonicalize, untie, annotate(scheme='W4A16', group=16), round_weights(method={method!r})", [vectors(1, 200, 16)]
    )
    assert records[-1].sites == 4
    assert 0 < records[-1].difference < 0.2


def test_gradients_go_past_activations_that_are_rounded():
    gm = load("llama").graph()
    annotate = "canonicalize, untie, annotate(scheme='W4A8'), quantize(weights=False)"
    records, _ = run(gm, f"{annotate}, round_weights(method='yaqa', propagation=0.25)", CALIBRATION)
    assert 0 < records[-1].difference < 0.5
