"""Faults from outside: full disks, signals, damaged files, two at once. `docs/reference/faults.md` lists them with their tests."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import passes
from ir.errors import BackendError, DataError
from passes import registry
from passes.commands.cli import app
from passes.folders import claimed

ROOT = Path(__file__).parents[1]
SLOW = """
import sys, time
from pathlib import Path
from passes import compiled
mark = Path(sys.argv.pop(1))
def wait(tokenizer, folder):  # all other files of the result are written by now
    mark.touch()
    time.sleep(120)
compiled._save_tokenizer = wait
from passes.commands.cli import app
app()
"""


@pytest.fixture
def model(checkpoint: Path) -> Path:
    return checkpoint / "tiny-llama"


def arguments(model: Path, out: Path, backend: str = "reference", *more: str) -> list[str]:
    return ["compile", str(model), "--pipeline", "w8a16", "--backend", backend, "--out", str(out), *more]


def compile_to(model: Path, out: Path, backend: str = "reference", *more: str) -> Result:
    result = CliRunner().invoke(app, arguments(model, out, backend, *more))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def leftovers(out: Path) -> list[str]:
    return [path.name for path in out.parent.iterdir() if path.name.startswith(f".{out.name}.")]


@contextmanager
def writing(model: Path, out: Path, mark: Path) -> Iterator[subprocess.Popen[str]]:
    """A compile in a process of its own, in the middle of writing its result."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(mark), *arguments(model, out)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for _ in range(1200):
            if mark.exists():
                break
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.1)
        assert mark.exists()
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[Path]:
    """A small disk of its own."""
    folder.mkdir()
    made = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False)
        if shutil.which("mount")
        else None
    )
    if made is None or made.returncode:
        pytest.skip("mounting needs rights that this process does not have")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("backend", ["reference", "onnx", "hf"])
def test_a_disk_that_is_full_leaves_nothing(model: Path, tmp_path: Path, backend: str) -> None:
    with tmpfs(tmp_path / "disk", "size=64k") as disk:
        result = compile_to(model, disk / "out", backend)
        assert result.exit_code == 1
        assert "cannot write" in result.stderr and "remedy" in result.stderr
        assert list(disk.iterdir()) == []


@pytest.mark.parametrize("backend", ["reference", "onnx", "hf"])
def test_a_file_that_may_not_grow_leaves_nothing(model: Path, tmp_path: Path, backend: str) -> None:
    out = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, limits[1]))
    try:
        result = compile_to(model, out, backend)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.exit_code == 1
    assert "cannot write" in result.stderr or "ONNX" in result.stderr
    assert not out.exists() and not leftovers(out)


def test_a_folder_that_cannot_be_written_is_refused_at_once(model: Path, tmp_path: Path) -> None:
    if os.geteuid():
        (tmp_path / "disk").mkdir(mode=0o555)
        result = compile_to(model, tmp_path / "disk" / "out")
    else:
        with tmpfs(tmp_path / "disk", "ro") as disk:
            result = compile_to(model, disk / "out")
    assert result.exit_code == 1 and "nothing can be written there" in result.stderr
    assert "pass" not in result.stderr


def test_a_file_in_the_way_is_refused_at_once(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for out, more in ((tmp_path / "out", ()), (tmp_path / "out", ("--overwrite",)), (tmp_path / "out" / "below", ())):
        result = compile_to(model, out, "reference", *more)
        assert result.exit_code == 1 and "error: " in result.stderr
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_a_signal_in_the_middle_of_writing_leaves_nothing(model: Path, tmp_path: Path, number: int, code: int, word: str) -> None:
    out = tmp_path / "out"
    with writing(model, out, tmp_path / "mark") as process:
        assert leftovers(out)
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
    assert process.returncode == code
    assert word in told and "Traceback" not in told
    assert not out.exists() and not leftovers(out)


def test_two_at_once_and_kill_nine(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with writing(model, out, tmp_path / "mark") as process:
        second = compile_to(model, out)
        assert second.exit_code == 1 and "another process is writing this folder" in second.stderr
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        assert not out.exists() and len(leftovers(out)) == 2  # what it wrote, and its lock
        assert compile_to(model, out).exit_code == 0
        assert not leftovers(out)
        passes.load(out)


def test_a_result_that_was_about_to_be_replaced_comes_back(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert compile_to(model, out).exit_code == 0
    out.rename(tmp_path / ".out.old-1")  # as a process leaves it that is killed between its two renames
    (tmp_path / ".out.partial-1").mkdir()
    assert compile_to(model, out, "reference", "--overwrite").exit_code == 0
    assert not leftovers(out)
    out.rename(tmp_path / ".out.old-1")
    with claimed(out):
        passes.load(out)


def damaged(model: Path, folder: Path, change: Callable[[bytearray], bytes]) -> Path:
    """A copy of a folder whose weights are changed."""
    shutil.copytree(model, folder)
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(change(bytearray(path.read_bytes())))
    return folder


def flipped(content: bytearray, place: int, bit: int = 4) -> bytes:
    content[place] ^= 1 << bit
    return bytes(content)


DAMAGES: dict[str, Callable[[bytearray], bytes]] = {
    "nothing left": lambda content: b"",
    "the end is missing": lambda content: bytes(content[: len(content) // 2]),
    "one byte is missing": lambda content: bytes(content[:-1]),
    "a bit of the header's size": lambda content: flipped(content, 2),
    "a bit of the header": lambda content: flipped(content, 9),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(model: Path, tmp_path: Path, damage: str) -> None:
    result = compile_to(damaged(model, tmp_path / "model", DAMAGES[damage]), tmp_path / "out")
    assert result.exit_code == 1
    assert "error: " in result.stderr and str(tmp_path / "model") in result.stderr
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_named(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][3, 5] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    result = compile_to(tmp_path / "model", tmp_path / "out")
    assert result.exit_code == 1 and name in result.stderr and "1 values that are not finite" in result.stderr


def test_a_flipped_bit_in_weights_is_found_by_a_replay(model: Path, tmp_path: Path) -> None:
    assert compile_to(model, tmp_path / "out").exit_code == 0
    other = damaged(model, tmp_path / "model", lambda content: flipped(content, len(content) - 100))
    recipe = str(tmp_path / "out" / "recipe.yaml")
    result = CliRunner().invoke(app, ["compile", str(other), "--recipe", recipe, "--out", str(tmp_path / "again")])
    assert result.exit_code == 1 and "other weights" in result.stderr


@pytest.mark.parametrize("backend", ["reference", "hf"])
def test_a_damaged_result_is_refused(model: Path, tmp_path: Path, backend: str) -> None:
    assert compile_to(model, tmp_path / "out", backend).exit_code == 0
    for damage, change in DAMAGES.items():
        with pytest.raises(DataError):
            passes.load(damaged(tmp_path / "out", tmp_path / damage, change))


def test_a_damaged_onnx_model_is_refused(model: Path, tmp_path: Path) -> None:
    assert compile_to(model, tmp_path / "out", "onnx").exit_code == 0
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copytree(tmp_path / "out", tmp_path / name)
        content = (tmp_path / name / name).read_bytes()
        (tmp_path / name / name).write_bytes(content[: len(content) // 2])
        with pytest.raises((DataError, BackendError)):
            passes.load(tmp_path / name)


def test_a_backend_that_fails_its_gate_writes_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from backends.onnx_qdq import proof

    monkeypatch.setattr(proof, "difference", lambda ours, oracle: 0.7)
    result = compile_to(model, tmp_path / "out", "onnx")
    assert result.exit_code == 1 and "7.0e-01" in result.stderr and "remedy" in result.stderr
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path / "out")
    assert registry.backend("onnx").name == "onnx"


def test_one_sample_that_is_not_finite_is_named() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    batches = [torch.randn(64, 8) for _ in range(3)]
    batches[1][2] = 3e38  # finite itself, and not what the first linear makes of it
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    for pipeline in ("w4a16(group=8)", "annotate(scheme='W8A8', dynamic=False), round_weights, observe, quantize"):
        with pytest.raises(DataError, match="calibration batch 1, sample 2"):
            passes.compile(model, pipeline, batches, args=(batches[0],))


def test_every_fault_of_the_table_has_its_test() -> None:
    page = (ROOT / "docs" / "reference" / "faults.md").read_text(encoding="utf-8")
    rows = [line.strip().strip("|").split("|") for line in page.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row[-1])
        assert named, row
        for file, test in named:
            assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), (file, test)
