"""AutoRound on the bench model, with the protocol of the bench folder, in an environment of its own.

    python -m venv peers && peers/bin/pip install torch==2.13.0 auto-round==0.16.1
    peers/bin/python tools/peers/autoround.py ../shared/bench

Two threads, and no torch.compile, which made it slower here. Prints one row as of `tools.bench_bits`: counted bits, perplexities, seconds,
and the process's greatest resident size in MB.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--iters", type=int, default=200)
    options = parser.parse_args()
    sys.path.insert(0, str(options.bench))
    import protocol  # noqa: PLC0415 (of the bench folder)

    torch.set_num_threads(2)
    folder = options.bench / "llama-wt2"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = [{"input_ids": row[None]} for row in protocol.calibration_windows(0)]
    started = time.perf_counter()
    AutoRound(
        model,
        tokenizer,
        scheme=f"W{options.bits}A16",
        group_size=64,
        sym=False,
        iters=options.iters,
        nsamples=128,
        seqlen=256,
        batch_size=8,
        dataset=data,
        device_map="cpu",
        enable_torch_compile=False,
    ).quantize()
    seconds, used = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    wiki, news = (protocol.perplexity(model, protocol.test_windows(name)) for name in protocol.TESTS)
    bits = options.bits + (16 + options.bits) / 64
    print(f"| peer: AutoRound, {options.iters} steps | {bits:.2f} | {wiki:.2f} | {news:.2f} | | {seconds:.0f} | {used:.0f} |")


if __name__ == "__main__":
    main()
