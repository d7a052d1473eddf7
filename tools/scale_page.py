"""The page of `bench_scale`: a table, a plot, and the rows behind them."""

import json
from pathlib import Path
from typing import Any

from tools.scale_checkpoint import Shape

GB = 1e9


def write_page(path: Path, rows: list[dict[str, Any]], shape: Shape, tokens: int) -> None:
    """Write a page, and beside it a plot and JSON. Rows of other backends and pipelines that the JSON has already stay."""
    data = path.with_suffix(".json")
    new = {_key(row) for row in rows}
    known = json.loads(data.read_text(encoding="utf-8")) if data.is_file() else []
    merged = sorted([*(row for row in known if _key(row) not in new), *rows], key=_key)
    data.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
    block = 2 * sum(a * b for a, b in ((s[0], s[1]) for s in shape.layer(0).values() if len(s) == 2))
    lines = [
        "# Models larger than memory",
        "",
        f"Llamas with random weights in bfloat16, hidden {shape.hidden}, intermediate {shape.intermediate}, vocabulary {shape.vocabulary}: "
        f"a layer takes {block / 1e6:.0f} MB. Each is compiled from a sharded folder, with {tokens} calibration tokens where any "
        "are needed, and saved, in a process of its own by `tools/bench_scale.py`. Memory is read every 50 ms: the peak of all resident "
        "pages, and of those that are of no file. Imports are counted.",
        "",
        "| backend | pipeline | layers | checkpoint, GB | peak, GB | of no file, GB | seconds | a layer, s | written, GB | threads |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in merged:
        sizes = f"{r['bytes'] / GB:.2f} | {r['VmRSS'] / GB:.2f} | {r['RssAnon'] / GB:.2f}"
        times = f"{r['wall']:.0f} | {r['wall'] / r['depth']:.1f} | {r['written'] / GB:.2f} | {r['threads']}"
        lines.append(f"| {r['backend']} | `{r['pipeline']}` | {r['depth']} | {sizes} | {times} |")
    deepest = max(merged, key=lambda row: row["depth"])
    lines += ["", f"Where the peak of the deepest one ({deepest['backend']}) comes from:", ""]
    lines += ["| stage | from, s | peak, GB | of no file, GB |", "|---|---|---|---|"]
    for stage in deepest["stages"]:
        name = stage["stage"].replace("|", "/")
        lines.append(f"| {name[:60]} | {stage['seconds']:.0f} | {stage.get('VmRSS', 0) / GB:.2f} | {stage.get('RssAnon', 0) / GB:.2f} |")
    if _draw(path.with_suffix(".png"), merged):
        lines += ["", f"![Peak memory and time against depth]({path.with_suffix('.png').name})"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _key(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["backend"], row["pipeline"], row["depth"]


def _draw(path: Path, rows: list[dict[str, Any]]) -> bool:
    """Peak memory and seconds over depth, a line for each backend; whether it was drawn."""
    try:
        from matplotlib import pyplot  # noqa: PLC0415 (optional)
    except ImportError:
        return path.is_file()
    figure, (memory, seconds) = pyplot.subplots(1, 2, figsize=(11, 4))
    for name in dict.fromkeys(_key(row)[:2] for row in rows):
        own = [row for row in rows if _key(row)[:2] == name]
        depths = [row["depth"] for row in own]
        memory.plot(depths, [row["VmRSS"] / GB for row in own], marker="o", label=", ".join(name))
        seconds.plot(depths, [row["wall"] for row in own], marker="o", label=", ".join(name))
    memory.plot(
        sorted({r["depth"] for r in rows}), sorted({r["bytes"] / GB for r in rows}), linestyle=":", color="gray", label="checkpoint"
    )
    for axis, label in ((memory, "GB"), (seconds, "seconds")):
        axis.set(xlabel="layers", ylabel=label, ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
