from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ir import edit
from ir.capture import capture
from ir.errors import CoverageError, DataError, FxpressError, GraphError, OptionError, PassError
from ir.match import aten, find
from ir.schemes import SCHEMES
from passes.annotate import Annotate
from passes.base import Context, Effect, Pass
from passes.calls import LONGEST
from passes.canonicalize import Canonicalize
from passes.fold_norm import FoldNorm
from passes.observe import Observe
from passes.pipeline import Pipeline
from passes.presets import PRESETS
from passes.probe import relative_error
from passes.quantize import Quantize
from passes.round_weights import RoundWeights
from passes.untie import Untie
from tests.passes.samples import Mlp, vectors

names = st.text(max_size=12)
anything = st.one_of(
    st.sampled_from([Canonicalize(), Untie(), FoldNorm()]),
    st.builds(Observe, gram=st.booleans(), file=names),
    st.builds(
        Annotate,
        scheme=st.sampled_from([scheme for scheme in SCHEMES if not scheme.startswith("W1")]),
        group=st.sampled_from([-1, 1, 64]),
        symmetric=st.booleans(),
        dynamic=st.booleans(),
        targets=st.lists(names, max_size=3).map(tuple),
        ignore=st.lists(names, max_size=3),
        head=st.booleans(),
    ),
    st.builds(RoundWeights, method=st.just("gptq"), damping=st.floats(0, 1, exclude_max=True), act_order=st.booleans()),
    st.builds(RoundWeights, method=st.just("nearest"), search=st.booleans()),
    st.builds(Quantize, quantile=st.floats(0, 1, exclude_min=True)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(anything, max_size=4).map(lambda steps: Pipeline(tuple(steps))))
def test_text_is_the_exact_inverse_of_parsing(pipeline):
    assert Pipeline.parse(str(pipeline)) == pipeline
    assert str(Pipeline.parse(str(pipeline))) == str(pipeline)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("untie", (Untie(),)),
        ("untie()", (Untie(),)),
        (" untie ,\n fold_norm, ", (Untie(), FoldNorm())),
        ("annotate(targets=['q_proj'], group=32)", (Annotate(group=32, targets=("q_proj",)),)),
        ("untie, w8a16", (Untie(), *PRESETS["w8a16"].make())),
        ("untie # the last one", (Untie(),)),
        ("", ()),
    ],
)
def test_text_that_people_write_is_read(text, expected):
    assert Pipeline.parse(text).passes == expected


HOSTILE = [
    "__import__('os').system('touch {flag}')",
    "__import__('os')",
    "__import__",
    "exec(a='1')",
    "untie.run",
    "untie.__class__()",
    "untie()()",
    "lambda: untie",
    "(untie, fold_norm)",
    "[untie]",
    "x for x in ()",
    "untie for untie in ()",
    "*untie",
    "untie(**{})",
    "untie(*())",
    "annotate(scheme=__import__('pathlib').Path('{flag}').touch())",
    'annotate(scheme=f\'{{open("{flag}", "w")}}\')',
    "annotate(scheme=(x := 'W8A8'))",
    "annotate(scheme=lambda: 0)",
    "annotate(group=[x for x in (1,)])",
    "annotate(group=2**64)",
    "annotate(scheme=0x" + "f" * 90_000 + ")",  # Python does not write it in decimal
    "round_weights(damping=0x" + "f" * 2_000 + ")",
    "annotate(scheme='W8A8'.lower())",
    "annotate(scheme='W8A8' if 1 else 'W4A16')",
    "x := untie",
    "untie = 1",
    "untie; fold_norm",
    "untie]; [fold_norm",
    "untie], [fold_norm",
    "untie\x00",
    "\ud800",
    "import os",
    "'untie'",
    "1",
    "-untie",
    "untie + fold_norm",
    "untie if 1 else fold_norm",
    "yield",
    "await untie",
    "untie(",
    "untie)",
    "a" + ".b" * 20_000,
    "-" * 20_000 + "1",
    "(" * 20_000,
    "(" * 150 + ")" * 150,
    "annotate(group=" + "-" * 20_000 + "1)",
    "annotate(group=" + "[" * 150 + "]" * 150 + ")",
    "annotate(group=" + "1+" * 20_000 + "1)",
    "untie" + "()" * 20_000,
    "untie," * LONGEST,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_refused_and_nothing_runs(text, tmp_path):
    flag = tmp_path / "flag"
    with pytest.raises(OptionError):
        Pipeline.parse(text.replace("{flag}", str(flag)))
    assert not flag.exists()


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="untie(),'\"=[]{}*.:;# \n0a\\", max_size=30))
def test_any_text_parses_or_is_refused(text):
    try:
        pipeline = Pipeline.parse(text)
    except OptionError:
        return
    assert Pipeline.parse(str(pipeline)) == pipeline


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("anotate", "did you mean 'annotate'"),
        ("w4a15", "did you mean 'w4a16'"),
        ("zzz", "there are"),
        ("annotate(scheme='W5A5')", "no scheme 'W5A5'"),
        ("annotate(sheme='W8A8')", "sheme"),
        ("annotate('W8A8')", "given by name"),
        ("annotate(group=0)", "at least one weight"),
        ("annotate(group=-2)", "at least one weight"),
        ("annotate(group=1.5)", "is a int"),
        ("annotate(group='64')", "is a int"),
        ("annotate(group=True)", "is a int"),
        ("annotate(symmetric='no')", "is a bool"),
        ("annotate(ignore='lm_head')", "is a tuple"),
        ("annotate(ignore=(1,))", "list of strings"),
        ("annotate(scheme='W1A16', symmetric=False)", "one bit"),
        ("annotate(scheme='W8A8', scheme='W4A4')", "given twice"),
        ("round_weights(method='best')", "no rounding 'best'"),
        ("round_weights(damping=-1)", "damping"),
        ("round_weights(damping='x')", "is a float"),
        ("quantize(quantile=0)", "quantile"),
        ("quantize(quantile=1.5)", "quantile"),
        ("quantize(quantile=1e999 )", "quantile"),
        ("observe(file=3)", "is a str"),
        ("w8a8(quantile=0.5)", "dynamic=False"),
        ("w4a16(bits=3)", "bits"),
        ("w4a16(3)", "given by name"),
        ("w4a16(group=0)", "at least one weight"),
        ("w4a16(rounding='floor')", "no rounding"),
        ("w4a16(ignore='lm_head')", "is a tuple"),
        ("annotate(scheme=W8A8)", "not a literal"),
    ],
)
def test_a_bad_name_or_option_is_refused_with_help(text, message):
    with pytest.raises(OptionError, match=message.replace("(", r"\(")):
        Pipeline.parse(text)


def test_pipelines_within_pipelines_are_flattened():
    inner = Pipeline.of([Untie(), FoldNorm()])
    assert Pipeline.of([Canonicalize(), inner]).passes == (Canonicalize(), Untie(), FoldNorm())
    assert Pipeline.of(Untie()).passes == (Untie(),)
    assert list(inner) == [Untie(), FoldNorm()]


@pytest.mark.parametrize("item", [Untie, "untie", None, 3])
def test_a_pipeline_takes_passes_only(item):
    with pytest.raises(OptionError, match="is not a pass"):
        Pipeline.of([item])


# Passes that break their promises.


def scale(gm, factor):
    node = gm.graph.find_nodes(op="get_attr")[0]
    edit.set_attribute(gm, node, edit.attribute(gm, node) * factor)


@dataclass(frozen=True)
class Edits(Pass):
    effect: ClassVar[Effect] = Effect.OBSERVE

    def run(self, gm, ctx):
        (node,) = find(gm, aten.relu.default)
        edit.replace(node, edit.emit(gm, aten.gelu.default, (node.args[0],), before=node))
        return 1


@dataclass(frozen=True)
class Marks(Pass):
    effect: ClassVar[Effect] = Effect.OBSERVE

    def run(self, gm, ctx):
        return Annotate().run(gm, ctx)


@dataclass(frozen=True)
class Rewrites(Edits):
    effect: ClassVar[Effect] = Effect.ANNOTATE


@dataclass(frozen=True)
class Bends(Edits):
    effect: ClassVar[Effect] = Effect.PRESERVE


@dataclass(frozen=True)
class Poisons(Pass):
    effect: ClassVar[Effect] = Effect.CHANGE

    def run(self, gm, ctx):
        scale(gm, float("nan"))
        return 1


@dataclass(frozen=True)
class Breaks(Pass):
    effect: ClassVar[Effect] = Effect.CHANGE

    def run(self, gm, ctx):
        (node,) = find(gm, aten.relu.default)
        with gm.graph.inserting_before(node):
            node.replace_input_with(node.args[0], gm.graph.call_function(aten.neg.default, (node.args[0],)))
        return 1


@dataclass(frozen=True)
class Raises(Pass):
    error: Exception = field(default_factory=lambda: RuntimeError("boom"))
    effect: ClassVar[Effect] = Effect.CHANGE

    def run(self, gm, ctx):
        raise self.error


def graph():
    return capture(Mlp(), args=(vectors(),))


def fails(step, kind=PassError):
    gm = graph()
    with pytest.raises(kind) as caught:
        Pipeline.of([Canonicalize(), Untie(), step]).execute(gm, Context(probe=[vectors()]))
    return caught.value


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Edits(), "OBSERVE but changed the graph"),
        (Marks(), "OBSERVE but changed the graph"),
        (Rewrites(), "ANNOTATE but changed the graph"),
        (Bends(), "PRESERVE but changed the outputs"),
        (Poisons(), "not finite"),
        (Breaks(), "every node records its value"),
        (Raises(), "RuntimeError: boom"),
        (Raises(OSError("disk full")), "OSError: disk full"),
        (Raises(AssertionError("impossible")), "AssertionError: impossible"),
        (Raises(GraphError("odd")), "odd"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Pass) else "",
)
def test_a_broken_promise_names_the_pass_and_what_ran_before(step, message):
    error = fails(step)
    assert message in str(error)
    assert step.name() in str(error)
    assert "after canonicalize, untie" in str(error)
    assert isinstance(error.__cause__, Exception)
    assert error.__cause__ is not error


@pytest.mark.parametrize("kind", [OptionError, DataError, CoverageError])
def test_what_the_caller_can_mend_keeps_its_kind(kind):
    error = fails(Raises(kind("no", where="here", remedy="do so")), kind)
    assert type(error) is kind
    assert error.remedy == "do so"
    assert all(part in str(error) for part in ("no", "here", "after canonicalize, untie"))


def test_the_first_pass_is_named_too():
    with pytest.raises(FxpressError, match="after nothing"):
        Pipeline.of(Raises()).execute(graph(), Context(probe=[vectors()]))


def test_statistics_live_until_the_graph_changes():
    gm, ctx = graph(), Context([[vectors()]], [vectors()])

    def alive(text):
        Pipeline.parse(text).execute(gm, ctx)
        return ctx.statistics is not None

    assert alive("canonicalize, observe")
    assert alive("annotate(dynamic=False)")
    assert alive("untie")  # nothing to do here, so nothing went stale
    assert not alive("round_weights(method='nearest')")


def test_records_say_what_was_done():
    gm = graph()
    ctx = Context(probe=[vectors()])
    marked, rounded = Pipeline.parse("annotate(scheme='W4A16', ignore=('down',)), round_weights(method='nearest')").execute(gm, ctx)
    assert (marked.text, marked.effect, marked.sites, marked.difference) == (
        "annotate(scheme='W4A16', ignore=('down',))",
        Effect.ANNOTATE,
        1,
        None,
    )
    assert [(skip.path, skip.reason) for skip in marked.skipped] == [("down", "ignored by the recipe")]
    assert rounded.sites == 1
    assert 1e-3 < rounded.difference < 0.3
    assert rounded.skipped == ()


def test_a_pipeline_is_a_pass():
    gm = graph()
    sites = Pipeline.parse("annotate, round_weights(method='nearest'), quantize").run(gm, Context(probe=[vectors()]))
    assert sites == 2 + 2 + 2


def test_relative_error_is_the_greatest_over_floating_outputs():
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    whole = torch.tensor([1])
    assert relative_error((a, whole), (a, whole + 1)) == 0
    assert relative_error((a, b), (a, a)) == pytest.approx(0.5 / 5)
    assert relative_error((), ()) == 0
