import pytest
import torch
import transformers

from ir import edit, evaluate
from ir.capture import capture
from ir.text import graph_text
from passes.preflight.part import kinds, part
from tests.families import FAMILIES, build, distinct_first, load
from tests.passes.samples import run

DEPTH = 5


def deep(name: str) -> torch.nn.Module:
    """A model of a family with more layers."""
    config = FAMILIES[name]()
    config.num_hidden_layers = DEPTH
    if name == "gemma3":
        config.layer_types = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_layers_that_compute_the_same_are_of_one_kind():
    (only,) = kinds(capture(deep("llama")))
    assert only.places == (0, 1, 2, 3, 4)
    assert only.weights == load("llama").graph().get_submodule("model.layers.0").self_attn.q_proj.weight.numel() * 3 + 3 * 64 * 96


def test_kinds_differ_in_their_masks_and_the_most_frequent_comes_first():
    assert [kind.places for kind in kinds(capture(deep("gemma3")))] == [(0, 1, 3), (2, 4)]


@pytest.mark.parametrize("family", distinct_first())
def test_a_part_is_the_model_with_fewer_layers(family):
    gm = load(family).graph()
    run(gm, "canonicalize")
    text = graph_text(gm)
    small, convert = part(gm, (1,))
    assert len(kinds(small)[0].places) == 1
    model = build(family)
    for layers in (module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == 2):
        layers[0] = Past(layers[0])
    if family != "bert":  # whose norms are in the stream, and stay
        tokens = torch.randint(3, 100, (2, 7))
        inputs = small.meta["signature"].bind(input_ids=tokens)
        found = evaluate.run(small, inputs)[0]
        with torch.no_grad():
            expected = model(input_ids=tokens, use_cache=False).logits
        if family != "olmo2":
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert len(convert(gm.meta["example"])) == len(small.meta["example"])
    assert graph_text(gm) == text
    pointers = {edit.attribute(gm, node).data_ptr() for node in gm.graph.find_nodes(op="get_attr")}
    assert pointers > {edit.attribute(small, node).data_ptr() for node in small.graph.find_nodes(op="get_attr")}


class Past(torch.nn.Module):
    """A layer that does nothing, and says what it is asked of itself as the one in whose place it is."""

    def __init__(self, layer):
        super().__init__()
        for name in ("attention_type", "layer_type"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states
