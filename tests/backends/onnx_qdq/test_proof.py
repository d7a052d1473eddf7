import re

import onnx_ir as onir
import pytest

import passes
from backends.onnx_qdq import OnnxQdq, lower
from ir.errors import BackendError, OptionError
from tests.families import load
from tests.passes.samples import CALIBRATION

W4 = "canonicalize, annotate(scheme='W4A16', group=32{}), round_weights(method='nearest'), quantize"
PIPELINES = {
    "llama": W4.format(""),
    "llama_tied": W4.format(", head=True, embeddings=True"),
    "gpt2": "w8a8(rounding='nearest')",
    "gemma3": "w8a8(rounding='nearest', cache=8)",
    "gpt_neox": W4.format(""),
    "bert": "w8a8(rounding='nearest')",
}
COSTLY = ("gpt_neox", "bert", "gemma3")


def compiled(family, whole):
    return passes.compile(load(family).captured, PIPELINES[family], calibration=CALIBRATION, backend=OnnxQdq(whole=whole))


@pytest.mark.parametrize("family", [pytest.param(name, marks=pytest.mark.thorough if name in COSTLY else ()) for name in PIPELINES])
def test_blocks_agree_where_the_whole_does(family, tmp_path):
    apart, together = compiled(family, "1KB"), compiled(family, "1GB")
    found, whole = apart.executable.report(), together.executable.report()
    assert "blocks" not in whole
    blocks = found["blocks"]
    assert len(blocks) >= 4 and len({block["block"] for block in blocks}) == len(blocks)
    assert found["probe_difference_exact"] == max(block["probe_difference_exact"] for block in blocks)
    promised = {site["runs"] for site in found["sites"]}
    assert {operator: found["operators"][operator] for operator in promised} == {name: whole["operators"][name] for name in promised}
    assert any(f"in {len(blocks)} blocks" in note for note in found["notes"])
    folders = [made.save(tmp_path / name) for made, name in ((apart, "apart"), (together, "together"))]
    one, other = [(folder / "model.onnx.data").read_bytes() for folder in folders]
    assert one == other
    models = [onir.load(folder / "model.onnx") for folder in folders]
    for model in models:
        model.metadata_props.clear()
    assert onir.serde.serialize_model(models[0]) == onir.serde.serialize_model(models[1])


def test_no_session_holds_a_large_model_until_it_is_called(tmp_path):
    made = compiled("llama", "1KB")
    assert made.executable._session is None
    logits = made(CALIBRATION[0]["input_ids"][:2, :6]).logits
    assert made.executable._session is not None
    folder = made.save(tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith("model")) == ["model.onnx", "model.onnx.data"]
    assert (passes.load(folder)(CALIBRATION[0]["input_ids"][:2, :6]).logits - logits).abs().max() == 0


@pytest.mark.parametrize("block", ["model.embed_tokens", "model.layers.1.self_attn", "lm_head"])
def test_a_flipped_code_is_found_in_its_block(block, monkeypatch):
    write = lower.write

    def damaged(model, folder, store):
        path = write(model, folder, store)
        values = [value for value in onir.load(path).graph.initializers.values() if re.match(block, value.name)]
        stored = next(value.const_value for value in values if isinstance(value.const_value, onir.ExternalTensor))
        rows = stored.shape[0] if block == "model.embed_tokens" else 1  # which of its rows are read is the probe's choice
        data = bytearray(path.with_name("model.onnx.data").read_bytes())
        for row in range(rows):
            data[stored.offset + row * stored.length // rows + 3] ^= 0x88
        path.with_name("model.onnx.data").write_bytes(data)
        return path

    monkeypatch.setattr(lower, "write", damaged)
    with pytest.raises(BackendError, match=f"after {block}, more than"):
        compiled("llama" if block != "model.embed_tokens" else "llama_tied", "1KB")


@pytest.mark.parametrize("size", ["big", "1", "1.5GB", "-1GB"])
def test_sizes_are_checked_at_once(size):
    with pytest.raises(OptionError, match="is no size"):
        OnnxQdq(whole=size)
