"""Decode and prefill in ONNX Runtime: W4A16 and W8A8 against fp32 and against ONNX Runtime's own quantizers, same model, same run.

    python tools/bench_onnx.py --out tools/results/onnx.md

The model is a randomly initialised Llama (two layers of hidden size 2048 by default). The peers start from the fp32 model file of the
same export. Rounds are interleaved, variant after variant, so that a machine that speeds up or slows down does so for all; figures are
medians over rounds, ratios are medians of ratios within a round.
"""

import argparse
import functools
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
import transformers
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

import passes
from backends.onnx_qdq import OnnxQdq

PREFILL, PAST = 128, 256
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8, "tensor(int8)": np.int8}  # of caches
PIPELINES = {
    "fp32": "canonicalize",
    "ours W4A16 g{group}": "w4a16(group={group}, symmetric=True, rounding='nearest')",
    "ours W4A16 g{group} asymmetric": "w4a16(group={group}, rounding='nearest')",
    "ours W8A16 g32": "w8a16",
    "ours W8A8 per token": "w8a8",
    "ours W8A8 static": "w8a8(dynamic=False)",
}
PEERS = {
    "ours W4A16 g{group}": "ORT MatMulNBitsQuantizer g{group}",
    "ours W4A16 g{group} asymmetric": "ORT MatMulNBitsQuantizer g{group} asymmetric",
    "ours W8A8 per token": "ORT quantize_dynamic, unsigned weights",
    "ours W8A8 static": "ORT quantize_dynamic, unsigned weights",
}


def build(options: argparse.Namespace) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=options.hidden, intermediate_size=4 * options.hidden, num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64, num_key_value_heads=max(options.hidden // 256, 1), max_position_embeddings=2048,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def feeds(session: ort.InferenceSession, length: int, past: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {}
    for port in session.get_inputs():
        if port.name == "input_ids":
            made[port.name] = rng.integers(0, 4096, (1, length))
        elif port.name == "attention_mask":
            made[port.name] = np.ones((1, past + length), np.int64)
        elif port.name == "position_ids":
            made[port.name] = np.arange(past, past + length)[None]
        else:
            made[port.name] = rng.uniform(0, 2, (1, port.shape[1], past, port.shape[3])).astype(TYPES[port.type])
    return made


def open_peer(path: Path, threads: int) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    return ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def prepare(options: argparse.Namespace, folder: Path) -> tuple[dict[str, ort.InferenceSession], dict[str, int]]:
    """A session and the bytes on disk for every variant."""
    model, sessions, sizes = build(options), {}, {}
    calibration = [torch.randint(4096, (4, 64), generator=torch.Generator().manual_seed(1))]
    for name, pipeline in PIPELINES.items():
        label, text = name.format(group=options.group), pipeline.format(group=options.group)
        out = folder / label.replace(" ", "_")
        passes.compile(model, text, calibration, OnnxQdq(threads=options.threads)).save(out)
        sessions[label] = OnnxQdq(threads=options.threads).load(out).session
        sizes[label] = sum(file.stat().st_size for file in out.glob("model.onnx*"))
        print(f"prepared {label}", flush=True)
    plain = folded(folder / "fp32" / "model.onnx")
    peers = {
        f"ORT MatMulNBitsQuantizer g{options.group}": functools.partial(nbits, symmetric=True),
        f"ORT MatMulNBitsQuantizer g{options.group} asymmetric": functools.partial(nbits, symmetric=False),
        "ORT quantize_dynamic, unsigned weights": functools.partial(dynamic, kind=QuantType.QUInt8),
        "ORT quantize_dynamic, signed weights": functools.partial(dynamic, kind=QuantType.QInt8),
    }
    for label, make in peers.items():
        out = folder / label.replace(" ", "_").replace(",", "") / "model.onnx"
        out.parent.mkdir()
        make(plain, out, options.group)
        sessions[label] = open_peer(out, options.threads)
        sizes[label] = sum(file.stat().st_size for file in out.parent.iterdir())
        print(f"prepared {label}", flush=True)
    return sessions, sizes


def folded(source: Path) -> Path:
    """The fp32 model with its transposes of weights folded, in which the peers find the weights."""
    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    settings.optimized_model_filepath = str(source.with_name("folded.onnx"))
    settings.add_session_config_entry("session.optimized_model_external_initializers_file_name", "folded.onnx.data")
    settings.log_severity_level = 3
    ort.InferenceSession(str(source), settings, providers=["CPUExecutionProvider"])
    return source.with_name("folded.onnx")


def nbits(source: Path, target: Path, group: int, symmetric: bool) -> None:
    quantizer = MatMulNBitsQuantizer(
        onnx.load(source), block_size=group, is_symmetric=symmetric, accuracy_level=4, nodes_to_exclude=head(source)
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), use_external_data_format=True)


def dynamic(source: Path, target: Path, group: int, kind: QuantType) -> None:
    quantize_dynamic(
        source, target, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=kind, use_external_data_format=True,
        nodes_to_exclude=head(source), extra_options={"MatMulConstBOnly": True},
    )  # fmt: skip


def head(path: Path) -> list[str]:
    """The product that makes the logits: our presets leave the head alone, so the peers do too."""
    graph = onnx.load(path, load_external_data=False).graph
    products = [node.name for node in graph.node if node.op_type in {"MatMul", "Gemm"}]
    return products[-1:]


def measure(sessions: dict[str, ort.InferenceSession], length: int, past: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every round, by variant; the variants take turns."""
    inputs = {name: feeds(session, length, past) for name, session in sessions.items()}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    order = list(sessions)
    draw = random.Random(0)
    for index in range(rounds + 1):
        draw.shuffle(order)  # what ran before leaves its mark on the caches
        for name in order:
            started = time.perf_counter()
            sessions[name].run(None, inputs[name])
            if index:  # the first round warms up
                times[name].append(1e3 * (time.perf_counter() - started))
    return times


def ratio(numerator: list[float], denominator: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def table(decode: dict[str, list[float]], prefill: dict[str, list[float]], sizes: dict[str, int], group: int) -> str:
    lines = [
        f"| variant | decode, past {PAST}, ms | × fp32 | × its peer | prefill {PREFILL}, ms | × fp32 | × its peer | MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    peers = {name.format(group=group): peer.format(group=group) for name, peer in PEERS.items()}
    signed = "ORT quantize_dynamic, signed weights"
    for name in decode:
        cells = [name]
        for times in (decode, prefill):
            peer = f"{ratio(times[peers[name]], times[name]):.2f}" if name in peers else ""
            peer += f" ({ratio(times[signed], times[name]):.2f})" if "W8A8" in name else ""
            cells += [f"{statistics.median(times[name]):.2f}", f"{ratio(times['fp32'], times[name]):.2f}", peer]
        lines.append("| " + " | ".join([*cells, f"{sizes[name] / 1e6:.0f}"]) + " |")
    return "\n".join(lines)


def arguments(doc: str | None, hidden: int, layers: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=hidden)
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    return parser


def timed(sessions: dict[str, ort.InferenceSession], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Milliseconds of decode and of prefill."""
    return measure(sessions, 1, PAST, 3 * rounds), measure(sessions, PREFILL, 0, rounds)


def main() -> None:
    parser = arguments(__doc__, hidden=2048, layers=2)
    parser.add_argument("--group", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sessions, sizes = prepare(options, Path(folder))
        decode, prefill = timed(sessions, options.rounds)
    processor = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), platform.processor())  # noqa: SIM115, PTH123
    text = (
        f"Llama, {options.layers} layers, hidden {options.hidden}, intermediate {4 * options.hidden}, {options.threads} thread(s), "
        f"{processor}, onnxruntime {ort.__version__}. Medians of {3 * options.rounds} (decode) and {options.rounds} (prefill) interleaved "
        f"rounds; a ratio above 1 means faster. "
        f"In parentheses: against signed 8-bit weights, whose kernel saturates on processors without VNNI: faster, but it can be wrong."
        f"\n\n{table(decode, prefill, sizes, options.group)}\n"
    )
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("# ONNX Runtime: decode and prefill\n\n" + text, encoding="utf-8")


if __name__ == "__main__":
    main()
