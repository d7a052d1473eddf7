"""Key/value caches in few bits: perplexity, bytes a token, and decode with a long past in ONNX Runtime against the cache in float32.

    python -m tools.bench_cache ../shared/bench --out tools/results/cache.md

Weights and activations stay in full precision. Attention reads what the cache holds, in prefill as in decode, so perplexity over whole
windows sees all of the error. Decode is timed in interleaved rounds; the ratio is the median of ratios within a round.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import onnxruntime as ort

import passes
from backends.onnx_qdq import OnnxQdq
from tools import bench_model
from tools.bench_onnx import measure, ratio

PAST = 2048
FLOAT = "float32"
CACHES = {
    FLOAT: "canonicalize",
    "8 bits": "canonicalize, quantize_cache",
    "8 bits, static": "canonicalize, quantize_cache(dynamic=False)",
    "keys 8, values 4 bits": "canonicalize, quantize_cache(values=4)",
    "4 bits": "canonicalize, quantize_cache(bits=4)",
    "4 bits, keys static by channel": "canonicalize, quantize_cache(bits=4, channels=True)",
    "4 bits after R3": "canonicalize, rotate_channels(where=['R3']), quantize_cache(bits=4)",
    "2 bits, groups of 16": "canonicalize, quantize_cache(bits=2, group=16)",
    "2 bits, groups of 16, after R3": "canonicalize, rotate_channels(where=['R3']), quantize_cache(bits=2, group=16)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    bench = bench_model.load(options.bench)
    quality: dict[str, list[float]] = {}
    held: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        sessions: dict[str, ort.InferenceSession] = {}
        for name, pipeline in CACHES.items():
            reference = passes.compile(bench.model, pipeline, bench.calibration)
            quality[name], held[name] = bench.perplexities(reference), reference.signature.token_bytes
            out = Path(folder) / str(len(sessions))
            passes.compile(bench.model, pipeline, bench.calibration, OnnxQdq(threads=1)).save(out)
            sessions[name] = OnnxQdq(threads=1).load(out).session
            print(name, quality[name], held[name], flush=True)
        times = measure(sessions, 1, PAST, options.rounds)
    lines = [
        "# Key/value caches in few bits\n",
        f"`python -m tools.bench_cache {options.bench}`; onnxruntime {ort.__version__}, one thread, batch 1, {PAST} past tokens.\n",
        "| cache | WikiText-2 | news | bytes a token | decode, ms | time, × float32 |",
        "|---|---|---|---|---|---|",
    ]
    for name, (wiki, news) in quality.items():
        slower = ratio(times[name], times[FLOAT])
        lines.append(f"| {name} | {wiki:.2f} | {news:.2f} | {held[name]} | {statistics.median(times[name]):.2f} | {slower:.2f} |")
    print("\n".join(lines))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
