"""The arrows between layers: `ir <- passes <- backends`, and passes do not know one another."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from passes import registry

ROOT = Path(__file__).parents[1]
LAYERS = ("ir", "passes", "backends")
WHOLE = {
    "tests/backends/hf/test_parity.py",
    "tests/backends/onnx_qdq/test_generation.py",
    "tests/backends/onnx_qdq/test_models.py",
    "tests/backends/onnx_qdq/test_transforms.py",
    "tests/passes/test_laws.py",
}  # test a package as a whole
FORBIDDEN = {"ir": {"passes", "backends", "tools", "tests"}, "passes": {"backends", "tools", "tests"}, "backends": {"tools", "tests"}}


def files(layer: str) -> list[Path]:
    return sorted((ROOT / layer).rglob("*.py"))


def imported(file: Path) -> Iterator[str]:
    """Full names of all that a file imports, inside of functions too; `from passes import untie` is `passes.untie`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("layer", LAYERS)
def test_no_layer_imports_one_above_it(layer: str) -> None:
    wrong = [f"{file}: {name}" for file in files(layer) for name in imported(file) if name.partition(".")[0] in FORBIDDEN[layer]]
    assert not wrong


@pytest.mark.parametrize("module", registry.MODULES)
def test_passes_do_not_import_one_another(module: str) -> None:
    others = {f"passes.{other}" for other in registry.MODULES if other != module}
    wrong = [name for name in imported(ROOT / "passes" / f"{module}.py") if name in others or name.rpartition(".")[0] in others]
    assert not wrong


def test_every_module_says_what_it_is() -> None:
    silent = [
        file for layer in LAYERS for file in files(layer) if file.stat().st_size and not ast.get_docstring(ast.parse(file.read_text()))
    ]
    assert not silent


@pytest.mark.parametrize("layer", LAYERS)
def test_tests_mirror_the_tree(layer: str) -> None:
    strays = []
    for test in sorted((ROOT / "tests" / layer).rglob("test_*.py")):
        subject = ROOT / test.relative_to(ROOT / "tests").with_name(test.name.removeprefix("test_"))
        if not subject.is_file() and not subject.with_suffix("").is_dir():
            strays.append(str(test.relative_to(ROOT)))
    assert not set(strays) - WHOLE
