"""Train the small Llama that the demo and the tests use, from any plain text.

    python tools/train_model.py TEXT... --out fixtures/tiny-llama --minutes 60

A byte-level BPE tokenizer is trained on the text, then a Llama on its tokens: Muon for the matrices, AdamW for the
embedding and the norms, one linear decay to zero. The result is an ordinary Hugging Face folder in bfloat16.
"""

import argparse
import lzma
import re
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 256
DETOKENIZE = (
    (r" @([-,.])@ ", r"\1"),
    (r"``\s*|\s*''", '"'),
    (r" +([.,;:!?%)\]])", r"\1"),
    (r"([(\[$]) +", r"\1"),
    (r" +(n't|'s|'re|'ve|'ll|'d|'m)\b", r"\1"),
    (r"\( *\)|[ \t]+(?=\n)", ""),
    (r"[ \t]{2,}", " "),
)


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton and Schulz's iteration, for matrices (Jordan et al., 2024), in float32.

    torch's own runs in bfloat16, which is many times slower on processors without it.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.95, decay: float = 0.05):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(velocity, group["momentum"]))
                p.mul_(1 - group["lr"] * group["decay"]).sub_(update, alpha=group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonalise(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest matrix to `g` with singular values near one, by the quintic iteration of Muon."""
    x = g / (g.norm() + 1e-7)
    x = x.T if g.shape[0] > g.shape[1] else x
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def read(path: Path) -> str:
    """The text of a file (`.xz` is unpacked), with corpus-style tokenisation undone and lines with `<unk>` dropped."""
    raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    text = raw.decode("utf-8", errors="ignore")
    text = "\n".join(line for line in text.splitlines() if "<unk>" not in line and " = " not in line)
    for pattern, replacement in DETOKENIZE:
        text = re.sub(pattern, replacement, text)
    return re.sub(r"\n{3,}", "\n\n", text)


def train_tokenizer(text: str, size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `size` entries; `<s>` is 0 and `</s>` is 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def build(vocabulary: int) -> LlamaForCausalLM:
    """A Llama of 2.6 M parameters: every linear's input is a multiple of 64, heads are grouped, the head is tied."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=192, intermediate_size=512, num_hidden_layers=5, num_attention_heads=6, num_key_value_heads=3,
        head_dim=32, max_position_embeddings=1024, rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0, help="length of the training; the learning rate decays over it")
    parser.add_argument("--vocabulary", type=int, default=3072)
    parser.add_argument("--batch", type=int, default=8, help=f"windows of {CONTEXT} tokens a step")
    parser.add_argument("--start", type=Path, help="a folder that an earlier run wrote, to go on from")
    parser.add_argument("--rate", type=float, default=1.0, help="factor on the learning rates")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)

    text = "\n\n".join(read(path) for path in options.text)
    start = options.start
    tokenizer = AutoTokenizer.from_pretrained(start) if start else train_tokenizer(text, options.vocabulary)
    ids = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64)
    held = ids[-64 * CONTEXT :].reshape(64, CONTEXT)
    ids = ids[: -64 * CONTEXT]
    model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32) if start else build(len(tokenizer))
    print(f"{len(ids):,} tokens, {model.num_parameters():,} parameters", flush=True)

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        Muon(matrices, lr=0.015),
        torch.optim.AdamW(others, lr=4e-3, weight_decay=0.01, betas=(0.9, 0.98)),
    ]
    rates = [options.rate * optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    started, step = time.monotonic(), 0
    while (done := (time.monotonic() - started) / (60 * options.minutes)) < 1:
        starts = torch.randint(len(ids) - CONTEXT - 1, (options.batch, 1))
        batch = ids[starts + torch.arange(CONTEXT)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 100) * min(1.0, 1.6 * (1 - done))
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % 100 == 0:
            print(f"step {step}  {100 * done:.1f} %  loss {loss.item():.3f}", flush=True)
    model.eval()
    with torch.no_grad():
        held_out = sum(model(input_ids=rows, labels=rows).loss.item() for rows in held.split(8)) / 8
    print(f"{step} steps; held-out perplexity {torch.tensor(held_out).exp():.1f}")
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
