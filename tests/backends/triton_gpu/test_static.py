import pytest
import torch

from backends.triton_gpu.static import INDEX_COPY, static_step
from ir import edit
from ir.canonical import canonicalize
from ir.errors import BackendError
from ir.match import aten, find, is_call


def normal_form(families):
    gm = families("llama").graph()
    canonicalize(gm)
    return gm


def test_tokens_that_are_written_in_place_score_as_in_one_call(families):
    gm = normal_form(families)
    signature = gm.meta["signature"]
    step = static_step(gm, signature)
    joins = [node for node in find(step, aten.cat.default) if any(operand.op == "placeholder" for operand in node.all_input_nodes)]
    assert len(find(step, INDEX_COPY)) == 4 and not joins
    capacity, length = 11, 9
    ids = torch.randint(3, 128, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, :2] = 0
    inputs = signature.bind(input_ids=ids, attention_mask=mask)
    named = {port.name: x for port, x in zip(signature.inputs, inputs, strict=True)}
    caches = {port.name: torch.zeros(2, port.shape[1], capacity, port.shape[3]) for port in signature.inputs if port.cached}
    seen = torch.zeros(2, capacity, dtype=torch.int64)
    with torch.no_grad():
        whole = gm(*inputs)[0]
        for start, stop in ((0, 6), (6, 7), (7, 9)):  # a prompt, a step, two at once
            seen[:, start:stop] = mask[:, start:stop]
            values = caches | {
                "attention_mask": seen,
                "input_ids": ids[:, start:stop],
                "position_ids": named["position_ids"][:, start:stop],
            }
            (logits,) = step(*(values[port.name] for port in signature.inputs), torch.arange(start, stop))
            rows = mask[:, start:stop].bool()
            torch.testing.assert_close(logits[rows], whole[:, start:stop][rows], atol=1e-4, rtol=1e-4)


def test_graphs_that_do_something_else_with_their_cache_are_refused(families):
    gm = normal_form(families)
    past = gm.graph.find_nodes(op="placeholder")[3]
    (join,) = (user for user in past.users if is_call(user, aten.cat.default))
    join.update_arg(0, [join.args[0][1], past])
    with pytest.raises(BackendError, match="does not append"):
        static_step(gm, gm.meta["signature"])
    gm = normal_form(families)
    size = next(node for node in find(gm, aten.sym_size.int) if node.args[1] == 2)
    total = next(user for user in size.users if not is_call(user, aten.add.Tensor))
    total.args = (size, 1)
    with pytest.raises(BackendError, match="counts past tokens"):
        static_step(gm, gm.meta["signature"])
    gm = normal_form(families)
    last = gm.graph.output_node().args[0]
    edit.set_outputs(gm, (*last[:1], last[2], last[1], *last[3:]))
    with pytest.raises(BackendError, match="not appended to and returned"):
        static_step(gm, gm.meta["signature"])
