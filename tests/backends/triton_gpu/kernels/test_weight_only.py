import pytest
import torch

from backends.triton_gpu.kernels import weight_only
from backends.triton_gpu.ops.linear import packed_linear
from backends.triton_gpu.select import Config
from ir.errors import OptionError
from tests.backends.triton_gpu.kernels.samples import assert_near, on, packed

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
TILE = {"tile_n": 64}
# bits, N, K, M, group, dtype, zero points, bias, form: every width whole and ragged, and each choice of a form at least twice
CASES = [
    (1, 64, 512, 3, 128, HALF, False, True, Config(**TILE)),
    (1, 70, 200, 9, 64, BRAIN, True, False, Config(**TILE, tile_m=16, depth=2)),
    (2, 128, 512, 1, 64, BRAIN, False, True, Config(**TILE, spans=2)),
    (2, 50, 296, 17, 32, HALF, True, False, Config(**TILE, tile_m=16, split=2)),
    (3, 64, 1024, 8, 128, HALF, True, False, Config(**TILE, split=2)),
    (3, 33, 600, 5, 600, BRAIN, False, True, Config(**TILE)),
    (4, 128, 512, 2, 128, HALF, False, False, Config(**TILE, spans=2, split=2)),
    (4, 100, 424, 20, 96, HALF, True, True, Config(**TILE, tile_m=16, depth=4, spans=2)),
    (4, 64, 256, 40, 128, BRAIN, True, True, Config(**TILE, tile_m=64, depth=4, before=True)),
    (4, 64, 384, 3, 384, HALF, True, True, Config(**TILE, split=3)),
    (5, 64, 512, 3, 256, BRAIN, True, False, Config(**TILE)),
    (5, 40, 360, 11, 32, HALF, False, True, Config(**TILE, tile_m=16, split=2)),
    (6, 64, 512, 8, 128, HALF, False, True, Config(**TILE, spans=2, before=True)),
    (6, 72, 320, 1, 64, BRAIN, True, False, Config(**TILE, split=4)),
    (7, 64, 512, 4, 512, HALF, True, True, Config(**TILE, tile_m=16, depth=4)),
    (7, 65, 129, 3, 64, BRAIN, False, False, Config(**TILE, split=2)),
    (8, 64, 256, 33, 128, BRAIN, False, True, Config(**TILE, tile_m=32, spans=4)),
    (8, 90, 232, 2, 32, HALF, True, True, Config(**TILE, spans=2, split=2)),
]


@pytest.mark.parametrize(("bits", "n", "k", "m", "group", "dtype", "zero", "bias", "config"), CASES)
def test_it_is_what_the_operator_means(
    bits: int, n: int, k: int, m: int, group: int, dtype: torch.dtype, zero: bool, bias: bool, config: Config, device: torch.device
) -> None:
    arguments = packed(bits, n, k, group, dtype, zero=zero, bias=bias)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert_near(weight_only.linear(x.to(device), **on(device, arguments), config=config), packed_linear(x, **arguments))


@pytest.mark.parametrize(("bits", "dtype", "config"), [(4, HALF, None), (3, HALF, Config("dequantize")), (4, SINGLE, None)])
def test_leading_axes_stay_and_a_form_is_chosen(bits: int, dtype: torch.dtype, config: Config | None, device: torch.device) -> None:
    arguments = packed(bits, 64, 288, 96, dtype, zero=True, bias=True)
    x = torch.randn(2, 3, 288).to(dtype)
    assert_near(weight_only.linear(x.to(device), **on(device, arguments), config=config), packed_linear(x, **arguments))


def test_parts_are_summed_in_their_order(device: torch.device) -> None:
    arguments = on(device, packed(4, 64, 1024, 128, HALF, zero=False, bias=True))
    x, config = torch.randn(3, 1024).to(HALF).to(device), Config(**TILE, split=4)
    assert torch.equal(weight_only.linear(x, **arguments, config=config), weight_only.linear(x, **arguments, config=config))


def test_groups_that_no_word_ends_with_are_refused() -> None:
    arguments = packed(4, 64, 160, 16, HALF, zero=False, bias=False)
    with pytest.raises(OptionError, match="scales of 16 columns"):
        weight_only.linear(torch.randn(1, 160).to(HALF), **arguments)
