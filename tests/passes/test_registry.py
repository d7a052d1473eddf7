from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest

from ir.errors import OptionError
from passes import registry
from passes.base import Effect, Pass
from passes.pipeline import Pipeline


@dataclass(frozen=True)
class Polish(Pass):
    """Polish the graph."""

    grit: int = 80
    effect: ClassVar[Effect] = Effect.PRESERVE

    def run(self, gm, ctx):
        return 0


class Elsewhere:
    """A third party's backend."""

    name = "elsewhere"


@pytest.fixture
def third_party(monkeypatch):
    """Entry points of a distribution that is not installed."""
    original = registry.entry_points
    added = {
        "fxpress.passes": [EntryPoint("polish", f"{__name__}:Polish", "fxpress.passes")],
        "fxpress.backends": [EntryPoint("elsewhere", f"{__name__}:Elsewhere", "fxpress.backends")],
    }
    monkeypatch.setattr(registry, "entry_points", lambda group: [*original(group=group), *added[group]])


@pytest.mark.usefixtures("third_party")
def test_third_parties_add_passes_and_backends():
    assert registry.passes()["polish"].__name__ == "Polish"
    (step,) = Pipeline.parse("polish(grit=120)")
    assert (type(step).__name__, step.grit) == ("Polish", 120)
    assert str(step) == "polish(grit=120)"
    assert registry.backend("elsewhere").name == "elsewhere"


def test_they_are_gone_where_they_are_not_installed():
    with pytest.raises(OptionError):
        Pipeline.parse("polish")
    with pytest.raises(OptionError, match="no backend 'elsewhere'"):
        registry.backend("elsewhere")


def test_the_projects_own_passes_are_registered():
    names = list(registry.passes())
    assert names[: len(registry.MODULES)] == list(registry.MODULES)
    assert all(kind.name() == name for name, kind in registry.passes().items())


def test_presets_make_pipelines_and_share_no_name_with_passes():
    presets = registry.presets()
    assert set(presets).isdisjoint(registry.passes())
    assert all(isinstance(make(), Pipeline) for make in presets.values())


@pytest.mark.parametrize("name", ["reference", "onnx"])
def test_backends_go_by_name(name):
    assert registry.backend(name).name == name
