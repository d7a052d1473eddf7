import math

import pytest
import torch

from ir.canonical import canonicalize
from tests.ir.graphs import operators, traced

ROOT = math.sqrt(2.0 / math.pi)

SPELLINGS = {
    "gpt2": (lambda x: 0.5 * x * (1.0 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3.0)))), "gelu"),
    "typed constants": (lambda x: x * 0.5 * (1.0 + torch.tanh(x * 0.79788456 * (1 + 0.044715 * x * x))), None),
    "half last": (lambda x: 0.5 * (x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))), "gelu"),
    "exact": (lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), "gelu"),
    "swish": (lambda x: torch.sigmoid(x) * x, "silu"),
    "quick": (lambda x: x * torch.sigmoid(1.702 * x), None),
    "gate": (lambda x: (x + 1) * torch.sigmoid(x), None),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_raises_spelled_out_activations(name):
    function, raised = SPELLINGS[name]
    x = torch.linspace(-4, 4, 60).view(3, 5, 4)
    gm = traced(function, x)
    counts = canonicalize(gm)
    assert (counts.get("raise-activations", 0) == 1) == (raised is not None)
    assert raised is None or operators(gm) == [raised]
    torch.testing.assert_close(gm(x)[0], function(x), rtol=1e-5, atol=1e-6)
