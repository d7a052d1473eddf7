"""The README's table of families: tiny random models of each, captured, compressed to W8A16, and exported to ONNX Runtime.

python -m tools.check_families > families.md
"""

import torch

import passes
from backends.onnx_qdq import OnnxQdq
from tests.families import FAMILIES, VOCABULARY, build

PIPELINE = "w8a16(group=32)"


def tokens(batch: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def steps(model, length_of_steps: tuple[int, ...], cached: bool) -> list[torch.Tensor]:
    """The logits of chained calls, the cache carried on."""
    past, logits = {}, []
    for seed, length in enumerate(length_of_steps if cached else length_of_steps[:1]):
        outputs = model(input_ids=tokens(2, length, seed), **past)
        past = {"past_key_values": outputs.past_key_values} if cached else {}
        logits.append(outputs.logits)
    return logits


@torch.no_grad()
def row(name: str) -> str:
    """One line of the table."""
    model = build(name)
    cached = name != "bert"
    original = steps(model, (12, 1, 3), cached)
    compiled = passes.compile(model, PIPELINE)
    oracle = steps(compiled, (12, 1, 3), cached)
    exported = passes.compile(model, PIPELINE, backend=OnnxQdq(accuracy_level=1, threads=1))
    ours = steps(exported, (12, 1, 3), cached)
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(oracle, original, strict=True))
    distance = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, oracle, strict=True))
    raised = next((part.split(" × ")[1] for part in compiled.report().notes[0].split(", ") if part.startswith("raise-rms-norm")), "0")
    left = ", ".join(sorted({skip.path.rpartition(".")[2] for skip in compiled.report().skipped}))
    sites = next(record.sites for record in compiled.trace if record.text.startswith("annotate"))
    return f"| {name} | {type(model).__name__} | {raised} | {sites} | {error:.2%} | {distance:.1e} | {left} |"


def main() -> None:
    torch.set_num_threads(1)
    print("| family | class | RMS norms raised | linears quantized | error of W8A16 | ONNX Runtime against the oracle | left out |")
    print("|---|---|---|---|---|---|---|")
    for name in FAMILIES:
        print(row(name), flush=True)


if __name__ == "__main__":
    main()
