"""The plug-in of transformers.exporters: what it makes equals what `passes.compile` makes of the same model and data."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import DynamicCache
from transformers.exporters import DynamoConfig, DynamoExporter, OnnxConfig, OnnxExporter

import passes
from ir.errors import DataError, OptionError
from passes.exporters import Quantizer, _take_the_place
from tests.families import FAMILIES, VOCABULARY

PIPELINE = "w4a16(group=32)"
ADDED = {"Cast", "Less", "Mul", "Not", "ReduceSum", "Where"}  # by the ONNX exporter itself, for rows that mask every key


def tokens(*shape, seed=1):
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


CALIBRATION = [tokens(4, 16, seed=seed) for seed in (2, 3)]


@torch.no_grad()
def sample(model, rows=2, length=3, past=5):
    """Inputs of a forward with a cache that holds tokens."""
    cache = model(input_ids=tokens(rows, past)).past_key_values
    return {
        "input_ids": tokens(rows, length, seed=4),
        "attention_mask": torch.ones(rows, past + length, dtype=torch.int64),
        "position_ids": torch.arange(past, past + length).expand(rows, length).contiguous(),
        "past_key_values": DynamicCache([(layer.keys, layer.values) for layer in cache.layers]),
    }


@pytest.fixture(scope="module")
def model():
    config = FAMILIES["llama"]()
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def compiled(model):
    return passes.compile(model, PIPELINE, CALIBRATION, "onnx")


@torch.no_grad()
def test_a_program_for_torch_equals_the_reference_backends(model, compiled):
    quantizer = Quantizer(PIPELINE, CALIBRATION)
    program = DynamoExporter().export(model, sample(model), DynamoConfig(dynamic=True, quantizer=quantizer)).program
    expected = compiled.graph.state_dict()
    assert set(program.state_dict) == set(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in program.state_dict.items())
    inputs = sample(model, rows=3, length=1, past=9)
    oracle = compiled.signature.wrap(compiled.graph(*compiled.signature.bind(**inputs)))
    outputs = program.module()(**inputs)
    assert type(outputs) is type(oracle)
    torch.testing.assert_close(outputs.logits, oracle.logits, rtol=0, atol=0)
    assert torch.equal(outputs.past_key_values.layers[0].values, oracle.past_key_values.layers[0].values)
    assert [report.coverage for report in quantizer.reports] == [compiled.report().coverage]


@torch.no_grad()
def test_a_model_for_onnx_runtime_equals_the_compiled_one(model, compiled, tmp_path):
    exported = OnnxExporter().export(model, sample(model), OnnxConfig(dynamic=True, quantizer=Quantizer(PIPELINE, CALIBRATION)))
    ours, theirs = compiled.executable.model().graph, exported.program.graph
    stored = {name: v.const_value for name, v in ours.initializers.items() if "." in name}
    assert any(tensor.dtype.name == "UINT4" for tensor in stored.values())
    for name, tensor in stored.items():
        other = theirs.initializers[name].const_value
        assert (other.dtype, other.shape, other.tobytes()) == (tensor.dtype, tensor.shape, tensor.tobytes())
    counts = [Counter((node.domain, node.op_type) for node in graph) for graph in (ours, theirs)]
    assert not counts[0] - counts[1]
    assert {operator for _, operator in counts[1] - counts[0]} <= ADDED
    exported.save_pretrained(tmp_path)
    inputs = sample(model, rows=3, length=2, past=7)
    expected = compiled(**inputs)
    outputs = exported(**inputs)
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs.past_key_values.layers[0].keys, expected.past_key_values.layers[0].keys, rtol=0, atol=1e-6)


def test_other_exports_are_left_alone():
    program = torch.export.export(torch.nn.Linear(4, 4), (torch.ones(2, 4),))
    calls = []
    _take_the_place(lambda *args, **kwargs: calls.append((args, kwargs)))(program, args=(), optimize=False)
    assert calls == [((program,), {"args": (), "optimize": False})]


def test_what_an_export_cannot_take_is_refused(model):
    with pytest.raises(OptionError, match="the model's own cache"):
        Quantizer("w8a16(cache=8)")
    with pytest.raises(OptionError, match=r"fixed sizes, \[2, 3\]"):
        DynamoExporter().export(model, sample(model), DynamoConfig(quantizer=Quantizer("w8a16")))
    heads = "canonicalize, prune(share=0.5, what=['heads'], criterion='magnitude', compensate=False)"
    with pytest.raises(OptionError, match="changes what the graph takes in"):
        DynamoExporter().export(model, sample(model), DynamoConfig(dynamic=True, quantizer=Quantizer(heads, CALIBRATION)))
    with pytest.raises(ValueError, match="not executorch ones"):
        Quantizer("w8a16").validate_environment("executorch")


def test_inputs_that_are_no_tensors_are_refused():
    traced = torch.export.export(torch.nn.Linear(4, 4), (torch.ones(2, 4),)).module()
    with pytest.raises(DataError, match=r"\['scale'\] are not tensors"):
        Quantizer("w8a16").quantize(traced, {"input": torch.ones(2, 4), "scale": 2.0}, "dynamo")


def test_calibration_is_what_the_export_was_traced_with(model):
    quantizer = Quantizer(PIPELINE, [{"input_ids": tokens(2, 8), "use_cache": True}])
    copy = quantizer.with_calibration(CALIBRATION)
    assert copy.calibration_dataset is CALIBRATION
    assert copy.reports is quantizer.reports
    assert SimpleNamespace(**Quantizer("w8a16", [tokens(2, 8)]).calibration_dataset[0]).input_ids.shape == (2, 8)
