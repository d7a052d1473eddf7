"""The catalogue: tables of all registered passes and presets, for the terminal and for the documentation."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields

from rich.table import Table

from passes import registry
from passes.base import Pass
from passes.presets import PRESETS


@dataclass(frozen=True)
class Sheet:
    """A table of text."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """As a Markdown table."""
        lines = [self.header, tuple("---" for _ in self.header), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

    def rich(self) -> Table:
        """For a terminal."""
        table = Table(*self.header, show_lines=True)
        for row in self.rows:
            table.add_row(*(cell.replace("`", "") for cell in row))
        return table


def catalogue() -> tuple[Sheet, Sheet]:
    """All passes, and all presets."""
    known = registry.passes()
    passes = tuple((f"`{name}`", kind.effect.value, _code(_options(kind)), summary(kind)) for name, kind in known.items())
    presets = tuple(
        (f"`{name}`", preset.summary, _code(_parameters(preset.make)), _code([str(preset.make())])) for name, preset in PRESETS.items()
    )
    return Sheet(("pass", "effect", "options", "what it does"), passes), Sheet(("preset", "what it is", "options", "pipeline"), presets)


def markdown() -> str:
    """The tables of `docs/reference/passes.md`."""
    return "\n\n".join(sheet.markdown() for sheet in catalogue())


def summary(kind: type[Pass]) -> str:
    """The first line of a pass's docstring."""
    return (inspect.getdoc(kind) or "").partition("\n")[0]


def _options(kind: type[Pass]) -> list[str]:
    return [f"{field.name}={field.default!r}" for field in fields(kind)]


def _parameters(make: object) -> list[str]:
    parameters = inspect.signature(make).parameters.values()  # type: ignore[arg-type]
    return [f"{p.name}={p.default!r}" for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


def _code(items: Sequence[str]) -> str:
    return ", ".join(f"`{item}`" for item in items)
