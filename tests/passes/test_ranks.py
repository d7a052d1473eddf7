"""Several processes on this machine against one: the same bits; and one of them dies."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from ir.errors import OptionError
from passes.commands.cli import app
from passes.ranks import LANES, Ranks
from tests.passes.ranked import CASES, outcome

PATIENCE = 500  # seconds: for machines that do much else
ROOT = Path(__file__).parents[2]
ALONE = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def started(world: int, *arguments: object) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that find one another as torchrun's do; none is left in the end."""
    known = os.environ | ALONE | {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "tests.passes.ranked", *map(str, arguments)]
    made = [
        subprocess.Popen(command, cwd=ROOT, env=known | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True) for rank in range(world)
    ]
    try:
        yield made
    finally:
        for process in made:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.thorough)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """How many processes have run all cases, and where they wrote what came out."""
    found = tmp_path_factory.mktemp("ranks")
    with started(request.param, found, *CASES) as processes:
        for process in processes:
            _, said = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, said
    return request.param, found


@pytest.mark.parametrize("case", CASES)
def test_several_processes_find_what_one_finds(case: str, folder: tuple[int, Path]) -> None:
    world, path = folder
    alone, told = outcome(case, Ranks())
    for rank in range(world):
        found = load_file(path / f"{case}.{rank}.safetensors")
        assert found.keys() == alone.keys()
        assert not [name for name, tensor in alone.items() if not torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))]
        assert json.loads((path / f"{case}.{rank}.json").read_text()) == told


@pytest.mark.parametrize(("case", "says"), [("dies", "another process of this run has ended"), ("hangs", "another process of this run")])
def test_a_process_that_dies_or_hangs_ends_the_others_and_nothing_is_written(case: str, says: str, tmp_path: Path) -> None:
    with started(2, tmp_path, case) as (first, _):
        _, said = first.communicate(timeout=PATIENCE)
        assert first.returncode == 1
    assert says in said and "remedy: if another process has failed" in said
    assert not list(tmp_path.iterdir())


def test_processes_that_were_given_other_things_are_refused(tmp_path: Path) -> None:
    with started(2, tmp_path, "differs") as processes:
        for process in processes:
            _, said = process.communicate(timeout=PATIENCE)
            assert process.returncode == 1
            assert "process 1 has another pipeline, model, calibration data, seed or version than process 0" in said
    assert not list(tmp_path.iterdir())


def test_torchrun_writes_the_folder_that_one_process_writes(checkpoint: Path, tmp_path: Path) -> None:
    command = ["compile", str(checkpoint / "tiny-llama"), "--calibration", str(checkpoint / "calibration.txt"), "--samples", "24"]
    command += ["--window", "32", "--pipeline", "w4a16", "--backend", "reference", "--out"]
    one = CliRunner().invoke(app, [*command, str(tmp_path / "one")])
    assert one.exit_code == 0, one.output
    several = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    several = [sys.executable, *several, "-m", "passes", *command, str(tmp_path / "two")]
    two = subprocess.run(several, cwd=ROOT, env=os.environ | ALONE, check=False, capture_output=True, text=True, timeout=PATIENCE)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("effective bits") == 1  # printed once
    for file in sorted((tmp_path / "one").iterdir()):
        if not file.name.startswith("report"):  # which has times
            assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8, 11])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 16, 21])
def test_every_batch_has_one_owner_and_neighbours_lie_in_lanes(count: int, world: int) -> None:
    shares = [Ranks(rank, world).share(count) for rank in range(world)]
    assert sorted(index for share in shares for index in share) == list(range(count))
    lanes = Ranks(0, world).lanes(count)
    assert [index for lane in lanes for index in lane] == list(range(count))
    assert len(lanes) == min(count, max(LANES, world))
    assert max(map(len, lanes), default=0) - min(map(len, lanes), default=0) <= 1


def test_sums_of_one_process_are_sums_of_lanes_in_order() -> None:
    values = torch.randn(21, 4, 3, generator=torch.Generator().manual_seed(0))

    def take(index: int, sums: list[torch.Tensor]) -> None:
        sums[0].add_(values[index])
        sums[1].add_(1)

    total, count = Ranks().total(21, lambda: [torch.zeros(4, 3), torch.zeros((), dtype=torch.int64)], take)
    lanes = [sum((values[index] for index in lane), torch.zeros(4, 3)) for lane in Ranks().lanes(21)]
    assert torch.equal(total, sum(lanes[1:], lanes[0])) and int(count) == 21


def test_work_is_dealt_evenly() -> None:
    work = {name: float(size) for name, size in zip("abcdefg", (9, 7, 6, 5, 5, 4, 2), strict=True)}
    owner = Ranks(0, 2).dealt(work)
    load = [sum(work[name] for name in work if owner[name] == rank) for rank in (0, 1)]
    assert sorted(load) == [18, 20]
    assert set(Ranks().dealt(work).values()) == {0}


def test_one_process_says_and_is_told_by_itself() -> None:
    assert Ranks().told(lambda: {"a": [1, 0.1]}) == {"a": [1, 0.1]}
    assert Ranks().everyone("x") == ["x"]
    Ranks().agree(1, "number")


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "two"}, {"WORLD_SIZE": "2", "RANK": "2"}, {"WORLD_SIZE": "2", "RANK": "0"}])
def test_variables_that_torchrun_does_not_set_are_refused(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert Ranks.from_environment() == Ranks()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match="torchrun"):
        Ranks.from_environment()
