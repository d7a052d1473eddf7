"""`Continuation`: prompts continued greedily, as text, with the time it took."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ir.errors import DataError, OptionError
from passes.compiled import Compiled

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer writes for the first bytes of a character


class Continuation:
    """One run of greedy decoding.

    Args:
        model: a decoder with a cache.
        tokenizer: a Hugging Face tokenizer.
        prompts: shorter ones are padded on the left, and masked there.

    Raises:
        OptionError: the model has no cache.
        DataError: a prompt without tokens.
    """

    def __init__(self, model: Compiled, tokenizer: Any, prompts: Sequence[str]) -> None:
        if not model.signature.layers:
            raise OptionError("the model keeps no cache: it is not a decoder", remedy="generate with causal language models")
        rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        if not all(rows):
            raise DataError("a prompt has no tokens", where="--prompt", remedy="give at least one word")
        length = max(map(len, rows))
        self.model, self.tokenizer, self.end = model, tokenizer, tokenizer.eos_token_id
        self.ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
        self.mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        self.new: list[list[int]] = [[] for _ in rows]
        self.prefill = self.decode = 0.0

    def stream(self, tokens: int) -> Iterator[str]:
        """Decode up to `tokens` tokens; yields the first row's text as it grows."""
        shown, started = "", time.perf_counter()
        for step, column in enumerate(self.model.stream(self.ids, tokens, attention_mask=self.mask, end=self.end)):
            seconds = time.perf_counter() - started
            if step:
                self.decode += seconds
            else:
                self.prefill = seconds
            for row, token in zip(self.new, column.tolist(), strict=True):
                row.append(token)
            text = self.texts()[0]
            if not text.endswith(UNFINISHED):
                yield text[len(shown) :]
                shown = text
            started = time.perf_counter()
        yield self.texts()[0][len(shown) :]

    def texts(self) -> list[str]:
        """What was added to every prompt, up to the token that ends it."""
        ended = (row[: row.index(self.end)] if self.end in row else row for row in self.new)
        return [str(self.tokenizer.decode(row, clean_up_tokenization_spaces=False)) for row in ended]

    def speed(self) -> str:
        """Tokens per second of all rows together, prompts and new tokens apart."""
        read, made = int(self.mask.sum()), sum(map(len, self.new)) - len(self.new)
        text = f"prefill: {read} tokens, {read / self.prefill:.1f} tokens/s"
        return f"{text}; decode: {made} tokens, {made / self.decode:.1f} tokens/s" if made else text
