import torch

from ir import evaluate


@torch.no_grad()
def test_running_equals_calling_and_taps_see_every_value(families):
    gm = families("llama").graph()
    seen = []
    outputs = evaluate.run(gm, gm.meta["example"], lambda node, value: seen.append(node))
    assert all(torch.equal(a, b) for a, b in zip(outputs, gm(*gm.meta["example"]), strict=True))
    assert seen == [node for node in gm.graph.nodes if node.op == "call_function"]


def test_values_are_dropped_after_their_last_reader(families):
    gm = families("llama").graph()
    alive, most = [], 0
    import weakref

    def tap(node, value):
        nonlocal most
        if isinstance(value, torch.Tensor):
            alive.append(weakref.ref(value))
            most = max(most, sum(reference() is not None for reference in alive))

    evaluate.run(gm, gm.meta["example"], tap)
    assert most < len(alive) / 3


def test_ancestors_stop_where_told(families):
    gm = families("gpt2").graph()
    logits = gm.graph.output_node().args[0][0]
    assert evaluate.ancestors([logits], stop=[logits]) == set()
    assert len(evaluate.ancestors([logits])) > 50


def test_what_is_given_is_dropped_too_if_it_may_be_spent(families):
    gm = families("gpt2").graph()
    outputs = list(gm.graph.output_node().args[0])
    for spend in (False, True):
        given = evaluate.bind(gm, gm.meta["example"])
        evaluate.evaluate(gm, evaluate.calls_for(gm, outputs), given, outputs, spend=spend)
        assert (len(given) < len(gm.meta["example"])) is spend
