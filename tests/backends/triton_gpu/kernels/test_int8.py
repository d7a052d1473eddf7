from dataclasses import replace

import pytest
import torch

from backends.triton_gpu import layout, select
from backends.triton_gpu.kernels import int8
from backends.triton_gpu.ops.linear import packed_linear_int8
from backends.triton_gpu.select import DEVICES, Config, near
from ir.errors import OptionError

SMALL = Config("linear", tile_m=8, tile_n=32, spans=1)
ZEROS = torch.tensor([[-128], [5], [127]], dtype=torch.int8)


def _case(bits: int, *, m: int = 3, n: int = 20, k: int = 300, group: int = 0, zero: bool = False, **given: object) -> dict[str, object]:
    """Arguments of the operator: scales that are whole numbers, so that results are, too, and comparisons exact."""
    g = torch.Generator().manual_seed(bits)
    group = group or k
    shape = -(-k // group), n
    return {
        "codes": torch.randint(-128, 128, (m, k), generator=g, dtype=torch.int8),
        "input_scale": torch.randint(1, 3, (m, 1), generator=g).float(),
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


def _both(case: dict[str, object], config: Config | None, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in case.items()}
    moved["planes"] = [plane.to(device) for plane in case["planes"]]
    return int8.packed_linear_int8(**moved, config=config).cpu(), packed_linear_int8(**case)


def _same(case: dict[str, object], config: Config | None, device: torch.device) -> None:
    made, expected = _both(case, config, device)
    assert torch.equal(made, expected)


@pytest.mark.parametrize("bits", layout.PLANES)
@pytest.mark.parametrize("group", [0, 64])
def test_every_width_is_exact_at_ragged_sizes(bits: int, group: int, device: torch.device) -> None:
    _same(_case(bits, group=group), SMALL, device)


@pytest.mark.parametrize(("bits", "group", "split"), [(1, 0, 2), (3, 96, 1), (4, 32, 2), (4, 0, 3), (8, 64, 1), (6, 0, 1)])
def test_zero_points_of_both_sides_are_exact(bits: int, group: int, split: int, device: torch.device) -> None:
    _same(_case(bits, k=200, group=group, zero=True, input_zero=ZEROS), replace(SMALL, split=split), device)


@pytest.mark.parametrize(("bits", "offset"), [(2, 1.0), (2, 1.5), (3, 0.0), (4, 7.5)])
def test_other_offsets_than_the_middle_are_exact(bits: int, offset: float, device: torch.device) -> None:
    _same(_case(bits, k=128, offset=offset), SMALL, device)


def test_zero_points_of_activations_alone_are_exact(device: torch.device) -> None:
    _same(_case(4, k=100, input_zero=ZEROS), SMALL, device)
    _same(_case(4, k=128, input_scale=torch.ones(1), input_zero=ZEROS[1]), SMALL, device)


def test_tiles_of_both_sides_meet(device: torch.device) -> None:
    case = _case(4, m=20, n=40, k=128, bias=torch.arange(40.0))
    _same(case, Config("linear", tile_m=8, tile_n=16, spans=2), device)


def test_floating_scales_agree_and_results_have_their_dtype_and_shape(device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    for dtype, split in ((torch.float16, 1), (torch.bfloat16, 2)):
        case = _case(4, m=6, k=160, group=64, dtype=dtype, bias=torch.randn(20, generator=g).to(dtype))
        case |= {"scale": torch.rand(3, 20, generator=g).half(), "input_scale": torch.rand(2, 3, 1, generator=g)}
        case["codes"] = case["codes"].view(2, 3, 160)
        made, expected = _both(case, replace(SMALL, split=split), device)
        torch.testing.assert_close(made, expected)


def test_no_tokens_are_no_work(device: torch.device) -> None:
    _same(_case(4, m=0), None, device)


def test_no_sum_leaves_32_bits() -> None:
    for k in (300, 40_000, 131_072, 1_000_000):
        for zeros, greatest in ((False, 128 * 128), (True, 255 * 255)):
            steps, parts = int8.parts_of(k, 8, 1, False, zeros)
            assert 256 * steps * greatest < 2**31 and 256 * steps * (parts - 1) < k <= 256 * steps * parts
        assert int8.parts_of(k, 8, 1, True, True)[1] == 1  # sums of groups are short


def test_what_the_kernel_has_no_integers_for_is_refused() -> None:
    with pytest.raises(OptionError, match="multiple of 32"):
        int8.packed_linear_int8(**_case(4, group=48))
    with pytest.raises(OptionError, match="steps of"):
        int8.packed_linear_int8(**_case(8, offset=127.5))


@pytest.mark.parametrize("arch", [*DEVICES, 120])
@pytest.mark.parametrize("zeros", [False, True])
def test_a_form_fits_the_device_and_fills_it(arch: int, zeros: bool) -> None:
    device = DEVICES[near(arch)]
    for bits in layout.PLANES:
        for m in (1, 16, 64, 65, 4096):
            for group in (128, 4096):
                form = int8.choose(bits, m, 4096, 4096, group, arch, zeros)
                assert int8.shared(form, bits) <= device.shared
                assert form.tile_m >= min(m, 16 if zeros and group == 128 else 64)  # sums of zero points take registers
        assert int8.choose(bits, 1, 4096, 4096, 128, arch).split > 1 == int8.choose(bits, 4096, 4096, 4096, 128, arch).split


def test_what_was_timed_goes_before_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"kernel": "packed_linear_int8", "arch": 90, "bits": 4, "n": 4096, "k": 4096, "group": 4096, "m": 16}
    monkeypatch.setattr(select, "_table", lambda: {"forms": [], "timed": [row | {"config": {"tile_m": 16, "split": 7}}]})
    assert int8.choose(4, 9, 4096, 4096, 4096, 90) == Config(tile_m=16, split=7)
    assert int8.choose(4, 9, 4096, 4096, 4096, 90, zeros=True) != Config(tile_m=16, split=7) != int8.choose(4, 9, 4096, 4096, 4096, 80)
