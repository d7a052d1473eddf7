"""Memory, time and size of compiles of checkpoints larger than what they may take, against depth, each compile in a process of its own.

    python -m tools.bench_scale --gigabytes 6 --scratch /tmp/scale --out tools/results/scale.md

A Llama-shaped checkpoint with random weights is written shard by shard, a layer a shard; shallower ones share its files. Memory is read
from `/proc` every 50 ms while a compile runs: pages of files (RssFile) are what the system may take back, the others (RssAnon) not.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.scale_checkpoint import Shape, shallower, write_checkpoint
from tools.scale_page import write_page

EVERY = 0.05  # seconds between two looks at memory
STEP = 15  # seconds between two points of the curve
FIELDS = ("VmRSS", "RssAnon", "RssFile", "RssShmem")
SAMPLES, WINDOW, BATCH = 8, 128, 4


def one(folder: Path, out: Path, pipeline: str, backend: str, dtype: str) -> None:
    """Compile one checkpoint; stages are told on standard error, as lines that begin with `==`."""
    say("import")
    import torch  # noqa: PLC0415 (each compile is a process of its own; the parent needs none of this)

    import passes  # noqa: PLC0415
    from passes.commands.loading import load_model  # noqa: PLC0415
    from passes.progress import Progress  # noqa: PLC0415

    class Stages(Progress):
        def say(self, text: str) -> None:
            say(text)

    say("load")
    model = load_model(folder, dtype, scratch=out.parent)
    size = model.config.vocab_size
    windows = torch.randint(size, (SAMPLES, WINDOW), generator=torch.Generator().manual_seed(0))
    say("capture")
    compiled = passes.compile(model, pipeline, windows.split(BATCH), backend, progress=Stages(lines=True))
    say("save")
    compiled.save(out, overwrite=True)
    report = compiled.report()
    steps = {record.text: record.seconds for record in report.trace}
    print(json.dumps({"difference": report.difference, "bits": compiled.effective_bits, "steps": steps}))


def say(stage: str) -> None:
    """Tell the watching process what comes next."""
    print(f"== {stage.splitlines()[0]}", file=sys.stderr, flush=True)


def resident(pid: int) -> dict[str, int]:
    """Bytes of memory that a process has, by kind; nothing once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    found = dict(line.split(":", 1) for line in lines)
    return {name: int(found[name].split()[0]) * 1024 for name in FIELDS if name in found}


def watched(command: Sequence[str]) -> dict[str, Any]:
    """Run one compile, and look at its memory meanwhile: greatest values of all and of every stage, and what it printed."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stdout is not None
    stages: list[dict[str, Any]] = [{"stage": "start", "seconds": 0.0}]

    curve: list[tuple[int, int]] = []  # seconds, and the greatest resident size since the last one

    def look() -> None:
        while process.poll() is None:
            now = resident(process.pid)
            for name, value in now.items():
                stages[-1][name] = max(stages[-1].get(name, 0), value)
            at = int((time.perf_counter() - started) // STEP * STEP)
            if not curve or curve[-1][0] != at:
                curve.append((at, 0))
            curve[-1] = at, max(curve[-1][1], now.get("VmRSS", 0))
            time.sleep(EVERY)

    sampler = threading.Thread(target=look)
    sampler.start()
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("== "):
            stages.append({"stage": line[3:].strip(), "seconds": time.perf_counter() - started})
            peak = max((size for _, size in curve), default=0)
            print(f"    {stages[-1]['seconds']:7.1f} s  {peak / 1e9:.2f} GB so far  {stages[-1]['stage'][:90]}", flush=True)
    output = process.stdout.read()
    sampler.join()
    if process.wait():
        raise SystemExit("".join(said[-20:]))
    peaks = {name: max(stage.get(name, 0) for stage in stages) for name in FIELDS}
    return {"wall": time.perf_counter() - started, **peaks, "stages": stages, "curve": curve, **json.loads(output.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=6.0, help="of the deepest checkpoint's weights, in 16 bits")
    parser.add_argument("--depths", type=int, nargs="*", default=[4, 16, 32], help="of shallower ones")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--backends", nargs="*", default=["reference"])
    parser.add_argument("--pipeline", default="w4a16")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--scratch", type=Path, default=Path("build/scale"))
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there")
    parser.add_argument("--out", type=Path, help="page to write; its rows are kept beside, as JSON, and others added to them")
    parser.add_argument("--one", type=Path, help="compile this checkpoint in this process")
    options = parser.parse_args()
    if options.one:
        one(options.one, options.scratch, options.pipeline, options.backends[0], options.dtype)
        return
    shape = Shape(options.hidden, options.intermediate, options.vocabulary)
    deepest = shape.depth(options.gigabytes)
    source = options.scratch / f"checkpoint-{deepest}"
    if not source.is_dir():
        write_checkpoint(source, shape, deepest)
    rows = []
    for backend in options.backends:
        for depth in sorted({*(depth for depth in options.depths if depth < deepest), deepest}):
            folder = source if depth == deepest else shallower(source, options.scratch / f"checkpoint-{depth}", depth)
            out = options.scratch / "out"
            arguments = ["--scratch", out, "--pipeline", options.pipeline, "--backends", backend, "--dtype", options.dtype]
            print(f"{backend}, {depth} layers", flush=True)
            row = watched([sys.executable, "-m", "tools.bench_scale", "--one", str(folder), *map(str, arguments)])
            written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
            head = {
                "backend": backend,
                "pipeline": options.pipeline,
                "depth": depth,
                "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
            }
            rows.append({**head, "written": written, "threads": os.environ.get("OMP_NUM_THREADS", ""), **row})
            shutil.rmtree(out)
            if options.out:
                write_page(options.out, rows, shape, SAMPLES * WINDOW)
            print({key: value for key, value in rows[-1].items() if key not in {"stages", "curve"}}, flush=True)
    if not options.keep:
        shutil.rmtree(options.scratch)


if __name__ == "__main__":
    main()
