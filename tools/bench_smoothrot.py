"""The layer benchmark of quantile-robust SmoothRot (2606.09927), W4A4 on what gated MLPs hand to their down projections, and beyond it.

    python -m tools.bench_smoothrot ../shared/bench/llama-wt2 --plant 3,20 --out tools/results

Protocol: 256 samples of 128 tokens of the calibration text: 164 to learn from, 41 held out to choose and stop on, 51 for the errors shown.
Layers are ranked by E under SmoothRot (α = .5, q = 1) on the test part: the three worst and two in the middle of the rest are "selected".
Policies see all 21 k train tokens, gradients a batch of them a step; choices are made on 1024 held-out tokens, E on 6.5 k test tokens.
"""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from torch import Tensor
from torch.fx import GraphModule

from ir import edit, evaluate
from ir.capture import capture
from ir.sites import readers
from passes.data.calibration import flat_batches, token_windows
from passes.measure import perplexity
from tools.outliers import gated, inputs, plant, plant_tokens
from tools.scale_learning import RATES, Recipe
from tools.smoothrot_families import BASE, PARTIAL, PUBLISHED, Place, Quantized, choose, error, smoothrot
from tools.smoothrot_plots import draw

# Published for Llama-3.2-1B (selected layers; T3 all 16), relative to SmoothRot at max/7.
PAPER = {"N2": "−11.1 %", "N3": "−12.0 %", "T1": "−18.5 %", "T2": "−18.5 %", "T3": "−19.9 %"}


def places(gm: GraphModule, ids: Tensor) -> list[Place]:
    """Every product of two branches that linears read, with its tokens split in parts by sample."""
    nodes = gated(gm)
    seen = inputs(gm, nodes, ids)
    train, test = round(0.64 * len(ids)), round(0.8 * len(ids))
    found = []
    for node in nodes:
        read, x = readers(gm)[node], seen.pop(node)
        W = torch.cat([edit.attribute(gm, layer.weight).detach() for layer in read])
        parts = [part.flatten(0, 1) for part in (x[:train], x[train:test], x[test:])]
        held = parts[1][torch.randperm(len(parts[1]), generator=torch.Generator().manual_seed(0))[:1024]]
        found.append(Place(read[0].path, W, parts[0], held, parts[2]))
    return found


def measured(gm: GraphModule, quantized: Mapping[str, Quantized], ids: Tensor) -> float:
    """Perplexity of the graph with these places quantized, by path of the first reader, and all else as it is."""
    gm = edit.copied(gm)
    for read in list(readers(gm).values()):
        if read[0].path in quantized:
            start = 0
            for layer in read:
                end = start + edit.value(layer.weight).shape[0]
                layer.node.target = replacement(quantized[read[0].path], start, end)
                start = end
    logits = [port.name for port in gm.meta["signature"].outputs].index("logits")

    def model(input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=evaluate.run(gm, flat_batches(gm, [input_ids])[0])[logits])

    return perplexity(model, ids, 10)


def replacement(quantized: Quantized, start: int, end: int):
    """A linear's call with the rows `start` to `end` of a quantized weight."""
    return lambda x, _, bias=None: quantized(x.flatten(0, -2))[:, start:end].reshape(*x.shape[:-1], -1) + (0 if bias is None else bias)


def percent(value: float, base: float) -> str:
    return f"{100 * (value / base - 1):+.1f} %"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--name", default="plain", help="of this run, in the names of its files")
    parser.add_argument("--text", type=Path, help="calibration text; calibration.txt beside the model if not given")
    parser.add_argument("--test-text", type=Path, help="for perplexity; wikitext2-test.txt beside the model if not given")
    parser.add_argument("--windows", type=int, default=100, help="of 256 tokens, for perplexity")
    parser.add_argument("--samples", type=int, default=256, help="of 128 tokens")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=256, help="tokens of one step")
    parser.add_argument("--rates", type=int, default=5, help="learning rates tried")
    parser.add_argument("--plant", help="LOW,HIGH: plant outliers with factors between these first")
    parser.add_argument("--share", type=float, default=0.01)
    parser.add_argument("--channels", type=int)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--layers", type=int, nargs="*")
    parser.add_argument("--massive", help="SHARE,SIZE: plant a kind of token that is so massive first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.text = options.text or options.model.parent / "calibration.txt"
    options.test_text = options.test_text or options.model.parent / "wikitext2-test.txt"
    return options


def prepared(options: argparse.Namespace) -> tuple[GraphModule, list[Place], Tensor, str]:
    """The graph, its places, the test windows, and a title."""
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    ids, tests = (
        token_windows(text.read_text(encoding="utf-8", errors="replace"), tokenizer, window, count, seed)
        for text, window, count, seed in (
            (options.text, 128, options.samples, options.seed),
            (options.test_text, 256, options.windows, None),
        )
    )
    title = f"{options.model.name} as it is"
    if options.plant:
        low, high = map(float, options.plant.split(","))
        given = {"channels": options.channels, "tokens": options.tokens, "layers": options.layers}
        plant(model, ids[:32], options.share, low, high, seed=options.seed, **given)
        words = [f"{name} {value}" for name, value in given.items() if value not in (None, 1)]
        words += [] if options.channels else [f"share {options.share:g}"]
        title = f"{options.model.name} with planted outliers: factors {low:g} to {high:g}, {', '.join(words)}"
    if options.massive:
        share, size = map(float, options.massive.split(","))
        layers = options.layers or [1]
        plant_tokens(model, ids[:64], share, size, layers, options.seed)
        title = f"{options.model.name} with massive tokens: {size:g} at about {100 * share:g} % of tokens in layers {layers}"
    gm = capture(model)
    return gm, places(gm, ids), tests, title


def table(errors: Mapping[str, list[float]], chosen: list[int], perplexities: Mapping[str, float]) -> list[str]:
    """Families by mean error, relative to SmoothRot by this library's scales and as published, beside the paper's figures."""

    def mean(name: str, of: list[int]) -> float:
        return sum(errors[name][i] for i in of) / len(of)

    everywhere = list(range(len(errors[BASE])))
    lines = [
        "| family | E, selected | to SmoothRot | to that at max/7 | the paper | E, all layers | to SmoothRot | at max/7 | perplexity |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in errors:
        cells = [name, f"{mean(name, chosen):.1f}", *(percent(mean(name, chosen), mean(base, chosen)) for base in (BASE, PUBLISHED))]
        cells.append(PAPER.get(name, ""))
        if name in PARTIAL:
            cells += ["", "", "", ""]
        else:
            of_all = (percent(mean(name, everywhere), mean(base, everywhere)) for base in (BASE, PUBLISHED))
            cells += [f"{mean(name, everywhere):.1f}", *of_all, f"{perplexities[name]:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    options, started = arguments(), time.process_time()
    torch.set_num_threads(options.threads)
    gm, found, tests, title = prepared(options)
    base = [error(at, smoothrot(at)) for at in found]
    ranked = sorted(range(len(found)), key=lambda i: -base[i])
    middle = min(3 + max(0, len(ranked) - 5) // 2, len(ranked) - 2)
    chosen = sorted({*ranked[:3], *ranked[middle : middle + 2]})
    print(f"{title}; selected: {[found[i].path for i in chosen]}; {time.process_time() - started:.0f} s of one core", flush=True)
    recipe = Recipe(steps=options.steps, batch=options.batch, every=10, seed=options.seed)
    choice = choose(found, [found[i] for i in chosen], recipe, RATES[:: max(1, -(-len(RATES) // options.rates))])
    print(*choice.notes, f"{time.process_time() - started:.0f} s of one core", sep="\n", flush=True)

    errors: dict[str, list[float]] = {}
    perplexities: dict[str, float] = {}
    for name, family in choice.families.items():
        quantized = {i: family(found[i]) for i in (chosen if name in PARTIAL else range(len(found)))}
        errors[name] = [error(found[i], quantized[i]) if i in quantized else float("nan") for i in range(len(found))]
        if name not in PARTIAL:
            perplexities[name] = measured(gm, {found[i].path: each for i, each in quantized.items()}, tests)
        print(name, *(f"{each:.1f}" for each in errors[name]), f"{perplexities.get(name, 0):.2f}", flush=True)

    wins = sum(a < b for a, b in zip(errors["rotation only"], errors[BASE], strict=True))
    lines = [
        f"## {title}",
        "",
        f"Selected: {', '.join(found[i].path for i in chosen)}. Rotation alone beats SmoothRot on {wins} of {len(found)} layers. "
        f"Perplexity of the unquantized model: {measured(gm, {}, tests):.2f}. {'; '.join(choice.notes)}. "
        f"{options.steps} steps of {options.batch} tokens, seed {options.seed}, {time.process_time() - started:.0f} s of one core.",
        "",
        *table(errors, chosen, perplexities),
        "",
        "| E of each layer | " + " | ".join(str(i) for i in range(len(found))) + " |",
        "|---" * (len(found) + 1) + "|",
        *(f"| {name} | " + " | ".join(f"{each:.1f}".replace("nan", "") for each in errors[name]) + " |" for name in errors),
        "",
    ]
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        shown = {name: errors[name] for name in ("rotation only", BASE, "N3", "T3", *list(errors)[-6:]) if name not in PARTIAL}
        worst = found[ranked[0]]
        plots = draw(options.out, options.name, shown, worst, choice.learned[worst.path].s, choice.start)
        lines += [f"![{title}]({path.name})" for path in plots] + [""]
        (options.out / f"smoothrot-{options.name}.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
