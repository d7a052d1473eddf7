"""Runs that die by SIGKILL at chosen places, and the same command again: the same bits, and nothing half-written under the final name."""

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import passes
from passes.memo.folder import Memo
from passes.progress import Progress
from tests.families import load
from tests.passes.samples import CALIBRATION

PIPELINE = "mixed(bits=3.2, steps=6, own_text=False)"


@dataclass(frozen=True)
class Deadly(Progress):
    """Kills its own process at an item of a loop."""

    loop: str = ""
    after: int = 0

    def track(self, items, doing):
        for index, item in enumerate(items):
            if doing == self.loop and index == self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item


def compiled(folder: Path, progress: Progress | None = None) -> None:
    made = passes.compile(load("llama").captured, PIPELINE, CALIBRATION, cache=Memo(folder / "cache", seconds=0.0), progress=progress)
    made.save(folder / "out")


def status(folder: Path, progress: Progress | None = None) -> int:
    """How a compile in a process of its own ends."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            compiled(folder, progress)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def bits(folder: Path) -> dict[str, bytes]:
    """What the files of a result hold; reports tell of their own run."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith("report.")}


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_killed_run_goes_on_and_gives_the_same_bits(tmp_path):
    torch.set_num_threads(1)
    load("llama")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    assert status(whole) == 0
    kept = 0
    for loop, after in (("predict", 2), ("gradients", 1), ("learn rounding", 4)):
        assert status(killed, Deadly(loop=loop, after=after)) == -signal.SIGKILL, loop
        assert not (killed / "out").exists()
        assert len(Memo(killed / "cache").entries()) > kept, "nothing was kept on the way"
        kept = len(Memo(killed / "cache").entries())
    assert status(killed) == 0
    assert bits(killed / "out") == bits(whole / "out")
    assert [file.name for file in killed.iterdir() if file.name.startswith(".")] == []
