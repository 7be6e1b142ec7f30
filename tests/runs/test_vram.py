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

    def choose(gigabytes, *overrides, source="scenes-64-tcd", **options):
        monkeypatch.setattr(vram, "usable", lambda size: gigabytes * GB)
        seen.clear()
        choose.found = fitted(source, [*CUDA, *overrides], None, 24, **options)
        return choose.found.overrides

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


def test_what_is_held_is_named_where_nothing_fits(room):
    with pytest.raises(ValueError, match=r"leave out training\.accumulation, which you have set, or a smaller"):
        room(3, "training.accumulation=2")


def test_defaults_in_a_copy_of_a_whole_recipe_are_nobodys_choice(tmp_path):
    """As a run writes its recipe, and --dry-run; what differs from a default stays the user's."""
    from fewstep.recipe.load import load_recipe

    copy = tmp_path / "copy.yaml"
    copy.write_text(load_recipe("scenes-64-tcd", ["training.accumulation=2"]).as_yaml())
    assert own_keys(copy) & set(WAYS) == {"training.accumulation"} and "method.name" in own_keys(copy)
    assert own_keys(copy, ["training.optimizer=adamw"]) & set(WAYS) == {"training.accumulation", "training.optimizer"}


def test_several_processes_share_the_batch_that_is_planned(room):
    """Micro-batches of 16 images over 4 processes: 4 of them at most, and 3.25 GB need more than that."""
    assert room(11.5, processes=4) == ["training.gradient_checkpointing=true", "training.accumulation=4",
                                       "training.optimizer=adamw8bit"]  # fmt: skip
    assert {recipe.training.batch_size for recipe in room.seen} == {4}
    with pytest.raises(ValueError, match=r"must be a multiple of .* processes \(1 x 3\)"):
        room(11, processes=3)
    assert room.seen == []


def test_what_needs_a_library_that_is_not_here_is_left_out(room, monkeypatch):
    first = ["training.gradient_checkpointing=true", "training.accumulation=16"]
    here = {"bitsandbytes"}
    monkeypatch.setattr(vram, "find_spec", lambda name: name if name in here else None)
    assert room(5, elsewhere=False) == [*first, "training.optimizer=adamw8bit", "teacher.quantize=nf4"]
    assert room.found.lines[-1].startswith("teacher.quantize=int8 is left out: torchao is not installed here: pip")
    here.clear()
    with pytest.raises(ValueError, match=r"install what training\.optimizer=adamw8bit needs \(bitsandbytes is not"):
        room(5, elsewhere=False)
    assert room(12.3, elsewhere=False) == first  # what fits without them needs no word of them
    assert "left out" not in "".join(room.found.lines)


def test_a_resumed_run_keeps_what_it_must_not_change(room, tmp_path):
    """It was begun with 8 bits of one and not of the other; only memory may be saved otherwise now."""
    from fewstep.recipe.load import load_recipe

    begun = tmp_path / "recipe.yaml"
    begun.write_text(load_recipe("scenes-64-tcd", [*CUDA, "training.optimizer=adamw8bit"]).as_yaml())
    same = ["training.optimizer=adamw8bit", "training.gradient_checkpointing=true", "training.accumulation=8"]
    assert room(11, begun=begun) == same
    assert room.found.lines[1] == "training.optimizer=adamw8bit: as this run was begun"
    with pytest.raises(ValueError, match=r"needs 10\.75 GB even with"):
        room(6, begun=begun)  # teacher.quantize would help


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


def test_the_program_tells_of_processes_and_of_a_run_that_goes_on(monkeypatch, tmp_path):
    from fewstep.cli import make

    class Seen(Exception):
        pass

    def fitted(*given):
        raise Seen(*given[3:])

    monkeypatch.setattr(vram, "fitted", fitted)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    begun = tmp_path / "recipe.yaml"
    begun.touch()
    for options, given in (
        ({}, (24, 8, False, None)),
        ({"dry_run": True}, (24, 8, True, None)),
        ({"resume": True}, (24, 8, False, begun)),
        ({"resume": True, "seeds": "1,2"}, (24, 8, False, None)),
    ):
        with pytest.raises(Seen) as seen:
            make.distill("scenes-64-tcd", out=tmp_path, vram=24, **options)
        assert seen.value.args == given
