"""`genai_config.json`: what onnxruntime-genai needs to know about a decoder, from its transformers configuration."""

from collections.abc import Mapping
from typing import Any

from ir.signature import CACHE, Signature

TYPE = "decoder"  # any decoder: it refuses names of families that it does not know, and prepares other inputs for some that it does


def genai_config(config: Any, signature: Signature, entries: Mapping[str, str], filename: str) -> dict[str, Any] | None:
    """The file's content; None if the model is not a decoder with a cache of floats of one shape.

    Args:
        config: a transformers configuration.
        signature: the model's inputs and outputs.
        entries: session settings.
        filename: the model's file name.
    """
    caches = {port.shape for port in signature.inputs if port.cached}
    if len(caches) != 1 or signature.coded or not any(port.name == "logits" for port in signature.outputs):
        return None
    text = config.get_text_config()
    (_, heads, _, width) = next(iter(caches))
    context = getattr(text, "max_position_embeddings", None) or 2048
    end = text.eos_token_id
    beginning = text.bos_token_id if text.bos_token_id is not None else _first(end)
    padding = text.pad_token_id if text.pad_token_id is not None else _first(end)
    return {
        "model": {
            "type": TYPE,
            "bos_token_id": beginning,
            "eos_token_id": end,
            "pad_token_id": padding,
            "context_length": context,
            "vocab_size": text.vocab_size,
            "decoder": {
                "filename": filename,
                "head_size": width,
                "hidden_size": text.hidden_size,
                "num_attention_heads": text.num_attention_heads * heads // _cached_heads(text),  # a pruned model's are fewer
                "num_hidden_layers": signature.layers,
                "num_key_value_heads": heads,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": [], **entries},
                "inputs": _inputs(signature),
                "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
            },
        },
        "search": _search(context),
    }


def _cached_heads(text: Any) -> int:
    """Heads of keys and values that the configuration states."""
    return int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)


def _first(tokens: Any) -> Any:
    return tokens[0] if isinstance(tokens, list) else tokens


def _inputs(signature: Signature) -> dict[str, str]:
    plain = {port.name: port.name for port in signature.inputs if "." not in port.name}
    return plain | {"past_key_names": f"{CACHE}.%d.key", "past_value_names": f"{CACHE}.%d.value"}


def _search(context: int) -> dict[str, Any]:
    """Greedy search over the whole context; callers override it."""
    return {
        "diversity_penalty": 0.0,
        "do_sample": False,
        "early_stopping": True,
        "length_penalty": 1.0,
        "max_length": context,
        "min_length": 0,
        "no_repeat_ngram_size": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": False,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 1.0,
    }
