"""Compile time and peak memory against the number of layers, each compile in a process of its own.

python tools/bench_scaling.py --out tools/results/scaling.md
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

DEPTHS = (2, 4, 8, 16)


def one(layers: int, hidden: int) -> None:
    """Compile one model to W4A16 with GPTQ and print the seconds of each step and the peak memory."""
    import tempfile  # noqa: PLC0415 (each compile is a process of its own; the parent needs none of this)

    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    import passes  # noqa: PLC0415
    from ir.capture import capture  # noqa: PLC0415

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64, max_position_embeddings=512,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    size = sum(p.nbytes for p in model.parameters())
    calibration = [torch.randint(1024, (4, 128)) for _ in range(4)]
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    marks = [time.process_time()]
    gm = capture(model)
    marks.append(time.process_time())
    reference = passes.compile(gm, "w4a16", calibration)
    marks.append(time.process_time())
    del reference
    gm = capture(gm)
    with tempfile.TemporaryDirectory() as folder:
        passes.compile(gm, "w4a16(rounding='nearest')", backend="onnx").save(Path(folder) / "out")
    marks.append(time.process_time())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = [b - a for a, b in itertools.pairwise(marks)]
    print(json.dumps({"layers": layers, "model": size, "before": start, "peak": peak, "seconds": seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, help="compile one model of this depth in this process")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.layers:
        one(options.layers, options.hidden)
        return
    lines = [
        "| layers | model, MB | capture, s | GPTQ, s | to ONNX and saved, s | peak, MB | less start, MB | per layer, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for layers in DEPTHS:
        command = [sys.executable, __file__, "--layers", str(layers), "--hidden", str(options.hidden)]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        extra = (row["peak"] - row["before"]) / 1e6
        seconds = " | ".join(f"{value:.1f}" for value in row["seconds"])
        lines.append(f"| {layers} | {row['model'] / 1e6:.0f} | {seconds} | {row['peak'] / 1e6:.0f} | {extra:.0f} | {extra / layers:.0f} |")
        print(lines[-1], flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        head = "# Compile time and memory against depth\n\nProcessor seconds on one thread; 2048 calibration tokens.\n\n"
        options.out.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
