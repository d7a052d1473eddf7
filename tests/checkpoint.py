"""A checkpoint as users have them: a folder with a tiny random Llama and its tokenizer, and texts beside it."""

import random
from pathlib import Path

import torch
import transformers

from tools.train_model import train_tokenizer

WORDS = (
    *("the", "a", "of", "in", "and", "to", "was", "that", "he", "said", "we", "they", "new"),
    *("old", "house", "river", "town", "war", "year", "people", "music", "would", "not", "all", "one"),
)


def sentences(seed: int, count: int) -> str:
    """`count` sentences without sense."""
    draw = random.Random(seed)
    return " ".join(" ".join(draw.choices(WORDS, k=9)).capitalize() + "." for _ in range(count))


def write_checkpoint(folder: Path) -> Path:
    """Write `tiny-llama/`, `calibration.txt` and `test.txt` into a folder."""
    calibration = sentences(0, 400)
    (folder / "calibration.txt").write_text(calibration, encoding="utf-8")
    (folder / "test.txt").write_text(sentences(1, 100), encoding="utf-8")
    tokenizer = train_tokenizer(calibration, 320)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save_pretrained(folder / "tiny-llama")
    tokenizer.save_pretrained(folder / "tiny-llama")
    return folder
