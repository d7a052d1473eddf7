"""Compare a model with its original on a text: the rows that reports and `fxpress eval` show."""

from typing import Any

from torch import Tensor

from ir.errors import OptionError
from passes.compiled import Compiled
from passes.measure import Model, agreement, divergence, perplexity
from passes.units import KL

BATCH = 4  # windows at a time: logits of large vocabularies are large


def quality(model: Model, ids: Tensor, reference: Model | None = None) -> dict[str, float]:
    """Perplexity, where the model predicts the next token; divergence from the reference and agreement with it, where there is one.

    Args:
        ids: int64 `[windows, length]`.

    Raises:
        OptionError: a model without logits.
    """
    if not hasattr(model(input_ids=ids[:1]), "logits"):
        raise OptionError("the model has no logits to measure", where="--text", remedy="name a model with a language-modelling head")
    found = {"perplexity": perplexity(model, ids, BATCH)} if predicts(model) else {}
    if reference is not None:
        found[KL] = divergence(model, reference, ids, BATCH)
        found["same top token"] = agreement(model, reference, ids, BATCH)
    return found


def predicts(model: Any) -> bool:
    """Whether a model says what comes next, and not what is masked."""
    return bool(model.signature.layers) if isinstance(model, Compiled) else bool(model.can_generate())
