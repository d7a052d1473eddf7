"""The documentation is true: its examples run, and its tables are those that the code makes."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from passes import catalogue
from passes.cli import app

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "passes/README.md")
BEGIN, END = "<!-- made by `fxpress passes --markdown`; tests/test_readme.py checks it -->\n", "\n<!-- end -->"


def blocks(readme: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / readme).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def here(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with small `fixtures/`, as the current one."""
    (tmp_path / "fixtures").symlink_to(checkpoint, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("readme", READMES)
def test_python_examples_run(readme: str, here: Path) -> None:
    found = blocks(readme, "python")
    assert found
    namespace: dict[str, object] = {"__name__": "readme"}
    for index, block in enumerate(found):
        exec(compile(block, f"{readme}, python block {index + 1}", "exec"), namespace)


def test_commands_run(here: Path) -> None:
    lines = [line for block in blocks("README.md", "bash") for line in block.splitlines()]
    assert lines
    for line in lines:
        command, *arguments = shlex.split(line)
        assert command == "fxpress"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{line}\n{result.output}"


def test_the_table_of_passes_is_current() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count(BEGIN) == 1
    table = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert table == catalogue.markdown(), "put the output of `fxpress passes --markdown` between the markers"


@pytest.mark.parametrize("readme", [*READMES, "fixtures/README.md"])
def test_what_it_links_to_and_names_exists(readme: str) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    named = re.findall(r"`((?:ir|passes|backends|tests|tools)/[\w/]+\.(?:py|md))`", text)
    assert all(((ROOT / readme).parent / link).exists() for link in links)
    assert all((ROOT / name).exists() for name in named)
