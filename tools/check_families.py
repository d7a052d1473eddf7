"""The documentation's table of families: tiny random models of each, captured, compressed to W8A16, and exported to ONNX Runtime.

python -m tools.check_families > families.md
"""

import torch
import transformers

import passes
from backends.onnx_qdq import OnnxQdq
from ir.capture import capture
from tests.families import FAMILIES, VOCABULARY

NEAREST, GPTQ = "w8a16", "w8a16(rounding='gptq', symmetric=False, group=16)"
LENGTHS = (12, 1, 3)


def tokens(batch: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def steps(model, cached: bool) -> list[torch.Tensor]:
    """The logits of chained calls, the cache carried on."""
    past, logits = {}, []
    for seed, length in enumerate(LENGTHS if cached else LENGTHS[:1]):
        outputs = model(input_ids=tokens(2, length, seed), **past)
        past = {"past_key_values": outputs.past_key_values} if cached else {}
        logits.append(outputs.logits)
    return logits


def error(ours: list[torch.Tensor], original: list[torch.Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, original, strict=True))


@torch.no_grad()
def row(name: str) -> str:
    """One line of the table; weights as transformers initialises them."""
    torch.manual_seed(0)
    automatic = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    model = automatic.from_config(FAMILIES[name]()).eval()
    cached = name != "bert"
    original = steps(model, cached)
    gm = capture(model)
    nearest = passes.compile(gm, NEAREST)
    gptq = passes.compile(gm, GPTQ, [tokens(8, 64, seed) for seed in range(10, 14)])
    exported = passes.compile(gm, NEAREST, backend=OnnxQdq(accuracy_level=1, threads=1))
    oracle = steps(nearest, cached)
    distance = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(steps(exported, cached), oracle, strict=True))
    raised = next((part.split(" × ")[1] for part in nearest.report().notes[0].split(", ") if part.startswith("raise-rms-norm")), "0")
    sites = next(record.sites for record in nearest.trace if record.text.startswith("annotate"))
    errors = f"{error(oracle, original):.2%} | {error(steps(gptq, cached), original):.2%}"
    return f"| {type(model).__name__}{' (tied)' * name.endswith('tied')} | {raised} | {sites} | {errors} | {distance:.0e} |"


def main() -> None:
    torch.set_num_threads(1)
    print(
        "| model | RMS norms raised | linears quantized | W8A16 to nearest: error | W8A16 by GPTQ: error | ONNX Runtime less the oracle |"
    )
    print("|---|---|---|---|---|---|")
    for name in FAMILIES:
        print(row(name), flush=True)


if __name__ == "__main__":
    main()
