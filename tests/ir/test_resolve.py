import operator

import pytest
import torch

from ir.errors import DataError
from ir.resolve import resolve


def test_operators_of_graphs_are_found():
    assert resolve("aten.linear.default") is torch.ops.aten.linear.default
    assert resolve("aten.__and__.Tensor") is torch.ops.aten.__and__.Tensor
    assert resolve("aten._to_copy.default") is torch.ops.aten._to_copy.default
    assert resolve("_operator:mul") is operator.mul


@pytest.mark.parametrize(
    "name",
    [
        "aten.add_.Tensor",  # changes its operands
        "aten.from_file.default",
        "aten.save.default",
        "aten.manual_seed.default",  # changes the interpreter
        "aten.set_grad_enabled.default",
        "aten.sparse_coo_tensor.indices",  # whose indices nobody checks
        "aten._sparse_csr_tensor_unsafe.default",
        "aten._nested_view_from_buffer.default",
        "aten.fbgemm_linear_int8_weight.default",
        "aten._weight_int4pack_mm_for_cpu.default",
        "_operator:attrgetter",
        "prims.add.default",
    ],
)
def test_what_reaches_further_is_refused(name):
    with pytest.raises(DataError, match="not an operator of graphs"):
        resolve(name)
