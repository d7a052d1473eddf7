"""The documentation is true: its examples run, its tables are those that the code makes, and what it names exists.

Links between pages, and the reference from docstrings, are checked by `make docs`.
"""

import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from passes import registry
from passes.commands import catalogue
from passes.commands.cli import app

ROOT = Path(__file__).parents[1]
FRONT, TABLES = "README.md", "docs/reference/passes.md"
PAGES = [FRONT, *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
OTHERS = ["passes/README.md", "fixtures/README.md"]  # pages without examples
FENCED = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BEGIN, END = "<!-- made by `fxpress passes --markdown`; tests/test_docs.py checks it -->\n", "\n<!-- end -->"


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[str, str]]:
    """The language and the text of every block, in order."""
    return FENCED.findall(read(page))


def run_python(text: str, name: str, namespace: dict[str, Any]) -> None:
    exec(compile(text, name, "exec"), namespace)


def run_commands(text: str, name: str, namespace: dict[str, Any]) -> None:
    lines = text.replace("\\\n", " ").splitlines()
    assert lines
    for line in lines:
        command, *arguments = shlex.split(line)
        assert command == "fxpress", f"{name}: only fxpress is run, not {line}"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{name}: {line}\n{result.output}"


def run_toml(text: str, name: str, namespace: dict[str, Any]) -> None:
    assert tomllib.loads(text), name


# What becomes of a block; those in `SHOWN` are not run: pictures and output, and commands that make environments.
RUNNERS: dict[str, Callable[[str, str, dict[str, Any]], None]] = {"python": run_python, "bash": run_commands, "toml": run_toml}
SHOWN = {"text", "sh"}


@pytest.fixture
def here(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with small `fixtures/`, as the current one."""
    (tmp_path / "fixtures").symlink_to(checkpoint, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if any(language in RUNNERS for language, _ in blocks(page))])
def test_its_examples_run(page: str, here: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "page"}
    for index, (language, text) in enumerate(blocks(page)):
        if language in RUNNERS:
            RUNNERS[language](text, f"{page}, block {index + 1}", namespace)


@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_no_block_escapes(page: str) -> None:
    found = blocks(page)
    assert {language for language, _ in found} <= {*RUNNERS, *SHOWN}
    assert read(page).count("```") == 2 * len(found)
    assert page not in OTHERS or not found


def test_the_table_of_passes_is_current() -> None:
    assert [page for page in PAGES if BEGIN in read(page)] == [TABLES]
    assert read(TABLES).count(BEGIN) == 1
    table = read(TABLES).partition(BEGIN)[2].partition(END)[0].strip()
    assert table == catalogue.markdown(), f"put the output of `fxpress passes --markdown` between the markers in {TABLES}"


def test_the_reference_has_every_pass() -> None:
    named = re.findall(r"^::: passes\.(\w+)\.\w+$", read(TABLES), re.MULTILINE)
    assert [name for name in named if name in registry.MODULES] == list(registry.MODULES)


def measured(page: str) -> list[str]:
    """The figures with decimals in the tables of a page, in the columns that are called "ours", or begin with "measured"."""
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", read(page), re.MULTILINE):
        header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
        columns = [index for index, name in enumerate(header) if name == "ours" or name.startswith("measured")]
        found += [figure for row in rows for index in columns for figure in re.findall(r"\d+\.\d+", row[index])]
    return found


@pytest.mark.parametrize("page", [FRONT, "docs/results/smoothrot.md", "docs/results/global-error.md"])
def test_figures_are_those_of_the_results(page: str) -> None:
    results = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tools/results").glob("*.md"))
    known = set(re.findall(r"\d+\.\d+", results))
    figures = measured(page)
    assert figures
    assert not [figure for figure in figures if figure not in known]


@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_what_it_links_to_and_names_exists(page: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", read(page))
    named = re.findall(r"`((?:ir|passes|backends|tests|tools|docs)/[\w/-]+\.(?:py|md))`", read(page))
    assert not [link for link in links if not ((ROOT / page).parent / link).exists()]
    assert not [name for name in named if not (ROOT / name).exists()]
