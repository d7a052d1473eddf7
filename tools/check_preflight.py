"""What the pre-flight estimates against what the compile then takes, for random Llamas of several depths and the bench model.

python -m tools.check_preflight --bench /work/shared/bench --out tools/results/preflight.md
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HEAD = """# The pre-flight against the compile

Processor seconds on one thread and peaks of resident memory, estimated from parts of one and two layers with 2 and 4 of 8 batches, against
the whole; each compile is a process of its own, `w4a16` by GPTQ. Ratios are estimated over measured. Sizes are of the backend's files.

| model | layers | backend | round_weights, s: estimated | measured | ratio | lowering: ratio | all: ratio \
| peak, MB: estimated | measured | ratio | size, MB: estimated | measured | ratio |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def one(layers: int, hidden: int, backend: str, bench: Path | None) -> dict[str, Any]:
    """Compile one model with a pre-flight; sums over its steps."""
    time.perf_counter = time.process_time  # before anything of ours is imported: other work on the machine is not to count
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    import passes  # noqa: PLC0415
    from ir.capture import capture  # noqa: PLC0415
    from passes.preflight.resources import size_of  # noqa: PLC0415

    torch.manual_seed(0)
    torch.set_num_threads(1)
    if bench is not None:
        from tools.bench_model import load  # noqa: PLC0415

        loaded = load(bench)
        model: Any = loaded.model
        batches = loaded.calibration[:8]
    else:
        config = transformers.LlamaConfig(
            vocab_size=1024, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 64, max_position_embeddings=512,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).eval()
        batches = [torch.randint(1024, (8, 128)) for _ in range(8)]
    gm = capture(model)
    found = passes.estimate(gm, "w4a16", batches, backend)
    assert found is not None
    compiled = passes.compile(gm, "w4a16", batches, backend, preflight=True)
    rows = compiled.report().tables["estimates"]
    with tempfile.TemporaryDirectory() as folder:
        compiled.executable.save(Path(folder))
        written = size_of(Path(folder))
    return {"layers": found.layers, "rows": rows, "size": [found.written / 1e6, written / 1e6]}


def line(name: str, backend: str, found: dict[str, Any]) -> str:
    """A row of the table."""
    rows = found["rows"]

    def pair(row: dict[str, Any]) -> tuple[float, float]:
        return row["seconds estimated"], row["seconds"]

    rounding = pair(next(row for row in rows if row["step"].startswith("round_weights")))
    lowering = pair(next(row for row in rows if row["step"].startswith("lower")))
    whole = (sum(row["seconds estimated"] for row in rows), sum(row["seconds"] for row in rows))
    peaks = (max(row["peak MB estimated"] for row in rows), max(row["peak MB"] for row in rows))
    size = found["size"]
    cells = [name, str(found["layers"]), backend, *(f"{value:.2f}" for value in (*rounding, rounding[0] / rounding[1]))]
    cells += [f"{lowering[0] / max(lowering[1], 1e-9):.2f}", f"{whole[0] / whole[1]:.2f}"]
    cells += [
        f"{peaks[0]:.0f}",
        f"{peaks[1]:.0f}",
        f"{peaks[0] / peaks[1]:.2f}",
        f"{size[0]:.3f}",
        f"{size[1]:.3f}",
        f"{size[0] / size[1]:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--depths", type=int, nargs="*", default=[4, 8, 16, 24])
    parser.add_argument("--backends", nargs="*", default=["reference", "onnx"])
    parser.add_argument("--bench", type=Path, help="the folder of the bench model")
    parser.add_argument("--layers", type=int, help="compile one model of this depth in this process")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.layers is not None:
        print(json.dumps(one(options.layers, options.hidden, options.backends[0], options.bench)))
        return
    cases: list[tuple[str, list[str]]] = [("bench", ["--layers", "0", "--bench", str(options.bench)])] if options.bench else []
    cases += [(f"Llama, {options.hidden}", ["--layers", str(depth), "--hidden", str(options.hidden)]) for depth in options.depths]
    text = HEAD
    for backend in options.backends:
        for name, arguments in cases:
            command = [sys.executable, "-m", "tools.check_preflight", *arguments, "--backends", backend]
            run = subprocess.run(command, check=True, capture_output=True, text=True)
            text += line(name, backend, json.loads(run.stdout.splitlines()[-1])) + "\n"
            print(text.splitlines()[-1], flush=True)
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
