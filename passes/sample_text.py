"""`sample_text`: let the model write calibration data of its own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import evaluate
from ir.errors import DataError, OptionError
from ir.memory import give_back
from ir.sampling import draw
from ir.signature import Signature
from passes.base import Context, Effect, Pass

TOGETHER = 16384  # tokens that are written at a time: their caches lie in memory together
GROWTH = 16  # tokens by which caches grow before what they left is given back


@dataclass(frozen=True)
class SampleText(Pass):
    """Add text that the model writes itself to the calibration data.

    Before, and after: the same graph.

    Every window starts with a token drawn evenly from the vocabulary, and goes on with draws from the model's predictions. Such text
    covers what the model knows, and not only what the calibration text is about (LLM-QAT, 2305.17888, section 2.1): what is rounded on
    both is nearer to the model on text of other kinds. It stands between the given batches, in batches of the same size. Run it before
    anything is rounded.

    Limits: 1. causal language models, whose one input that cannot be made up is `input_ids`.

    Args:
        windows: to write; 0 for as many as the calibration data has.
        length: tokens of a window; 0 for half of the first that was given, which says as much in a third of the time.
        temperature: of the draws; 1 are the model's own predictions.
        seed: of the draws.

    Raises:
        DataError: no calibration data to add to, and no numbers given.
        OptionError: the model is no causal language model.
    """

    windows: int = 0
    length: int = 0
    temperature: float = 1.0
    seed: int = 0
    effect: ClassVar[Effect] = Effect.OBSERVE

    def __post_init__(self) -> None:
        if self.windows < 0 or self.length < 0 or self.length == 1 or not self.temperature > 0:
            raise OptionError("windows are not negative, have two tokens or more, and the temperature is positive", where=str(self))

    def needs(self, ctx: Context) -> None:
        """Calibration data, or numbers."""
        if not ctx.calibration and not (self.windows and self.length):
            raise DataError("sample_text has no calibration data to go by", remedy="pass some, or give windows and length")

    def requires(self, gm: GraphModule, ctx: Context) -> None:
        """A causal language model."""
        signature: Signature | None = gm.meta.get("signature")
        if signature is None or not signature.causal:
            raise OptionError(
                "sample_text needs a causal language model with a cache", remedy="leave the pass out (presets: own_text=False)"
            )

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Write, and add; returns the number of windows."""
        signature: Signature = gm.meta["signature"]
        given = [list(batch) for batch in ctx.calibration]
        count = self.windows or sum(len(batch[0]) for batch in given)
        length = self.length or max(given[0][0].shape[1] // 2, 2)
        size = len(given[0][0]) if given else 8
        generator = torch.Generator().manual_seed(self.seed)
        together = max(TOGETHER // length, 1)
        parts = [min(together, count - start) for start in range(0, count, together)]
        steps = ctx.track([(part, at) for part in parts for at in range(length - 1)], "sample text")
        written = torch.cat([self._written(gm, ctx, rows, length, generator, steps) for rows in parts])
        own = [signature.bind(input_ids=ids) for ids in torch.split(written, size)]
        ctx.calibration = _between(given, own)
        ctx.notes.append(f"sample_text: {count} windows of {length} tokens written by the model are part of the calibration data")
        return count

    def _written(
        self, gm: GraphModule, ctx: Context, rows: int, length: int, generator: torch.Generator, steps: Iterator[object]
    ) -> Tensor:
        """Some windows, as they were kept with what the generator was like after them, or written now."""
        ids, state = torch.empty(rows, length, dtype=torch.int64), generator.get_state()

        def write() -> None:
            ids.copy_(self._write(gm, rows, length, generator, steps))
            state.copy_(generator.get_state())

        ctx.memo.filled("text", [ids, state], write)
        generator.set_state(state)
        return ids

    def _write(self, gm: GraphModule, rows: int, length: int, generator: torch.Generator, steps: Iterator[object]) -> Tensor:
        """Some windows, int64 `[rows, length]`."""
        signature: Signature = gm.meta["signature"]
        classes = signature.outputs[0].shape[-1]
        assert classes is not None
        ids = torch.randint(classes, (rows, 1), generator=generator)
        nodes: tuple[Node, ...] = gm.graph.output_node().args[0]  # type: ignore[assignment]
        calls = evaluate.calls_for(gm, nodes)
        past = None
        for step in range(length - 1):
            next(steps)
            if step % GROWTH == 0:
                give_back()  # no hole that a cache leaves is large enough for the next
            given = evaluate.bind(gm, signature.bind(input_ids=ids[:, -1:], attention_mask=torch.ones_like(ids), past_key_values=past))
            past = None  # a layer's cache goes as soon as the longer one is there
            found = evaluate.evaluate(gm, calls, given, nodes, spend=True)
            past = signature.cache_of([found[node] for node in nodes])
            ids = torch.cat([ids, draw(found[nodes[0]][:, -1].float() / self.temperature, generator)], -1)
            del found
        return ids


def _between(given: Sequence[list[Tensor]], own: Sequence[list[Tensor]]) -> list[list[Tensor]]:
    """Both in turn, then what is left of the longer."""
    pairs = [batch for pair in zip(given, own, strict=False) for batch in pair]
    return [*pairs, *given[len(own) :], *own[len(given) :]]
