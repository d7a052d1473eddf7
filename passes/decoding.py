"""Decoding token by token: the loop, how a token is chosen, and the cache that grows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ir.errors import OptionError


class Decoder(Protocol):
    """Reads a prompt, then one token of every row at a time, and says what may follow."""

    def prefill(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits `[batch, vocabulary]` after a prompt, int64 `[batch, length]`, masked by int64 of the same shape."""

    def step(self, ids: Tensor) -> Tensor:
        """Logits `[batch, vocabulary]` after one more token, int64 `[batch, 1]`; they hold until the next step."""

    def release(self) -> None:
        """Called once decoding is over."""


@runtime_checkable
class Decodes(Protocol):
    """An executable with a decoder of its own."""

    def decoder(self, batch: int, capacity: int) -> Decoder | None:
        """A decoder of `batch` rows of up to `capacity` tokens; None if the model has to be called with a growing cache instead."""


class Growing:
    """Decodes by calling a model, `model(input_ids=…, attention_mask=…, past_key_values=…)`, with the cache that it returned before."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model
        self.past: Any = None
        self.mask = torch.empty(0)

    def prefill(self, ids: Tensor, mask: Tensor) -> Tensor:
        """See `Decoder`."""
        self.past, self.mask = None, mask
        return self._call(ids)

    def step(self, ids: Tensor) -> Tensor:
        """See `Decoder`."""
        self.mask = torch.cat([self.mask, torch.ones_like(ids)], -1)
        return self._call(ids)

    def release(self) -> None:
        """See `Decoder`."""
        self.past = None

    def _call(self, ids: Tensor) -> Tensor:
        outputs = self.model(input_ids=ids, attention_mask=self.mask, past_key_values=self.past)
        self.past = outputs.past_key_values
        logits: Tensor = outputs.logits[:, -1]
        return logits


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen from its logits.

    Args:
        temperature: 0 takes the most likely token; else logits are divided by it and a token is drawn.
        top_k: draw among that many most likely tokens; 0 for all.
        seed: of what is drawn.

    Raises:
        OptionError: a value that is negative, or `top_k` where nothing is drawn.
    """

    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0:
            raise OptionError("temperature and top_k are not negative", where="generate")
        if self.top_k and not self.temperature:
            raise OptionError("nothing is drawn at temperature 0", where="generate(top_k=...)", remedy="set temperature too")

    def chooser(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Logits `[batch, vocabulary]` to tokens, int64 `[batch]`; each chooser draws the same numbers."""
        generator = torch.Generator(device).manual_seed(self.seed)

        def choose(logits: Tensor) -> Tensor:
            if not self.temperature:
                return logits.argmax(-1)
            scaled = logits.float() / self.temperature
            if self.top_k:
                least = scaled.topk(min(self.top_k, scaled.shape[-1])).values[:, -1:]
                scaled = scaled.masked_fill(scaled < least, -torch.inf)
            return torch.multinomial(scaled.softmax(-1), 1, generator=generator)[:, 0]

        return choose


@torch.no_grad()
def decode(
    decoder: Decoder, ids: Tensor, tokens: int, mask: Tensor | None = None, end: int | None = None, choice: Choice | None = None
) -> Iterator[Tensor]:
    """Yield the next token of every row, int64 `[batch]`, up to `tokens` times.

    Args:
        decoder: not used by others meanwhile, and released at the end.
        ids: the prompt, int64 `[batch, length]`; shorter rows are padded on the left.
        tokens: to make at most; at least one.
        mask: int64 `[batch, length]`, 0 where padded; all ones if None.
        end: rows that have produced this token go on with it, and decoding stops once all have.
        choice: of the next token; the most likely one if None.
    """
    choose = (choice or Choice()).chooser(ids.device)
    done = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    try:
        logits = decoder.prefill(ids, torch.ones_like(ids) if mask is None else mask)
        for made in range(1, tokens + 1):
            token = choose(logits)
            if end is not None:
                token = torch.where(done, end, token)
                done |= token == end
            yield token
            if made == tokens or (end is not None and bool(done.all())):
                return
            logits = decoder.step(token[:, None])
    finally:
        decoder.release()
