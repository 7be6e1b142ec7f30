"""`--vram`: the cheapest changes with which a plan fits, and nothing that the user has set."""

import types

import pytest
import typer

from fewstep.planning.hardware import usable
from fewstep.recipe.load import own_keys
from fewstep.runs import vram
from fewstep.runs.plan import plan
from fewstep.runs.vram import WAYS, fitted

GB = 1e9
CUDA = ["training.device=cuda", "training.batch_size=16"]


def pretended(recipe, timed=True):
    """A plan by a formula: 12 GB that accumulation divides, 8 of activations, 10 of weights, 2 of moments."""
    settings, bits = recipe.training, {None: 16, "int8": 8, "nf4": 4}[recipe.teacher.quantize]
    activations = (4 if settings.gradient_checkpointing else 20) / settings.accumulation
    moments = 0.5 if settings.optimizer == "adamw8bit" else 2
    peak = GB * (activations + moments + 10 * bits / 16)
    return types.SimpleNamespace(recipe=recipe, peak=peak, estimate=object(), why_not="")


@pytest.fixture
def room(monkeypatch):
    """Sets how many GB a GPU has, and counts plans by the formula."""
    seen = []
    monkeypatch.setattr(vram, "plan", lambda recipe, timed: seen.append(recipe) or pretended(recipe))

    def choose(gigabytes, *overrides, source="scenes-64-tcd"):
        monkeypatch.setattr(vram, "usable", lambda size: gigabytes * GB)
        seen.clear()
        return fitted(source, [*CUDA, *overrides], None, 24).overrides

    choose.seen = seen
    return choose


def test_the_cheapest_changes_come_first_and_each_only_as_far_as_needed(room):
    """32 GB as it is; each limit is just below what the changes before it reach."""
    checkpointing, moments = "training.gradient_checkpointing=true", "training.optimizer=adamw8bit"
    assert room(40) == [] and len(room.seen) == 1
    assert room(17) == [checkpointing]
    assert room(15) == [checkpointing, "training.accumulation=2"]
    assert room(13) == [checkpointing, "training.accumulation=4"]
    assert room(11) == [checkpointing, "training.accumulation=16", moments]
    assert room(6) == [checkpointing, "training.accumulation=16", moments, "teacher.quantize=int8"]
    assert room(4) == [checkpointing, "training.accumulation=16", moments, "teacher.quantize=nf4"]
    with pytest.raises(ValueError, match=r"needs 3\.25 GB even with .*nf4, and a GPU of 24 GB has 3\.00 GB: take"):
        room(3)


def test_what_the_user_set_stays(room, tmp_path):
    fixed = ["training={accumulation: 1, batch_size: 16, device: cuda}", "training.gradient_checkpointing=false"]
    assert room(26, *fixed) == ["training.optimizer=adamw8bit", "teacher.quantize=int8"]
    mine = tmp_path / "mine.yaml"
    mine.write_text("like: scenes-64-tcd\nteacher: {quantize: null}\ntraining: {optimizer: adamw}\n")
    with pytest.raises(ValueError, match=r"needs 12\.25 GB even with training\.gradient_checkpointing=true and"):
        room(11, source=mine)


def test_keys_of_shipped_recipes_are_not_the_users(tmp_path):
    assert own_keys("scenes-64-tcd") == set()
    assert own_keys("scenes-64-tcd", ["training.steps=3", "teacher={size: 64}"]) == {"training.steps", "teacher.size"}
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("like: scenes-64-tcd\ntraining: {steps: 3}\n")
    second.write_text(f"like: {first}\nmethod: lcm\n")
    assert own_keys(second) == {"training.steps", "method.name"}


@pytest.mark.slow
def test_a_real_plan_fits_where_it_says_so():
    """scenes-64 fits into any GPU; one line says so."""
    found = fitted("scenes-64-tcd", [], "cuda", 12)
    assert found.overrides == [] and found.lines[0].startswith("--vram 12: scenes-64-tcd needs ")
    assert found.lines[0].endswith(f"such a GPU has {usable(12) / 1e9:.2f} GB") and len(found.lines) == 1


def test_every_way_is_a_candidate_of_the_plan():
    from fewstep.recipe.load import load_recipe
    from fewstep.runs.plan import candidates

    found = dict(candidates(load_recipe("scenes-64-tcd", CUDA)))
    assert set(WAYS) <= set(found)
    assert plan is vram.plan  # one owner of the figures


@pytest.mark.parametrize(
    ("source", "device", "size", "sentence"),
    [
        ("scenes-64-tcd", "cuda", 20, "--vram is one of 12, 16, 24, 48, 80, the sizes of GPUs in GB, not 20."),
        ("scenes-64-tcd", None, 24, "scenes-64-tcd trains on cpu: add --device cuda, or leave --vram out."),
        ("scenes-64-progressive", "cuda", 24, "scenes-64-progressive has some: set each stage's own keys."),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_a_sentence(source, device, size, sentence):
    with pytest.raises(ValueError) as refused:
        fitted(source, [], device, size)
    assert str(refused.value).endswith(sentence)


def test_the_program_trains_what_was_chosen(monkeypatch, tmp_path, capsys):
    """The choice becomes --set, in the run and in the command that resumes it."""
    from fewstep.cli import make
    from fewstep.runs import chain

    seen = []
    monkeypatch.setattr(vram, "fitted", lambda *given: vram.Fitted(["training.accumulation=4"], ["why"]))

    def run(recipe, *args, **named):
        seen.append(recipe.training.accumulation)
        raise KeyboardInterrupt

    monkeypatch.setattr(chain, "run", run)
    with pytest.raises(typer.Exit):
        make.distill("scenes-64-tcd", out=tmp_path / "run", vram=24)
    said = capsys.readouterr()
    assert seen == [4] and "why" in said.out
