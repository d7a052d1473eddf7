"""Whole models: every family, quantized decoders, the folder that is saved."""

import json

import onnx
import pytest
import torch

import passes
from backends.onnx_qdq import OnnxQdq, proof
from backends.onnx_qdq.forms import INTEGER
from backends.onnx_qdq.legalize import Options, legalize
from backends.onnx_qdq.session import Executed, require_fused
from ir.canonical import canonicalize
from ir.capture import capture
from ir.errors import BackendError, DataError, OptionError
from passes.base import Context
from passes.untie import Untie
from tests.backends.onnx_qdq.conftest import branches, flat_inputs, quantized, relative
from tests.families import distinct_first

SHAPES = ((1, 7, 0), (2, 1, 4), (1, 1, 0), (3, 12, 9))  # batch, length, past: a prompt, a step, a first token, a longer one


def normal_form(families, name, dtype=torch.float32):
    gm = families(name, dtype).graph()
    canonicalize(gm)
    return gm


@pytest.mark.parametrize("name", distinct_first())
def test_one_graph_serves_every_batch_length_and_past_in_8_bits(families, name):
    gm = normal_form(families, name)
    quantized(gm, {"Linear": ("i8[1,32]", None)})
    executable = OnnxQdq(accuracy_level=1, threads=1).lower(gm, flat_inputs(gm, 2, 4, 3), [])
    for batch, length, past in SHAPES:
        inputs = flat_inputs(gm, batch, length, past)
        for ours, oracle in zip(executable(*inputs), gm(*inputs), strict=True):
            assert ours.shape == oracle.shape
            assert (ours - oracle).abs().max() <= 1e-4 * oracle.abs().max()


@pytest.fixture(scope="module")
def decoder(families):
    """A tied decoder with 4-bit linears and an 8-bit embedding, and its executable."""
    gm = normal_form(families, "llama")
    assert quantized(gm, {"Linear": ("u4[1,32]", None), "Embedding": ("i8[1,-1]", None)}) == 16
    notes = []
    return gm, OnnxQdq(threads=1).lower(gm, flat_inputs(gm, 2, 4, 3), notes), notes


def test_a_quantized_decoder_reports_what_runs(decoder):
    _, executable, notes = decoder
    report = executable.report()
    assert report["operators"]["MatMulNBits"] == 15
    assert report["operators"]["GatherBlockQuantized"] == 1
    assert report["operators"]["Attention"] == 2
    assert report["probe_difference_exact"] < 1e-5 < report["probe_difference"] < 5e-2
    assert {site["path"] for site in report["sites"]} >= {"model.embed_tokens", "model.layers.0.self_attn.q_proj", "lm_head"}
    assert notes == report["notes"] == []


def test_a_saved_folder_is_complete_and_loads_to_the_same_numbers(decoder, tmp_path):
    gm, executable, _ = decoder
    executable.save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data", "genai_config.json"}
    again = OnnxQdq(threads=1).load(tmp_path)
    inputs = flat_inputs(gm, 1, 5)
    for ours, theirs in zip(executable(*inputs), again(*inputs), strict=True):
        assert torch.equal(ours, theirs)
    assert again.report() == executable.report()
    again.save(tmp_path)  # onto itself


def test_names_are_those_of_the_signature_and_of_the_checkpoint(decoder, tmp_path):
    gm, executable, _ = decoder
    executable.save(tmp_path)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    signature = gm.meta["signature"]
    assert [v.name for v in model.graph.input] == [port.name for port in signature.inputs]
    assert [v.name for v in model.graph.output] == [port.name for port in signature.outputs]
    axes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in [*model.graph.input, *model.graph.output]}
    assert axes["attention_mask"] == ["batch", "total"]
    assert axes["past_key_values.0.key"] == ["batch", 2, "past", 16]
    assert axes["logits"] == ["batch", "sequence", 128]
    weights = {v.name: v for v in model.graph.initializer}
    assert weights["model.layers.0.self_attn.q_proj.weight"].data_type == onnx.TensorProto.UINT4
    assert list(weights["model.layers.0.self_attn.q_proj.weight"].dims) == [64, 64]
    assert "model.norm.weight" in weights
    config = json.loads((tmp_path / "genai_config.json").read_text())
    assert config["model"]["decoder"]["num_key_value_heads"] == 2
    assert config["model"]["decoder"]["session_options"]["session.qdq_matmulnbits_accuracy_level"] == "4"
    assert "/work" not in str(model.graph.node)


def test_tied_weights_are_stored_once_even_after_untie(families, tmp_path):
    gm = normal_form(families, "llama_tied")
    assert Untie().run(gm, Context()) == 1
    OnnxQdq(threads=1).lower(gm, flat_inputs(gm, 2, 4, 3), []).save(tmp_path)
    stored = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.initializer
    assert [sorted(weight.dims) for weight in stored].count([64, 128]) == 1


TIED = (
    "canonicalize, annotate(scheme='{}', group=32, symmetric=False, head=True, embeddings=True), round_weights(method='nearest'), quantize"
)


def test_a_tied_head_reads_the_table_of_its_embedding(families, tmp_path):
    compiled = passes.compile(families("llama_tied").graph(), TIED.format("W4A16"), backend=OnnxQdq(threads=1))
    report = compiled.report().target
    sites = {site["path"]: (site["form"], site["runs"]) for site in report["sites"]}
    assert sites["lm_head"] == ("blocked weight, shared with an embedding", "MatMulNBits")
    assert sites["model.embed_tokens"][1] == "GatherBlockQuantized"
    assert report["probe_difference_exact"] < 1e-5 < report["probe_difference"] < 5e-2
    compiled.executable.save(tmp_path)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    stored = {v.name: list(v.dims) for v in graph.initializer if 128 in v.dims}
    assert stored == {f"model.embed_tokens.weight{part}": [128, size] for part, size in (("", 32), (".scale", 2), (".zero_point", 1))}
    (product,) = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert next(a.i for a in product.attribute if a.name == "accuracy_level") == 4


def test_a_tied_head_for_another_kernel_is_stored_once_more_and_noted(families):
    graph = passes.compile(families("llama_tied").graph(), TIED.format("W4A8").replace("group=32", "group=-1")).graph
    notes = []
    sites = legalize(graph, Options(torch.float32, True), notes).sites
    assert sites[-1].form is INTEGER
    # 128 rows of 64 bytes, a scale and a zero point each
    assert "model.embed_tokens.weight#2: tied to an embedding, and stored once more in 8832 bytes for another kernel" in notes


def test_tokens_with_integer_activations_follow_the_oracle_over_a_cache(families):
    gm = normal_form(families, "llama_tied", torch.bfloat16)
    quantized(gm, {"Linear": ("i8[1,-1]", "i8[1,-1]dynamic")})
    executable = OnnxQdq(threads=1).lower(gm, flat_inputs(gm, 2, 4, 3), [])
    assert executable.report()["operators"]["MatMulIntegerToFloat"] == 15
    inputs = flat_inputs(gm, 2, 6)
    ours, oracle = executable(*inputs), gm(*inputs)
    assert [y.dtype for y in ours] == [y.dtype for y in oracle]
    assert relative(ours[0], oracle[0]) < 5e-2


def test_the_graph_that_is_lowered_stays_as_it_was():
    gm = branches({"a": ("i4[1,32]", None)})
    before, names = str(gm.graph), sorted(name for name, _ in gm.named_buffers())
    OnnxQdq(threads=1).lower(gm, [torch.randn(2, 5, 96)], [])
    assert str(gm.graph) == before
    assert sorted(name for name, _ in gm.named_buffers()) == names


def test_outputs_beyond_the_tolerance_are_an_error(monkeypatch):
    monkeypatch.setattr(proof, "run_flat", lambda session, inputs: [inputs[0][..., :64] * 0])
    with pytest.raises(BackendError, match="differ from the graph's"):
        OnnxQdq(threads=1).lower(branches({"a": ("i4[1,32]", None)}), [torch.randn(2, 5, 96)], [])


def test_a_site_that_is_not_fused_is_an_error_with_its_path():
    executed = Executed({"0a": "MatMulNBits", "1b.weight/DequantizeLinear": "DequantizeLinear", "2b.weight/MatMul": "MatMul"})
    expected = {"a.weight": ("MatMulNBits", "layers.a"), "b.weight": ("MatMulNBits", "layers.b")}
    with pytest.raises(BackendError, match=r"layers\.b"):
        require_fused(expected, executed)
    require_fused({"a.weight": expected["a.weight"]}, executed)


def test_an_operator_without_an_onnx_form_is_an_error_that_names_it():
    class Bessel(torch.nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    gm = capture(Bessel(), args=(torch.randn(2, 3),))
    with pytest.raises(BackendError, match="bessel_j0"):
        OnnxQdq(threads=1).lower(gm, [torch.randn(2, 3)], [])


def test_options_and_folders_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(OptionError, match="opset=7"):
        OnnxQdq(opset=7)
    with pytest.raises(DataError, match=r"no model\.onnx"):
        OnnxQdq().load(tmp_path)
