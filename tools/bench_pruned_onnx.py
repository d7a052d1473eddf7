"""Pruned models in ONNX Runtime: size, prefill and decode with half of the MLP channels, beside the same schemes unpruned, in one run.

    python -m tools.bench_pruned_onnx --out tools/results/pruned_onnx.md

The model is a randomly initialised Llama. Rounds are interleaved, variant after variant; figures are medians over rounds, ratios medians of
ratios within a round, with the quartiles of those as the noise.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import onnx
import onnxruntime as ort
import torch
from onnxruntime.transformers.float16 import convert_float_to_float16

import passes
from backends.onnx_qdq import OnnxQdq
from ir import edit
from ir.sites import chosen
from tools.bench_onnx import PAST, PREFILL, arguments, build, ratio, timed

SCHEMES = {"fp32": "", "FP16": "", "W4A16": "w4a16(group=64, symmetric=True, rounding='nearest')", "W8A8": "w8a8"}
PRUNE = "prune(share=0.5, what=['mlp'], multiple=64, criterion='magnitude', compensate=False)"
Times = dict[str, list[float]]


def prepare(options: argparse.Namespace, folder: Path) -> tuple[dict[str, ort.InferenceSession], dict[str, int], float]:
    """A session and the bytes on disk for every variant, and the share of the linears' weights that pruning drops."""
    model, sessions, sizes = build(options), {}, {}
    calibration = [torch.randint(4096, (4, 64), generator=torch.Generator().manual_seed(1))]
    whole = passes.compile(model, "canonicalize").graph
    thin = passes.compile(model, f"canonicalize, {PRUNE}").graph
    assert whole is not None and thin is not None
    before, after = (sum(edit.value(layer.weight).numel() for layer in chosen(gm)) for gm in (whole, thin))
    for name, scheme in SCHEMES.items():
        for label, graph in ((name, whole), (f"{name}, pruned", thin)):
            out = folder / label.replace(" ", "_").replace(",", "")
            passes.compile(graph, scheme or "canonicalize", calibration, OnnxQdq(threads=options.threads)).save(out)
            if name == "FP16":
                halve(out / "model.onnx")
            sessions[label] = OnnxQdq(threads=options.threads).load(out).session
            sizes[label] = sum(file.stat().st_size for file in out.glob("model.onnx*"))
            print(f"prepared {label}, {sizes[label] / 1e6:.0f} MB", flush=True)
    return sessions, sizes, 1 - after / before


def halve(path: Path) -> None:
    """Let a model compute in float16, as ONNX Runtime's own tool has it; what goes in and comes out stays in float32."""
    made = convert_float_to_float16(onnx.load(path), keep_io_types=True)
    data = path.with_name(f"{path.name}.data")
    data.unlink()
    onnx.save(made, path, save_as_external_data=True, location=data.name)


def spread(numerator: list[float], denominator: list[float]) -> str:
    """The median ratio of rounds, and its quartiles."""
    low, _, high = statistics.quantiles([a / b for a, b in zip(numerator, denominator, strict=True)], n=4)
    return f"{ratio(numerator, denominator):.2f} ({low:.2f} to {high:.2f})"


def table(decode: Times, prefill: Times, sizes: dict[str, int]) -> str:
    lines = [
        f"| variant | MB | of FP16 | decode, past {PAST}, ms | × fp32 | × FP16 | × unpruned "
        f"| prefill {PREFILL}, ms | × fp32 | × FP16 | × unpruned |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in decode:
        cells = [name, f"{sizes[name] / 1e6:.0f}", f"{sizes[name] / sizes['FP16']:.2f}"]
        for times in (decode, prefill):
            twin = name.removesuffix(", pruned")
            cells += [f"{statistics.median(times[name]):.2f}", *(f"{ratio(times[one], times[name]):.2f}" for one in ("fp32", "FP16"))]
            cells.append(spread(times[twin], times[name]) if twin != name else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    options = arguments(__doc__, hidden=1024, layers=8).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sessions, sizes, gone = prepare(options, Path(folder))
        decode, prefill = timed(sessions, options.rounds)
    text = (
        f"# Pruned models in ONNX Runtime\n\n`python -m tools.bench_pruned_onnx`: Llama, {options.layers} layers, hidden {options.hidden}, "
        f"intermediate {4 * options.hidden}, random weights; half of the MLP channels dropped, {gone:.1%} of the linears' weights. "
        f"{options.threads} thread(s), onnxruntime {ort.__version__}. "
        f"Medians of {3 * options.rounds} (decode) and {options.rounds} (prefill) interleaved rounds; a ratio above 1 means faster, in "
        f"parentheses its quartiles over rounds. Head and embeddings are not quantized.\n\n{table(decode, prefill, sizes)}\n"
    )
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
