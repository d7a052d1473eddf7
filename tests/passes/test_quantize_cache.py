from itertools import pairwise

import pytest
import torch
import transformers

import passes
from ir import edit
from ir.capture import capture
from ir.errors import CoverageError, DataError, OptionError
from ir.match import find
from ir.ops import CHOOSE_QPARAMS, DEQUANTIZE, PACK, UNPACK
from passes.measure import greedy
from passes.page import picture
from passes.probe import relative_error
from passes.quantize_cache import QuantizeCache
from tests.families import FAMILIES, LAYERS, load
from tests.ir.test_cache import graph
from tests.passes.samples import CALIBRATION, Mlp, compiled, context, run, tokens, vectors

STEPS = (7, 1, 1)
DECODERS = [name for name in FAMILIES if name != "bert"]


def quantized(family, text, before="canonicalize"):
    """The family's graph with a quantized cache, its context, and its error over three chained calls."""
    gm = load(family).graph()
    ctx = context(gm, CALIBRATION)
    run(gm, f"{before}, {text}", ctx=ctx)
    pairs = zip(load(family).steps(gm, lengths=STEPS), load(family).steps(load(family).captured, lengths=STEPS), strict=True)
    return gm, ctx, max(relative_error((a,), (b,)) for a, b in pairs)


def layer(gm, *parts):
    """The ports of the first layer's cache: dtype and fixed sizes."""
    found = {port.name.removeprefix("past_key_values.0."): port for port in gm.meta["signature"].inputs}
    return [(found[part].dtype, found[part].shape[1], found[part].shape[3]) for part in parts]


@pytest.mark.parametrize("family", DECODERS)
def test_eight_bits_are_near_lossless_in_every_decoder(family):
    _, ctx, error = quantized(family, "quantize_cache")
    assert not ctx.skipped
    assert 0 < error < 0.02


@pytest.mark.parametrize("options", ["", ", symmetric=True", ", dynamic=False", ", channels=True", ", group=8"])
def test_the_error_falls_with_every_bit(options):
    errors = [quantized("gpt2", f"quantize_cache(bits={bits}{options})")[2] for bits in (2, 3, 4, 8)]
    assert all(a > 1.3 * b for a, b in pairwise(errors))
    assert errors[-1] < 0.01


def test_the_cache_that_goes_in_and_out_is_small():
    gm, ctx, _ = quantized("llama", "quantize_cache(bits=4)")
    assert layer(gm, "key", "key_scale", "key_zero_point") == [("uint8", 2, 8), ("float16", 2, 1), ("uint8", 2, 1)]
    assert gm.meta["signature"].token_bytes == LAYERS * 2 * 2 * (8 + 2 + 1)
    assert "key/value cache: 88 bytes a token in place of 512, 5.82 times less" in ctx.notes
    outputs = gm(*gm.meta["signature"].bind(input_ids=tokens(3, 5)))
    assert sum(output.nbytes for output in outputs[1:]) == 3 * 5 * 88


def test_keys_and_values_have_bits_of_their_own():
    gm, ctx, _ = quantized("llama", "quantize_cache(keys=8, values=3, symmetric=True)")
    assert layer(gm, "key", "value") == [("int8", 2, 16), ("uint8", 2, 8)]
    assert "3-bit values are kept in 4 bits each" in ctx.notes
    gm, ctx, _ = quantized("llama", "quantize_cache(keys=16, values=2)")
    assert layer(gm, "key", "value", "value_scale") == [("float32", 2, 16), ("uint8", 2, 4), ("float16", 2, 1)]


WIDTHS = "quantize_cache(bits={}, widths=(2, 4, 8, 16), tokens=128{})"


@pytest.mark.parametrize(
    ("bits", "options"), [(4.0, ""), (9.0, ""), (6.0, ", group=8"), (4.0, ", dynamic=False"), (4.5, ", channels=True")]
)
def test_every_site_gets_a_width_within_the_budget(bits, options):
    gm, ctx, error = quantized("llama", WIDTHS.format(bits, options))
    assert 0 < error < 1
    assert gm.meta["signature"].token_bytes <= bits * LAYERS * 2 * 2 * 16 / 8
    rows = ctx.tables["cache"]
    assert [row["site"] for row in rows] == ["0.key", "0.value", "1.key", "1.value"]
    assert sum(row["bytes a token"] for row in rows) == gm.meta["signature"].token_bytes
    found = {text.split(".", 1)[1]: encoding for text, encoding in _kept(gm).items()}
    assert all(found.get(row["site"], "") == row["encoding"] for row in rows)
    assert any(f"{gm.meta['signature'].token_bytes} bytes a token in place of 512" in note for note in ctx.notes)
    assert picture.cache(rows)


def _kept(gm):
    """The encoding of every input of the cache that holds codes, by name."""
    found = {}
    for node in find(gm, DEQUANTIZE):
        unpacked = node.args[0]
        cat = unpacked.args[0] if unpacked.target is UNPACK else unpacked
        past = cat.args[0][0]
        names = [port.name for port in gm.meta["signature"].inputs]
        found[names[list(gm.graph.find_nodes(op="placeholder")).index(past)]] = node.args[3]
    return found


def test_the_budget_decides_and_a_greater_one_is_nearer():
    made = [quantized("gpt2", WIDTHS.format(bits, "")) for bits in (3.5, 6.0, 10.0, 24.0)]
    errors = [error for _, _, error in made]
    assert errors == sorted(errors, reverse=True) and len(set(errors)) == 4
    again = quantized("gpt2", WIDTHS.format(6.0, ""))[1].tables["cache"]
    assert again == made[1][1].tables["cache"]


def test_a_choice_is_better_than_one_width_of_the_same_size():
    _, ctx, _ = quantized("gpt2", WIDTHS.format(5.5, ""))
    chosen = sum(row["predicted, nats a token"] for row in ctx.tables["cache"])
    _, ctx, _ = quantized("gpt2", WIDTHS.format(5.5, "").replace("(2, 4, 8, 16)", "(4,)"))
    assert chosen <= sum(row["predicted, nats a token"] for row in ctx.tables["cache"])
    assert {row["encoding"] for row in ctx.tables["cache"]} == {"u4[1,-1]dynamic"}


def test_all_in_floating_point_is_a_choice_too():
    gm, ctx, error = quantized("llama", WIDTHS.format(32.0, ""))
    assert error == 0 and gm.meta["signature"].token_bytes == 512
    assert {row["encoding"] for row in ctx.tables["cache"]} == {""}


def test_a_budget_that_nothing_fits_into_is_refused():
    with pytest.raises(OptionError, match="no choice of widths") as error:
        quantized("llama", WIDTHS.format(3.0, ""))
    assert "bits=3.5," in error.value.remedy
    with pytest.raises(DataError, match="calibration"):
        run(load("llama").graph(), f"canonicalize, {WIDTHS.format(4.0, '')}")


def test_widths_that_the_backend_lacks_are_not_chosen():
    class Even:
        name = "even"

        def supports(self, operator, encodings, shape):
            return None if all(encoding.bits == 4 for encoding in encodings.values()) else "four bits only"

    def on_even(widths):
        gm = load("llama").graph()
        ctx = context(gm, CALIBRATION)
        ctx.backend = Even()
        run(gm, f"canonicalize, quantize_cache(bits=12.0, widths={widths}, tokens=64)", ctx=ctx)
        return ctx.tables["cache"]

    assert {row["encoding"] for row in on_even((2, 4, 8))} == {"u4[1,-1]dynamic"}
    with pytest.raises(CoverageError, match="four bits only"):
        on_even((2, 8, 16))


def test_static_scales_are_those_of_the_heads_extremes():
    gm, _, _ = quantized("gpt2", "quantize_cache(dynamic=False, symmetric=True)")
    assert not find(gm, CHOOSE_QPARAMS)
    assert layer(gm, "key") == [("int8", 4, 16)]
    assert "past_key_values.0.key_scale" not in {port.name for port in gm.meta["signature"].inputs}
    plain = load("gpt2").captured
    caches = [load("gpt2").signature.wrap(plain(*batch)).past_key_values for batch in context(plain, CALIBRATION).calibration]
    greatest = torch.stack([cache.layers[0].keys.abs().amax((0, 2, 3)) for cache in caches]).amax(0)
    scale = edit.attribute(gm, find(gm, DEQUANTIZE)[0].args[1])
    torch.testing.assert_close(scale.flatten(), greatest / 127.5)


def test_eight_bit_floats_with_one_scale_for_a_layer():
    gm, _, error = quantized("llama", "quantize_cache(dynamic=False, tensor=True, floats=True)")
    assert 0 < error < 0.05
    assert layer(gm, "key", "value") == [("uint8", 2, 16)] * 2
    assert gm.meta["signature"].token_bytes == LAYERS * 2 * 2 * 16
    plain = load("llama").captured
    caches = [load("llama").signature.wrap(plain(*batch)).past_key_values for batch in context(plain, CALIBRATION).calibration]
    greatest = max(cache.layers[0].keys.abs().max() for cache in caches)
    torch.testing.assert_close(edit.attribute(gm, find(gm, DEQUANTIZE)[0].args[1]).flatten(), (greatest / 448).reshape(1))


def test_channels_of_keys_have_static_scales():
    gm, _, _ = quantized("gpt2", "quantize_cache(bits=4, channels=True)")
    key, value = find(gm, DEQUANTIZE)[:2]
    assert edit.attribute(gm, key.args[1]).shape == (1, 4, 1, 16)
    assert value.args[3] == "u4[1,-1]dynamic"


def test_a_clip_is_part_of_dynamic_encodings():
    gm, _, _ = quantized("gpt2", "quantize_cache(bits=2, channels=True, clip=0.75)")
    assert [node.args[3] for node in find(gm, DEQUANTIZE)[:2]] == ["u2[-1,1,-1,1]", "u2[1,-1]dynamic*0.75"]


def test_outliers_in_a_channel_of_keys_are_better_kept_by_channel():
    gm = load("gpt2").graph()
    name = "transformer.h.0.attn.c_attn.bias"
    node = next(node for node in gm.graph.find_nodes(op="get_attr") if node.target == name)
    bias = edit.attribute(gm, node).detach().clone()
    bias[64] += 30  # the first channel of the first head's keys
    edit.set_attribute(gm, node, bias)
    errors = [
        passes.compile(gm, f"canonicalize, quantize_cache(keys=4, values=16{options})", CALIBRATION).report().difference
        for options in ("", ", channels=True")
    ]
    assert errors[0] > 2 * errors[1]


@pytest.mark.parametrize(("bits", "padding"), [(8, 0), (4, 4)])
def test_decoding_follows_one_call_over_all_tokens(bits, padding):
    made = compiled("llama", f"canonicalize, quantize_cache(bits={bits})")
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[1, :padding] = 0  # padded on the left
    whole = made(input_ids=ids, attention_mask=mask).logits
    past, parts = None, []
    for start, end in ((0, 9), (9, 11), (11, 12)):
        outputs = made(input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=past)
        past, parts = outputs.past_key_values, [*parts, outputs.logits]
    seen = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[seen], whole[seen], rtol=1e-3, atol=1e-3 * float(whole.abs().max()))


def test_greedy_text_goes_on_as_before():
    ids = tokens(2, 9)
    texts = [torch.stack(list(greedy(compiled("gpt2", text), ids, 12)), 1) for text in ("canonicalize", "canonicalize, quantize_cache")]
    assert (texts[0] == texts[1]).float().mean() > 0.9


def test_the_cache_that_is_returned_can_be_saved_with_the_model_and_fed_to_it(tmp_path):
    made = compiled("llama", "w8a16(cache=4)")
    loaded = passes.load(made.save(tmp_path / "out"))
    first = made(input_ids=tokens(3, 5))
    assert list(first.past_key_values[0]) == [f"{part}{suffix}" for part in ("key", "value") for suffix in ("", "_scale", "_zero_point")]
    a, b = (model(input_ids=tokens(3, 1), past_key_values=first.past_key_values).logits for model in (made, loaded))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (lambda past: load("llama").model(tokens(3, 5)).past_key_values, "lacks"),
        (lambda past: [{**part, "key": part["key"].float()} for part in past], "dtype"),
        (lambda past: past[:1], "lacks 'past_key_values.1.key'"),
        (lambda past: [*past, past[0]], "does not know"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(cache, message):
    made = compiled("llama", "w8a16(cache=4)")
    past = made(input_ids=tokens(3, 5)).past_key_values
    with pytest.raises(DataError, match=message) as refused:
        made(input_ids=tokens(3, 1), past_key_values=cache(past))
    assert "itself returned" in refused.value.remedy


@pytest.mark.parametrize("rest", ["w4a16(rounding='gptq')", "annotate(dynamic=False), observe, quantize", "quantize_cache(bits=8)"])
def test_later_passes_still_have_calibration_data(rest):
    gm = load("llama").graph()
    ctx = context(gm, CALIBRATION)
    records, _ = run(gm, f"canonicalize, quantize_cache(bits=4), {rest}", ctx=ctx)
    assert bool(records[-1].sites) == ("cache" not in rest)  # it is quantized already
    assert len(find(gm, PACK)) == 2 * LAYERS
    assert all(torch.isfinite(output).all() for output in load("llama").steps(gm))


def test_a_cache_in_the_calibration_data_is_converted():
    plain = load("llama").captured
    past = load("llama").signature.wrap(plain(*load("llama").signature.bind(tokens(2, 6)))).past_key_values
    batch = {"input_ids": tokens(2, 3), "past_key_values": past, "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    gm = load("llama").graph()
    ctx = context(gm, [batch])
    run(gm, "canonicalize, quantize_cache", ctx=ctx)
    assert relative_error(gm(*ctx.calibration[0])[:1], plain(*context(plain, [batch]).calibration[0])[:1]) < 0.02


def test_heads_that_do_not_fill_bytes_are_kept_one_code_to_a_byte():
    gm = narrow(6)
    records, ctx = run(gm, "canonicalize, quantize_cache(bits=2)")
    assert records[-1].sites == 2 * LAYERS
    assert layer(gm, "key") == [("uint8", 4, 6)]
    assert any("keys of width [6] are kept one to a byte" in note for note in ctx.notes)


def narrow(width):
    """A decoder whose heads have `width` channels."""
    torch.manual_seed(0)
    config = FAMILIES["gpt2"]()
    return capture(transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**config.to_dict(), "n_embd": 4 * width})).eval())


def test_models_without_a_cache_are_refused():
    for gm in (load("bert").graph(), passes.compile(Mlp(), "w8a16", args=(vectors(),)).graph):
        with pytest.raises(CoverageError, match="keeps no key/value cache") as refused:
            run(gm, "quantize_cache")
        assert "leave quantize_cache out" in refused.value.remedy


def test_a_cache_that_is_not_understood_says_why():
    gm = graph(attend=lambda past, kept: kept + past.mean(2, keepdim=True))
    with pytest.raises(CoverageError, match=r"past_key_values\.0\.key cannot be quantized: past tokens are also read by"):
        run(gm, "quantize_cache")


def test_a_part_may_be_left_out_and_the_report_says_so():
    family = load("llama")
    gm = family.graph()
    past = gm.graph.find_nodes(op="placeholder")[3]
    cat = next(user for user in past.users if user.target is torch.ops.aten.cat.default)
    other = edit.emit(gm, torch.ops.aten.mul.Tensor, (past, 1.0), before=cat)
    cat.args = ([other, cat.args[0][1]], *cat.args[1:])
    with pytest.raises(CoverageError, match="allow_partial"):
        run(gm, "quantize_cache")
    ctx = context(gm)
    ctx.allow_partial = True
    records, _ = run(gm, "quantize_cache", ctx=ctx)
    assert records[-1].sites == 2 * LAYERS - 1
    assert [skip.path for skip in ctx.skipped] == ["past_key_values.0.key"]
    assert any("past_key_values.0.key is kept in floating point" in note for note in ctx.notes)
    assert len(family.steps(gm)) == 2


def test_backends_are_asked():
    class Never:
        name = "never"

        def supports(self, operator, encodings, shape):
            return f"no {operator} of {shape} as {', '.join(map(str, encodings.values()))}"

    gm = load("llama").graph()
    ctx = context(gm)
    ctx.backend = Never()
    with pytest.raises(CoverageError, match=r"no Cache of \(2, 16\) as u8\[1,-1\]dynamic"):
        run(gm, "quantize_cache", ctx=ctx)


@pytest.mark.parametrize(
    "text",
    [
        *("bits=1", "bits=9", "bits='8'", "bits=True", "keys=12", "bits=16", "keys=16, values=16"),
        *("bits=4.5", "bits=4, widths=(3, 9)", "bits=4, widths=(2.0,)", "bits=0.0, widths=(2, 4)", "bits=20, widths=(16,)"),
        *("bits=4, widths=(2, 4), keys=4", "bits=4, widths=(2, 4), values=4", "bits=4, widths=(2, 4), tokens=0"),
        *("group=0", "group=8, dynamic=False", "clip=0.0", "clip=0.9, dynamic=False"),
    ],
)
def test_options_that_make_no_sense_are_refused(text):
    with pytest.raises(OptionError):
        passes.Pipeline.parse(f"quantize_cache({text})")


def test_groups_divide_heads():
    with pytest.raises(CoverageError, match="16 elements, not a multiple of the group of 12"):
        run(load("llama").graph(), "quantize_cache(group=12)")


def test_static_scales_need_calibration_data():
    for options in ("dynamic=False", "channels=True"):
        with pytest.raises(DataError, match="need calibration data"):
            run(load("llama").graph(), f"quantize_cache({options})")
    run(load("llama").graph(), "quantize_cache(channels=True, keys=16)")


def test_presets_append_it():
    for name in ("w8a8", "w4a16"):
        assert passes.Pipeline.parse(f"{name}(cache=4)").passes[-1] == QuantizeCache(4)
        assert QuantizeCache not in {type(step) for step in passes.Pipeline.parse(name)}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tensor": True}, "is static"),
        ({"tensor": True, "dynamic": False, "channels": True}, "not per channel"),
        ({"floats": True, "bits": 4}, "floats have 8 bits"),
        ({"floats": True, "widths": (4, 8)}, "floats have 8 bits"),
    ],
)
def test_scales_of_layers_are_static_and_floats_have_eight_bits(options, said):
    with pytest.raises(OptionError, match=said):
        QuantizeCache(**options)
