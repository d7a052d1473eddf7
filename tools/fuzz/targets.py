"""What is fuzzed: for each target the cases to start from, and how a case is read."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import torch
import transformers
from onnx import helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

import passes
from ir.encoding import Encoding
from ir.errors import FxpressError
from ir.signature import Port, Signature
from ir.sites import Mark
from ir.statistics import Statistics
from passes import page
from passes.budget import costs
from passes.budget.latency import LatencyTable
from passes.commands.loading import load_model, load_tokenizer
from passes.recipe import Recipe
from tools.fuzz.mutate import Case, mutated

TEXT = "text"
LARGEST = 1 << 16  # bytes of a case that others are made of
OTHERS = 256  # of which so many are kept


@dataclass(frozen=True)
class Target:
    """Cases to start from, and how one that lies in a folder is read."""

    corpus: Callable[[], list[Case]]
    read: Callable[[Path], object]


def check(target: Target, case: Case, folder: Path) -> bool:
    """Write a case into an empty folder and read it; returns whether it was taken. Anything but an `FxpressError` is a find."""
    for name, content in case.items():
        (folder / name).write_bytes(content)
    try:
        target.read(folder)
    except FxpressError:
        return False
    return True


def _texts(*texts: str) -> Callable[[], list[Case]]:
    return lambda: [{TEXT: text.encode()} for text in texts]


def _text(folder: Path) -> str:
    return (folder / TEXT).read_bytes().decode("utf-8", "replace") if (folder / TEXT).exists() else ""


def _pipeline(folder: Path) -> None:
    pipeline = passes.Pipeline.parse(_text(folder))
    assert passes.Pipeline.parse(str(pipeline)) == pipeline


def _encoding(folder: Path) -> None:
    mark = Mark.parse(_text(folder))
    assert Mark.parse(str(mark)) == mark and Encoding.parse(str(mark.weight)) == mark.weight


def _files(folder: Path) -> Case:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def _saved(write: Callable[[Path], object]) -> Callable[[], list[Case]]:
    """The files that `write` makes in a folder, once."""

    @cache
    def made() -> list[Case]:
        with TemporaryDirectory() as scratch:
            write(Path(scratch) / "case")
            return [_files(Path(scratch) / "case")]

    return made


@cache
def _compiled(backend: str = "reference") -> passes.Compiled:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)).eval()
    marked = "annotate(scheme='W4A16', group=32, ignore=('2',)), annotate(scheme='W3A8', targets=('2',))"
    return passes.compile(model, f"{marked}, round_weights(method='nearest'), quantize", backend=backend, args=(torch.randn(2, 32),))


def _only(*names: str) -> Callable[[], list[Case]]:
    """Some files of a small compiled model."""
    whole = _saved(lambda folder: _compiled().save(folder))
    return lambda: [{name: content for name, content in case.items() if name in names} for case in whole()]


def _packed(folder: Path) -> None:
    """Load packed weights; whether all of them go together shows when the graph is saved again."""
    passes.load(folder).save(folder / "again")


def write_onnx(folder: Path) -> None:
    folder.mkdir()
    port = Port("x", "float32", (None, 4))
    signature = Signature((port,), (Port("y", "float32", (None, 4)),), positional=("x",)).to_json()
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    (folder / "model.onnx.data").write_bytes(weight.raw_data)
    onnx.external_data_helper.set_external_data(weight, "model.onnx.data", 0, len(weight.raw_data))
    weight.ClearField("raw_data")
    sides = [[helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 4])] for name in "xy"]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["z"]), helper.make_node("Relu", ["z"], ["y"])]
    graph = helper.make_graph(nodes, "g", *sides, [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    stated = {"signature": signature, "session": {"session.qdq_matmulnbits_accuracy_level": "4"}, "report": {}, "genai": None}
    helper.set_model_props(model, {"fxpress": json.dumps(stated)})
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (folder / "fxpress.json").write_text(json.dumps({"format": 1, "backend": "onnx", "signature": signature}))


def write_llama(folder: Path) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder)
    index = {"metadata": {"total_size": 1}, "weight_map": {"lm_head.weight": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _tokenizer(folder: Path) -> None:
    plain = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="?").save_pretrained(folder)


def _statistics(folder: Path) -> None:
    folder.mkdir()
    found = Statistics()
    found.observe("model.layers.0.up", torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), gram=True)
    found.save(folder / "kept.safetensors")


def _read_statistics(folder: Path) -> None:
    for kept in Statistics.load(folder / "kept.safetensors").values():
        if kept.sketch is not None and kept.channels:
            kept.sketch.quantile(0.5)
            kept.merge(kept)


def _page(folder: Path) -> None:
    assert "<script" not in page.write_report(folder).read_text(encoding="utf-8")


KIND = (4, 16, "", "i4[1,16]")
ROWS = [["a", "i4[1,16]", 0.5], ["b", "i8[1,-1]", 0.25]]
TABLES = {
    "costs": {"format": costs.FORMAT, "made": {"seed": 0}, "costs": ROWS},
    "latencies": {"format": "fxpress-latency-1", "backend": "onnx", "milliseconds": [[*KIND, 0.5]]},
}
RECIPE = """pipeline: untie, annotate(ignore=('a', 'b'))
backend: onnx
seed: 3
versions:
  torch: '2.13'
weights: '01'
calibration: none
"""
PIPELINES = (
    "untie, fold_norm, w4a16(group=32)",
    "annotate(scheme='W4A16', ignore=('lm_head', 're:.*gate'))",
    "mixed(bits=2.5, widths=(2, 3))",
)

TARGETS: dict[str, Target] = {
    "pipeline": Target(
        _texts(*PIPELINES),
        _pipeline,
    ),
    "encoding": Target(_texts("i4[1,128]", "u8[1,-1]dynamic*0.9", "f8e4m3[-1]", "i4[1,32]/i8[1,-1]dynamic"), _encoding),
    "recipe": Target(lambda: [{"recipe.yaml": RECIPE.encode()}], lambda folder: Recipe.read(folder / "recipe.yaml")),
    "graph": Target(_only("fxpress.json", "graph.json", "weights.safetensors"), passes.load),
    "packed": Target(_saved(lambda folder: _compiled("triton").save(folder)), _packed),
    "onnx": Target(_saved(write_onnx), passes.load),
    "checkpoint": Target(_saved(write_llama), lambda folder: load_model(str(folder))),
    "tokenizer": Target(_saved(_tokenizer), load_tokenizer),
    "statistics": Target(_saved(_statistics), _read_statistics),
    "costs": Target(
        lambda: [{"costs.json": json.dumps(TABLES["costs"]).encode()}], lambda folder: costs.load(folder / "costs.json", {"seed": 0})
    ),
    "latencies": Target(
        lambda: [{"times.json": json.dumps(TABLES["latencies"]).encode()}],
        lambda folder: LatencyTable.load(folder / "times.json", "onnx", [KIND]),
    ),
    "report": Target(_only("report.json"), _page),
}


def cases(target: Target, count: int, seed: int) -> Iterator[Case]:
    """`count` cases made of the corpus and of one another."""
    draw, corpus = random.Random(seed), target.corpus()
    others = list(corpus)
    for _ in range(count):
        case = mutated(draw.choice(others if draw.random() < 0.2 else corpus), draw)
        if draw.random() < 0.1 and sum(map(len, case.values())) < LARGEST:
            others.append(case)
            del others[:-OTHERS]
        yield case
