from dataclasses import replace

import pytest

from backends.triton_gpu import select
from backends.triton_gpu.select import Config, Form, choose, estimate

WIDTHS = range(1, 9)


@pytest.mark.parametrize("arch", select.DEVICES)
def test_there_are_forms_of_every_width(arch: int) -> None:
    for bits in WIDTHS:
        assert {form.config.tile_m for form in select.forms(arch, bits)} >= {8, 16, 32}
        assert all(form.shared <= select.DEVICES[arch].shared for form in select.forms(arch, bits))


@pytest.mark.parametrize("arch", [*select.DEVICES, 86, 100])
def test_few_tokens_take_small_tiles_and_many_a_whole_weight(arch: int) -> None:
    chosen = [choose("packed_linear", 4, m, 8192, 8192, 128, arch) for m in (1, 16, 64, 16384)]
    assert [config.kernel for config in chosen] == ["linear"] * 3 + ["dequantize"]
    tiles = [config.tile_m for config in chosen[:3]]
    assert tiles[0] == 8 and tiles == sorted(tiles)


def test_a_weight_of_few_channels_is_split() -> None:
    assert choose("packed_linear", 4, 1, 256, 8192, 128, 90).split > choose("packed_linear", 4, 1, 65536, 1024, 128, 90).split == 1


def test_what_was_timed_goes_before_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"kernel": "packed_linear", "arch": 90, "bits": 4, "n": 4096, "k": 4096, "group": 128}
    timed = [row | {"m": m, "config": {"tile_m": m, "split": 7}} for m in (64, 16)]
    monkeypatch.setattr(select, "_table", lambda: {"forms": [], "timed": timed})
    assert choose("packed_linear", 4, 9, 4096, 4096, 128, 90) == Config(tile_m=16, split=7)
    assert choose("packed_linear", 4, 17, 4096, 4096, 128, 90).tile_m == 64
    assert choose("packed_linear", 4, 65, 4096, 4096, 128, 90) == Config("dequantize")
    assert choose("packed_linear", 4, 9, 4096, 4096, 64, 90) == Config("dequantize")


def test_the_model_takes_the_slowest() -> None:
    form = Form(90, 4, Config(tile_m=8, tile_n=64), 2.0, 64, 20000)
    base = estimate(form, 1, 65536, 8192, form.config)
    assert estimate(replace(form, per_weight=20.0), 1, 65536, 8192, form.config) > 4 * base  # instructions
    assert estimate(replace(form, bits=8, per_weight=0.1), 1, 65536, 8192, form.config) > base  # bytes
    assert estimate(form, 8, 65536, 8192, form.config) < 1.1 * base < estimate(form, 9, 8192, 8192, form.config)
