from backends.hf.shapes import empty, fitting, numbers, parameters, sizes, tied
from tests.families import FAMILIES


def test_numbers_in_names():
    assert numbers(["a.0.b", "a.2.b.1.c", "d"]) == {"a": [0, 2], "a.2.b": [1]}


def test_tied_names_are_of_one_tensor():
    names = tied(empty(FAMILIES["llama_tied"](), "LlamaForCausalLM"))
    assert names["lm_head.weight"] == names["model.embed_tokens.weight"] == {"lm_head.weight", "model.embed_tokens.weight"}


def test_layers_that_are_gone_are_left_out_of_lists():
    config = FAMILIES["gemma3"]()
    wanted = {name: shape for name, shape in sizes(parameters(empty(config, "Gemma3ForCausalLM"))).items() if ".layers.1." not in name}
    found = next(fitting(config, "Gemma3ForCausalLM", wanted, {"model.layers": [1]}))
    assert (found.num_hidden_layers, found.layer_types) == (1, ["full_attention"])


def test_shapes_that_no_configuration_has():
    config = FAMILIES["llama"]()
    wanted = sizes(parameters(empty(config, "LlamaForCausalLM"))) | {"model.layers.0.mlp.up_proj.weight": (80, 64)}
    assert list(fitting(config, "LlamaForCausalLM", wanted, {})) == []
