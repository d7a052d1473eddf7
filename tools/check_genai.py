"""Greedy text in onnxruntime-genai beside ours and the oracle's, token for token, for several schemes of one model.

    python -m tools.check_genai fixtures/tiny-llama --calibration fixtures/calibration.txt

Every scheme is compiled for ONNX, saved, and opened by the real package. Exits with 1 if onnxruntime-genai's tokens differ from those that
`passes.load(folder)` generates; the oracle is the reference backend on the same quantized graph.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnxruntime_genai
import torch
import transformers

import passes
from backends.reference import ReferenceExecutable
from passes.compiled import Compiled
from passes.data.calibration import token_windows
from passes.measure import greedy

SCHEMES = {
    "W4A16": "w4a16",
    "W8A8": "w8a8",
    "rotated, W4A8": "w4a8(transform='rotate', rounding='nearest')",
    "mixed, 3.5 bits": "mixed(bits=3.5, rounding='nearest', own_text=False)",
    "W4A16, embeddings and head": "w4a16(embeddings=True, head=True)",
}
PROMPTS = ("The film is", "In the summer of the year", "He said that the")


def generate(model: onnxruntime_genai.Model, prompt: Sequence[int], tokens: int) -> Iterator[int]:
    """Greedy tokens after a prompt of token ids, one by one; the end of text does not end it."""
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, min_length=len(prompt) + tokens, max_length=len(prompt) + tokens)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(list(prompt))
    while not generator.is_done():
        generator.generate_next_token()
        yield int(generator.get_next_tokens()[0])


def same(ours: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens at the start are the same."""
    return next((i for i, (a, b) in enumerate(zip(ours, others, strict=True)) if a != b), len(ours))


@torch.no_grad()
def lead(oracle: Compiled, ids: torch.Tensor, ours: Sequence[int], agreed: int) -> float:
    """The oracle's probability of its own next token less that of ours, where the two first differ."""
    prefix = torch.cat([ids, torch.tensor([list(ours[:agreed])], dtype=ids.dtype)], -1)
    p = oracle(input_ids=prefix).logits[0, -1].float().softmax(-1)
    return float(p.max() - p[ours[agreed]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder with a checkpoint and its tokenizer")
    parser.add_argument("--calibration", type=Path, required=True, help="a text file")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    calibration = token_windows(options.calibration.read_text(encoding="utf-8"), tokenizer, window=128, count=32, seed=0).split(8)
    lines = [
        f"`python -m tools.check_genai {options.model}`; onnxruntime-genai {onnxruntime_genai.__version__}, {options.tokens} greedy tokens "
        f"after each of {len(PROMPTS)} prompts: how many are the same. Where the oracle goes another way: its probability "
        "of its own token there, less that of ours.\n",
        "| scheme | onnxruntime-genai and ours | ours and the oracle's | the oracle's lead where they part |",
        "|---|---|---|---|",
    ]
    failed = False
    for name, pipeline in SCHEMES.items():
        with tempfile.TemporaryDirectory() as folder:
            compiled = passes.compile(model, pipeline, calibration, "onnx")
            out = compiled.save(Path(folder) / "out")
            oracle = Compiled(ReferenceExecutable(compiled.graph), compiled.signature, "reference")  # type: ignore[arg-type]
            loaded, runtime = passes.load(out), onnxruntime_genai.Model(str(out))
            cells: list[list[str]] = [[], [], []]
            for prompt in PROMPTS:
                ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
                ours = [int(token) for token in greedy(loaded, ids, options.tokens)]
                counts = (
                    same(ours, list(generate(runtime, ids[0].tolist(), options.tokens))),
                    same(ours, [int(token) for token in greedy(oracle, ids, options.tokens)]),
                )
                failed |= counts[0] < options.tokens
                for cell, count in zip(cells, counts, strict=False):
                    cell.append(str(count))
                if counts[1] < options.tokens:
                    cells[2].append(f"{lead(oracle, ids, ours, counts[1]):.4f}")
        lines.append(f"| {name} | {' | '.join(map(', '.join, cells))} |")
        print(lines[-1], flush=True)
    print("\n".join(lines))
    if options.out:
        options.out.write_text("# Text in onnxruntime-genai\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
