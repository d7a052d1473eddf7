import pytest
import torch

from backends.sites import Weight
from backends.triton_gpu.ops.embedding import packed_embedding
from backends.triton_gpu.weights import packed
from ir import numerics
from ir.encoding import Encoding


@pytest.mark.parametrize("container", [8, 16])
@pytest.mark.parametrize("text", ["i8[1,-1]", "u3[1,32]", "i1[1,64]"])
def test_it_gathers_the_values_of_rows(text: str, container: int) -> None:
    encoding, table = Encoding.parse(text), torch.randn(50, 96)
    qparams = numerics.choose_qparams(table, encoding)
    codes = numerics.quantize(table, qparams, encoding)
    made = packed(Weight(codes, qparams.scale, qparams.zero_point, encoding), container)
    indices = torch.randint(0, 50, (2, 5))
    given = (indices, made.planes, made.scale, made.zero, made.bits, made.group, made.offset, 96, torch.float16)
    expected = numerics.dequantize(codes, qparams, encoding, torch.float16)[indices]
    assert torch.equal(packed_embedding(*given), expected)
    torch.library.opcheck(packed_embedding, given)
