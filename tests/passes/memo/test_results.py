from dataclasses import dataclass, field

import pytest
import torch

import passes
from backends.reference import Reference
from passes.base import Effect, Pass
from passes.data import evidence
from passes.memo.folder import Memo
from passes.memo.loops import State
from passes.memo.packed import like
from passes.progress import Progress
from tests.families import load
from tests.passes.samples import CALIBRATION, same_weights

LLAMA = load("llama")
ALL = [
    "w4a16",
    "w3a16(rounding='yaqa')",
    "w3a16(rounding='qronos')",
    "w3a16(rounding='guided')",
    "w4a4(transform='quantile', rounding='gptq')",
    "w4a4(transform='learned', rounding='gptq')",
    "w4a4(transform='balance')",
    "w8a8(dynamic=False), tune(steps=4)",
    "mixed(bits=3.2, steps=3, measure=48, prune=True)",
    "mixed(bits=3.2, widths=(2, 4), solver='masks', steps=2)",
    "canonicalize, untie, fold_norm, prune(criterion='masks', steps=3, bias=True), w4a16",
    "canonicalize, untie, fold_norm, prune(what='blocks', criterion='measured', share=0.2), w4a16",
    "w8a16, quantize_cache(bits=5, widths=(2, 4, 8, 16))",
    "w8a16, quantize_cache(dynamic=False)",
]


def made(pipeline, folder=None, **options):
    given = {"calibration": CALIBRATION, "allow_partial": True} | options
    return passes.compile(LLAMA.captured, pipeline, cache=folder, **given)


def told(compiled):
    """What came from the cache, by the pass that it is of."""
    return {note.partition(":")[0]: note for note in compiled.report().notes if "from the cache" in note}


def quick(pipeline):
    """Whether a pipeline runs with every `make test`."""
    return pipeline in {ALL[0], ALL[8], ALL[10]}


@pytest.mark.parametrize("pipeline", [pytest.param(text, marks=() if quick(text) else pytest.mark.thorough) for text in ALL])
def test_results_are_the_same_with_and_without(pipeline, tmp_path):
    plain = made(pipeline)
    first, second = made(pipeline, tmp_path), made(pipeline, tmp_path)
    assert same_weights(plain.graph, first.graph) and same_weights(plain.graph, second.graph)
    assert not told(plain) and not told(first) and told(second)
    assert all(note.split(": ")[1].split(" of ")[0] == note.split(" of ")[1].split(" results")[0] for note in told(second).values())


def test_the_last_pass_alone_is_computed_anew(tmp_path, monkeypatch):
    made("mixed(bits=3.2, steps=3, own_text=False), tune(steps=2)", tmp_path)
    monkeypatch.setattr(evidence, "_round", pytest.fail)
    again = made("mixed(bits=3.2, steps=3, own_text=False), tune(steps=3)", tmp_path)
    assert set(told(again)) == {"assign_bits", "learn_rounding"}
    assert same_weights(again.graph, made("mixed(bits=3.2, steps=3, own_text=False), tune(steps=3)", tmp_path).graph)


def test_another_backend_computes_nothing_anew_that_does_not_ask_it(tmp_path):
    made("mixed(bits=3.2, steps=2, own_text=False)", tmp_path)
    found = told(made("mixed(bits=3.2, steps=2, own_text=False)", tmp_path, backend="onnx"))
    assert set(found) == {"learn_rounding"}  # of the same widths; those were chosen among what the target has


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"calibration": CALIBRATION[:1] * 2},
        {"pipeline": "w4a16(group=32)"},
        {"pipeline": "w4a16(rounding='gptaq')"},
    ],
)
def test_what_a_result_depends_on_is_in_its_key(tmp_path, change):
    made("w4a16", tmp_path)
    options = {"pipeline": "w4a16"} | change
    other = made(options.pop("pipeline"), tmp_path, **options)
    assert not told(other)


def test_other_weights_are_another_model(tmp_path):
    made("w4a16", tmp_path)
    gm = LLAMA.graph()
    name, parameter = next(iter(gm.named_parameters()))
    holder, _, leaf = name.rpartition(".")
    setattr(gm.get_submodule(holder), leaf, torch.nn.Parameter(parameter * 2, requires_grad=False))
    assert not told(passes.compile(gm, "w4a16", CALIBRATION, cache=tmp_path))


@dataclass(frozen=True)
class Scale(Pass):
    """A pass of somebody else, whose text does not say what it does."""

    factor: list = field(default_factory=lambda: [1.0], repr=False, init=False)
    effect = Effect.CHANGE

    def run(self, gm, ctx):
        from ir import edit

        node = next(iter(gm.graph.find_nodes(op="get_attr")))
        edit.set_attribute(gm, node, edit.attribute(gm, node).detach() * self.factor[0])
        ctx.memo.kept("mine", lambda: [torch.zeros(1)], like([torch.zeros(1)]))
        return 1


def test_behind_a_pass_of_somebody_else_contents_count(tmp_path):
    step = Scale()
    made([step, *passes.Pipeline.parse("w4a16")], tmp_path)
    assert set(told(made([step, *passes.Pipeline.parse("w4a16")], tmp_path))) == {"round_weights"}
    step.factor[0] = 2.0
    assert not told(made([step, *passes.Pipeline.parse("w4a16")], tmp_path))


class Choosy(Reference):
    """A backend of somebody else."""


def test_what_asks_a_backend_of_somebody_else_is_not_kept(tmp_path):
    for _ in range(2):
        found = told(made("mixed(bits=3.2, steps=2, own_text=False)", tmp_path, backend=Choosy()))
    assert set(found) == {"learn_rounding"}


def test_entries_that_do_not_fit_are_computed_anew(tmp_path):
    plain = made("w4a16", tmp_path)
    cache = Memo(tmp_path)
    for path, _, _ in list(cache._files()):
        key = path.name.partition(".")[0]
        cache.put(key, {name: tensor[:1] for name, tensor in cache.get(key).items()})
    again = made("w4a16", tmp_path)
    assert same_weights(plain.graph, again.graph)
    assert not told(again) and sum("damaged" in note for note in again.report().notes) == 8
    assert len(told(made("w4a16", tmp_path))) == 1


def test_a_cache_that_cannot_be_written_does_not_end_a_compile(tmp_path):
    (tmp_path / "file").write_text("")
    compiled = made("w4a16", tmp_path / "file")
    assert same_weights(compiled.graph, made("w4a16").graph)
    assert sum("cannot be written" in note for note in compiled.report().notes) == 1


class StopError(Exception):
    pass


@dataclass(frozen=True)
class Stopping(Progress):
    """A run that ends at an item of a loop."""

    loop: str = ""
    after: int = 0

    def track(self, items, doing):
        for index, item in enumerate(items):
            if doing.startswith(self.loop) and index == self.after:
                raise StopError
            yield item


@pytest.mark.parametrize(
    ("pipeline", "loop", "after"),
    [
        ("w4a16", "round weights", 2),
        ("w4a4(rounding='gptq')", "round weights", 3),
        ("mixed(bits=3.2, steps=6, own_text=False)", "predict", 2),
        ("mixed(bits=3.2, steps=6, own_text=False)", "learn rounding", 4),
        ("w8a16, tune(steps=6)", "tune", 4),
        ("w4a4(transform='learned')", "learn", 9),
        ("canonicalize, annotate(scheme='W4A4'), learn(loss='block', steps=4)", "learn block 2", 2),
        ("canonicalize, untie, fold_norm, prune(criterion='masks', steps=6)", "learn masks", 3),
        ("canonicalize, untie, fold_norm, prune(criterion='wanda')", "refit", 2),
    ],
)
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(pipeline, loop, after, tmp_path):
    cache = Memo(tmp_path, seconds=0.0)
    with pytest.raises(passes.FxpressError, match="StopError"):
        made(pipeline, cache, progress=Stopping(loop=loop, after=after))
    again = made(pipeline, cache)
    notes = " ".join(again.report().notes)
    assert "went on at step" in notes or "from the cache" in notes
    assert same_weights(again.graph, made(pipeline).graph)
    assert not [entry for entry in cache.entries() if "so far" in entry.what]


def test_a_state_of_another_loop_changes_nothing():
    x = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([x])
    held = State([torch.zeros(2)]).tensors_at(1)
    with pytest.raises(passes.FxpressError):
        State([x], optimizer).restore(held, 5)
    with pytest.raises(passes.FxpressError):
        State([x], optimizer).restore(State([torch.zeros(3)]).tensors_at(9), 5)
    assert torch.equal(x, torch.ones(3))
