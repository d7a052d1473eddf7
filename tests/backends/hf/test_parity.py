"""One compile, two folders: the integers of the ONNX model and those of the checkpoint are the same."""

import json

import numpy as np
import onnx
import torch
import transformers
from onnx.numpy_helper import to_array
from safetensors.torch import load_file

import passes
from backends.hf.quantized import Rounded
from backends.hf.schema import Quantization
from backends.onnx_qdq import OnnxQdq
from ir.ops import DEQUANTIZE
from passes.probe import relative_error
from tests.families import load
from tests.passes.samples import tokens


def of_onnx(file):
    """The dequantized weights `[N, K]` of an ONNX model, by name."""
    graph = onnx.load(file).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in stored:
            options = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
            codes, scale, *zero_point = (to_array(stored[name]).astype(np.float32) for name in node.input)
            axis, block = options["axis"], options.get("block_size", 0)
            wide = [np.repeat(x, block, axis)[: codes.shape[0]] if block else x for x in (scale, *zero_point)]
            found[node.input[0]] = ((codes - (wide[1] if zero_point else 0)) * wide[0]).T
    return found


def of_checkpoint(folder, linears):
    """The dequantized weights of a checkpoint's linears, by name."""
    state = load_file(folder / "model.safetensors")
    stated = Quantization.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    found = {}
    for name, scheme in stated.schemes(linears).items():
        linear = Rounded.read(scheme, {key.rpartition(".")[2]: tensor for key, tensor in state.items() if key.startswith(f"{name}.")})
        weight = DEQUANTIZE(linear.codes, linear.scale, linear.zero_point, str(scheme.weights.encoding), torch.float32)
        found[f"{name}.weight"] = weight.numpy()
    return found


def test_both_folders_hold_the_same_weights(tmp_path):
    pipeline = (
        "canonicalize, annotate, annotate(scheme='W4A16', group=32, symmetric=False, targets=['gate_proj', 'up_proj']), "
        "annotate(scheme='W3A16', symmetric=False, targets=['down_proj']), round_weights(method='nearest'), quantize"
    )
    made = passes.compile(load("llama").captured, pipeline, backend=OnnxQdq(accuracy_level=1))
    other = made.lowered("hf")
    assert (made.backend, other.backend) == ("onnx", "hf")
    linears = [name.removesuffix(".weight") for name, _ in load("llama").model.named_parameters() if "proj" in name]
    first, second = of_onnx(made.save(tmp_path / "onnx") / "model.onnx"), of_checkpoint(other.save(tmp_path / "hf"), linears)
    assert first.keys() == second.keys() == {f"{name}.weight" for name in linears}
    assert all(np.array_equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        logits = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(tokens(2, 7)).logits
    assert relative_error((logits,), (passes.load(tmp_path / "onnx")(tokens(2, 7)).logits,)) < 1e-3
