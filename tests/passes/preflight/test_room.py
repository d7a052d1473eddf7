import pytest

from ir.errors import DataError
from passes.base import Context
from passes.preflight import room
from passes.preflight.estimates import Estimate, Step
from passes.preflight.resources import Memory
from passes.preflight.room import check_room

GB = 10**9
STEP = Step("round_weights", 1.0, 0.0, 0.0, 0.0, Memory(3 * GB, 2 * GB), 0, 0)
FOUND = Estimate((STEP,), 4 * GB, GB, Memory(GB, GB), 32, 1, 1.0)


@pytest.mark.parametrize(
    ("disk", "memory", "said"), [(4 * GB, 99 * GB, "4.00 GB free, and about"), (99 * GB, 2 * GB, "2.00 GB of memory are free")]
)
def test_what_does_not_fit_is_refused(tmp_path, monkeypatch, disk, memory, said):
    monkeypatch.setattr(room, "free_disk", lambda path: disk)
    monkeypatch.setattr(room, "free_memory", lambda: memory)
    with pytest.raises(DataError, match=said) as found:
        check_room(FOUND, Context(), tmp_path / "out")
    assert found.value.remedy
    assert found.value.where in {"round_weights", *found.value.where.splitlines()}


def test_what_fits_passes_and_what_is_not_known_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "free_disk", lambda path: 9 * GB)
    monkeypatch.setattr(room, "free_memory", lambda: None)
    ctx = Context()
    check_room(FOUND, ctx, tmp_path / "out")
    assert any("does not tell how much memory is free" in note for note in ctx.notes)


def test_without_a_folder_only_temporary_files_count(monkeypatch):
    monkeypatch.setattr(room, "free_disk", lambda path: 2 * GB)
    monkeypatch.setattr(room, "free_memory", lambda: 99 * GB)
    check_room(FOUND, Context(), None)
