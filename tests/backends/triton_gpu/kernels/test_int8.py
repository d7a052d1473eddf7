import pytest
import torch

from backends.triton_gpu import layout
from backends.triton_gpu.kernels import int8
from backends.triton_gpu.kernels.int8 import Config, choose
from backends.triton_gpu.ops.linear import packed_linear_int8
from ir.errors import OptionError

SMALL = Config(block_n=16, block_m=8, runs=8, splits=1, warps=4, stages=3)


def _case(bits: int, *, m: int = 3, n: int = 20, k: int = 300, group: int = 0, zero: bool = False, token: bool = True, **given: object):
    """Arguments of the operator: integer scales, so that results are integers and comparisons exact."""
    g = torch.Generator().manual_seed(bits)
    group = group or k
    shape = -(-k // group), n
    return {
        "codes": torch.randint(-128, 128, (m, k), generator=g, dtype=torch.int8),
        "input_scale": torch.randint(1, 3, (m if token else 1, 1), generator=g).float(),
        "input_zero": None,
        "planes": layout.pack(torch.randint(0, 2**bits, (n, k), generator=g, dtype=torch.uint8), bits, 8),
        "scale": torch.randint(1, 4, shape, generator=g).float(),
        "zero": torch.randint(0, 2**bits, shape, generator=g, dtype=torch.uint8) if zero else None,
        "bias": None,
        "bits": bits,
        "group": group,
        "offset": 0.5 if bits == 1 else 2.0 ** (bits - 1),
        "dtype": torch.float32,
    } | given


def _check(case: dict[str, object], config: Config, device: torch.device) -> None:
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in case.items()}
    moved["planes"] = [plane.to(device) for plane in case["planes"]]
    y = int8.packed_linear_int8(**moved, config=config)
    assert torch.equal(y.cpu(), packed_linear_int8(**case))


@pytest.mark.parametrize("bits", layout.PLANES)
@pytest.mark.parametrize("group", [0, 64])
def test_every_width_is_exact_at_ragged_sizes(bits: int, group: int, device: torch.device) -> None:
    _check(_case(bits, group=group), SMALL, device)


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
@pytest.mark.parametrize(("group", "splits"), [(0, 1), (0, 2), (96, 1), (32, 2)])
def test_zero_points_of_both_sides_are_exact(bits: int, group: int, splits: int, device: torch.device) -> None:
    z = torch.tensor([[-128], [5], [127]], dtype=torch.int8)
    config = Config(16, 8, 8, splits, 4, 3)
    _check(_case(bits, group=group, zero=True, input_zero=z), config, device)
