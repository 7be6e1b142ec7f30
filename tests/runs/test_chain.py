"""Chains of stages: what each begins with, what resuming enters, and what a recipe may say."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fewstep.models.families import load_teacher
from fewstep.recipe.chain import Chain, load, parse_chain
from fewstep.recipe.load import load_recipe, parse_recipe
from fewstep.recipe.validate import RecipeError
from fewstep.reports.finished import labels_of
from fewstep.runs.chain import run_chain
from fewstep.runs.distill import distill
from fewstep.runs.setup import setup
from fewstep.students.card import load_card
from fewstep.students.lineage import first_teacher, open_teacher, student_folder
from fewstep.students.student import load_weights
from fewstep.training.checkpoint import same
from fewstep.training.run_files import RunFiles
from fewstep.training.trainer import TrainingStopped
from tests.command_line import output, student

pytestmark = pytest.mark.usefixtures("few_resamplings")
COMMON = {
    "data": {"size": 16},
    "training": {"steps": 4, "batch_size": 4, "log_every": 2, "checkpoint_every": 2, "learning_rate": 1e-3},
    "student": {"rank": 4},
    "sample": {"every": 4, "teacher_steps": 2, "num_inference_steps": 2},
}
STAGES = [
    {"name": "coarse", "method": {"name": "lcm", "num_grid_steps": 10}},
    {"name": "whole", "merge": "coarse"},
    {"name": "fine", "method": "tcd", "init": "coarse"},
    {"name": "full", "method": "tcd", "teacher": "whole", "init": "fine", "student": {"weights": "full"}},
]


@pytest.fixture(scope="module")
def data(tiny):
    return {**COMMON, "teacher": str(tiny), "stages": STAGES}


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain") / "run"
    run_chain(parse_chain(data), folder)
    return folder


# ---------------------------------------------------------------- what stages begin with


def test_every_stage_leaves_a_student(run):
    names = ["01-coarse", "02-whole", "03-fine", "04-full"]
    assert sorted(p.name for p in run.glob("0*")) == names
    cards = {name: load_card(run / name / "student") for name in names}
    assert [c.weights for c in cards.values()] == ["lora", "full", "lora", "full"]
    assert [c.method for c in cards.values()] == ["lcm", "lcm", "tcd", "tcd"]
    assert student_folder(run) == run / "04-full" / "student"
    one = cards["01-coarse"].forward_equivalents  # 4 steps of 4: guided teacher 2, student 3, target 1
    assert one == 4 * 4 * 6
    assert [c.forward_equivalents for c in cards.values()] == [one, one, 2 * one, 3 * one]  # coarse is behind both
    assert [len(c.costs) for c in cards.values()] == [1, 1, 2, 3]


def test_merging_changes_the_form_alone(run, tiny):
    before, after = student(run / "01-coarse" / "student"), student(run / "02-whole" / "student")
    assert torch.allclose(before, after, atol=1e-5)
    teacher = load_teacher(str(tiny))
    assert not torch.allclose(output(teacher.denoiser, teacher), after, atol=1e-4)


def test_a_finished_stage_is_a_teacher(run):
    """By name inside the run, by its folder outside; the card finds it wherever the run is."""
    teacher = open_teacher(str(run / "01-coarse"))
    assert torch.allclose(output(teacher.denoiser, teacher), student(run / "01-coarse" / "student"), atol=1e-5)
    assert load_card(run / "04-full" / "student").teacher == "../../02-whole/student"


def test_a_moved_run_still_draws(run, tmp_path, tiny):
    shutil.copytree(run, tmp_path / "elsewhere")
    folder = tmp_path / "elsewhere" / "04-full" / "student"
    assert torch.equal(student(folder), student(run / "04-full" / "student"))
    shutil.rmtree(tmp_path / "elsewhere" / "02-whole")
    with pytest.raises(ValueError, match="There is no teacher"):
        student(folder)
    assert first_teacher(run / "04-full" / "student") == str(tiny)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_init_is_where_the_student_starts(kind, run, data, tmp_path):
    """Before its first step the student says what the earlier one said; target and average start there too."""
    recipe = parse_recipe({
        **COMMON, "teacher": data["teacher"], "method": {"name": "tcd"}, "init": str(run / "01-coarse"),
        "student": {"rank": 4, "alpha": 2.0 if kind == "lora" else None, "weights": kind},
        "training": {**COMMON["training"], "ema_decay": 0.9},
    })  # fmt: skip
    job = setup(recipe, tmp_path)
    wanted = student(run / "01-coarse" / "student")
    for name in ("student", "target", "ema"):
        assert torch.allclose(output(getattr(job.roles, name), job.teacher), wanted, atol=1e-5)
    assert not torch.allclose(output(job.roles.teacher, job.teacher), wanted, atol=1e-4)


def test_a_start_from_a_lora_on_another_teacher_is_what_that_student_says(run, data, tmp_path):
    """The teacher has the first stage's LoRA merged in already: on top of it the third's would count that twice."""

    def start(**student):
        keys = {"teacher": str(run / "02-whole"), "method": "tcd", "init": str(run / "03-fine"), "student": student}
        return setup(parse_recipe({**COMMON, **keys}), tmp_path)

    job = start(weights="full")
    assert torch.allclose(output(job.roles.student, job.teacher), student(run / "03-fine" / "student"), atol=1e-5)
    with pytest.raises(ValueError, match=r"stands on another teacher .*: take that one, or 'weights: full'"):
        start(rank=4)


def test_a_start_that_does_not_fit_is_refused(run, data, tmp_path):
    def start(init, **changes):
        recipe = {**COMMON, "teacher": data["teacher"], "method": "tcd", "init": str(init), **changes}
        return setup(parse_recipe(recipe), tmp_path)

    for init, changes in (
        (run / "01-coarse", {"student": {"rank": 8}}),
        (run / "02-whole", {"student": {"rank": 4}}),
        (run / "01-coarse", {"student": {"rank": 4, "targets": ["to_q"]}}),
    ):
        with pytest.raises(ValueError, match="student cannot start from these weights"):
            start(init, **changes)
    with pytest.raises(ValueError, match="there is no finished run, student's folder or LoRA file"):
        start(tmp_path / "nowhere")
    (tmp_path / "cut.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="is no safetensors file"):
        start(tmp_path / "cut.safetensors")


def test_a_teachers_loras_are_part_of_it(run, tiny):
    """Merged from our LoRA file: by `teacher.loras`, and by diffusers' own loader."""
    lora = run / "01-coarse" / "student" / "pytorch_lora_weights.safetensors"
    ours, theirs = load_teacher(str(tiny), loras=(str(lora),)), load_teacher(str(tiny))
    theirs.pipeline.load_lora_weights(str(lora))
    for teacher in (ours, theirs):
        assert torch.allclose(output(teacher.denoiser, teacher), student(run / "01-coarse" / "student"), atol=1e-5)
    with pytest.raises(ValueError, match="LoRA '/no/such' cannot be loaded"):
        load_teacher(str(tiny), loras=("/no/such",))


# ---------------------------------------------------------------- resuming


@pytest.mark.slow
def test_resuming_enters_the_first_unfinished_stage(run, data, tmp_path, monkeypatch):
    """Stopped inside the third stage, and gone on with: the same students as of the run that was left alone."""
    folder = tmp_path / "run"
    chain = parse_chain(data)
    import fewstep.runs.distill as module

    class Stops(module.SampleGrid):
        def __call__(self, step):
            if self.run.folder.path.name == "03-fine":
                raise TrainingStopped("Stopped.", step)

    monkeypatch.setattr(module, "SampleGrid", Stops)
    with pytest.raises(TrainingStopped):
        run_chain(chain, folder)
    monkeypatch.undo()
    assert student_folder(folder) is None or not (folder / "03-fine" / "student").exists()
    written = (folder / "01-coarse" / "checkpoints" / "step-0000004" / "state.json").stat().st_mtime_ns
    with pytest.raises(RecipeError, match="already holds a run: add --resume"):
        run_chain(chain, folder)
    run_chain(chain, folder, resume=True)
    assert (folder / "01-coarse" / "checkpoints" / "step-0000004" / "state.json").stat().st_mtime_ns == written
    for name in ("01-coarse", "03-fine", "04-full"):
        assert same(load_weights(folder / name / "student"), load_weights(run / name / "student"))


def test_a_chain_of_older_random_numbers_is_refused_but_not_its_student(run, data, tmp_path):
    """Whichever stage began with them: what is left would not be the chain that any fewstep trains."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    for path in (folder / "01-coarse").rglob("state.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"random": 1}))
    assert run_chain(parse_chain(data), folder, resume=True) == folder / "04-full" / "student"
    shutil.rmtree(folder / "04-full")
    with pytest.raises(RecipeError, match=r"01-coarse was begun with random numbers of version 1"):
        run_chain(parse_chain(data), folder, resume=True)
    assert not (folder / "04-full").exists()


def test_a_chain_may_grow_but_not_change(run, data, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    longer = {**data, "stages": [*STAGES, {"name": "more", "method": "lcm", "init": "fine"}]}
    assert run_chain(parse_chain(longer), folder, resume=True) == folder / "05-more" / "student"
    other = {**data, "stages": [{**STAGES[0], "seed": 5}, *STAGES[1:2]]}
    with pytest.raises(RecipeError, match="started with a stage 03-fine that the recipe lacks"):
        run_chain(parse_chain(other), folder, resume=True)
    other["stages"] += longer["stages"][2:]
    with pytest.raises(RecipeError, match=r"01-coarse was started with seed = 0, not 5"):
        run_chain(parse_chain(other), folder, resume=True)
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(RecipeError, match="is not empty and holds no run"):
        run_chain(parse_chain(data), tmp_path)


def test_what_later_stages_began_with_is_not_trained_further(run, data, tmp_path):
    """Their students would be those of another chain; without them the stage may go on."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    before = (folder / "recipe.yaml").read_text()
    longer = [{**STAGES[0], "training": {"steps": 6}}, *STAGES[1:]]
    with pytest.raises(RecipeError, match=r"steps was 4, and 02-whole and 03-fine and 04-full began with its student"):
        run_chain(parse_chain({**data, "stages": longer}), folder, resume=True)
    assert (folder / "recipe.yaml").read_text() == before
    last = [*STAGES[:3], {**STAGES[3], "training": {"steps": 5}}]
    assert load_card(run_chain(parse_chain({**data, "stages": last}), folder, resume=True)).steps == 5


def test_a_chain_leaves_a_run_of_one_recipe_alone(run, data, tmp_path):
    folder = tmp_path / "one"
    shutil.copytree(run / "01-coarse", folder)
    before = (folder / "recipe.yaml").read_text()
    with pytest.raises(RecipeError, match="holds a run of one recipe, not of stages"):
        run_chain(parse_chain(data), folder, resume=True)
    assert (folder / "recipe.yaml").read_text() == before and not (folder / "01-coarse").exists()
    with pytest.raises(RecipeError, match="holds a run of several stages, not of one recipe"):
        distill(load_recipe(folder / "recipe.yaml"), run, resume=True)


def test_reports_tell_stages_of_the_same_name_apart(run, tmp_path):
    assert RunFiles(run).last() == run / "04-full"
    assert labels_of([run / "03-fine", run / "04-full"]) == ["03-fine", "04-full"]
    other = tmp_path / "other" / "04-full"
    assert labels_of([run / "04-full", other]) == ["run/04-full", "other/04-full"]
    with pytest.raises(ValueError, match="the same one was given twice"):
        labels_of([other, tmp_path / "." / "other" / "04-full"])


# ---------------------------------------------------------------- what a recipe may say


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        ([], "stages must be a list of recipes"),
        ("lcm", "stages must be a list of recipes"),
        ([{"name": "a"}], "stages.a: method is missing"),
        ([{"name": "a", "method": "lmc"}], "stages.a: Unknown method 'lmc'"),
        ([{"name": "a", "method": "lcm", "stepz": 3}], "stages.a: Unknown key 'stepz'"),
        ([{"name": "a b", "method": "lcm"}], "stage 1 needs a name of letters"),
        ([{"name": "scenes-64", "method": "lcm"}], "stage 1 needs a name of letters"),
        ([{"name": "a", "method": "lcm"}] * 2, "two stages are called 'a'"),
        ([{"name": "a", "merge": "b"}], "stages.a.merge: there is no earlier stage 'b'"),
        (
            [{"name": "a", "method": "lcm"}, {"name": "b", "merge": "a", "seed": 1}],
            "Unknown key 'stages.b.seed': known keys are merge, ",
        ),
        ([{"name": "a", "method": "lcm", "teacher": "a"}], "stages.a: a teacher or init has this name too"),
        (
            [{"name": "a", "method": "lcm"}, {"name": "b", "merge": "a"}, {"name": "c", "merge": "b"}],
            "stages.c.merge: 'b' has full weights already",
        ),
        (
            [{"name": "a", "method": "lcm"}, {"name": "b", "method": "lcm", "init": "a", "student": {"rank": 8}}],
            "stages.b.init: a LoRA of rank 8 cannot start from 'a', which has rank 32",
        ),
        (
            [{"name": "a", "method": "lcm"}, {"name": "b", "merge": "a"}, {"name": "c", "method": "lcm", "init": "b"}],
            "stages.c.init: a LoRA of rank 32 cannot start from 'b', which has full weights",
        ),
        (
            [{"name": "a", "method": "lcm"}, {"name": "b", "method": "lcm", "teacher": {"path": "a", "loras": ["x"]}}],
            "stages.b.teacher.loras go with a model",
        ),
        (
            [{"name": "coarse", "method": "lcm"}, {"name": "b", "method": "lcm", "init": "coarze"}],
            "stages.b.init: there is no earlier stage 'coarze': did you mean 'coarse'?",
        ),
    ],
)
def test_slips_are_named_before_anything_runs(stages, sentence):
    with pytest.raises(ValueError, match=r".") as caught:
        parse_chain({"stages": stages})
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_short_forms_take_overrides_and_another_teacher_has_its_own_loras(tmp_path):
    path = tmp_path / "chain.yaml"
    path.write_text(yaml.safe_dump({"teacher": {"path": "mine", "loras": ["x"]}, "stages": [
        {"name": "a", "method": "lcm"}, {"name": "b", "method": "tcd", "teacher": "a"},
        {"name": "c", "method": "lcm", "teacher": {"loras": []}},
    ]}))  # fmt: skip
    a, b, c = load(path, ["stages.b.method.guidance_scale=2"]).stages
    assert (b.recipe.teacher.path, b.recipe.teacher.loras) == ("a", ()) and b.recipe.method["guidance_scale"] == 2
    assert a.recipe.teacher.loras == ("x",) and (c.recipe.teacher.path, c.recipe.teacher.loras) == ("mine", ())
    path.write_text("{method: tcd, teacher: mine}")
    assert load(path, ["teacher.loras=[y]"]).teacher.path == "mine"
    assert load(path, ["teacher=yours"]).teacher.path == "yours"


def test_keys_above_hold_for_every_stage_and_overrides_reach_each(tmp_path):
    path = tmp_path / "chain.yaml"
    path.write_text(yaml.safe_dump({"method": {"name": "lcm", "num_grid_steps": 10}, "stages": [
        {"name": "a"}, {"name": "b", "method": {"guidance_scale": 2.0}}, {"name": "c", "method": {"name": "tcd"}},
    ], "training": {"steps": 7}}))  # fmt: skip
    chain = load(path, ["training.batch_size=8", "stages.b.training.steps=9", "stages.c.seed=3"])
    assert isinstance(chain, Chain)
    a, b, c = (stage.recipe for stage in chain.stages)
    assert [r.training.steps for r in (a, b, c)] == [7, 9, 7]
    assert {r.training.batch_size for r in (a, b, c)} == {8}
    assert [r.seed for r in (a, b, c)] == [0, 0, 3]
    assert b.method_settings().num_grid_steps == 10 and b.method_settings().guidance_scale == 2.0
    assert c.method_settings().num_grid_steps == 50  # another method: its own defaults
    with pytest.raises(RecipeError, match="there is no such stage: the stages are a, b, c"):
        load(path, ["stages.d.seed=1"])
    with pytest.raises(RecipeError, match="has stages: run it with fewstep distill"):
        load_recipe(path)


# ---------------------------------------------------------------- keeping the best


@pytest.fixture()
def scripted(monkeypatch):
    """Measurements as a test wants them."""

    def script(values):
        import fewstep.runs.validation as module

        def measure(self, step):
            return {"FD": values[step], "detail FD": 1.0, "accuracy": -values[step]}

        monkeypatch.setattr(module.Validation, "_measure", measure)

    return script


def watched(data, **changes):
    keys = {"every": 1, "metric": "FD", "count": 8, **changes}
    return parse_recipe({
        **COMMON, "teacher": data["teacher"], "method": {"name": "lcm", "num_grid_steps": 10}, "evaluate": keys,
        "training": {**COMMON["training"], "steps": 5, "checkpoint_every": 2},
    })  # fmt: skip


@pytest.mark.parametrize("metric", ["FD", "accuracy"])
def test_the_best_student_is_kept_and_patience_ends_the_run(metric, data, tmp_path, scripted):
    scripted({1: 3.0, 2: 1.0, 3: 1.0, 4: 2.0, 5: 0.5})
    kept = distill(watched(data, patience=2, metric=metric), tmp_path / "patient")
    assert load_card(kept).steps == 2
    lines = (tmp_path / "patient" / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


@pytest.mark.slow
def test_the_best_student_is_its_steps_own_and_the_last_one_may_be_kept(data, tmp_path, scripted):
    scripted({1: 3.0, 2: 1.0, 3: 1.0, 4: 2.0, 5: 0.5})
    kept = distill(watched(data, patience=2), tmp_path / "patience")
    plain = watched(data).model_dump(exclude={"evaluate"})
    two = parse_recipe({**plain, "training": {**COMMON["training"], "steps": 2}})
    assert same(load_weights(kept), load_weights(distill(two, tmp_path / "two")))
    whole = distill(watched(data, keep_best=False), tmp_path / "whole")
    assert load_card(whole).steps == 5
    last = distill(watched(data), tmp_path / "last")
    assert load_card(last).steps == 5 and same(load_weights(last), load_weights(whole))


def test_an_interrupted_run_decides_as_a_whole_one(data, tmp_path, scripted, monkeypatch):
    """Killed between the last measurement and the end: nothing more is trained."""
    import fewstep.runs.distill as module

    scripted({1: 1.0, 2: 2.0, 3: 3.0, 4: 0.0, 5: 0.0})
    recipe = watched(data, patience=2)
    monkeypatch.setattr(module.Validation, "keep", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        distill(recipe, tmp_path / "run")
    monkeypatch.undo()
    scripted({1: 1.0, 2: 2.0, 3: 3.0, 4: 0.0, 5: 0.0})
    student = distill(recipe, tmp_path / "run", resume=True)
    assert load_card(student).steps == 1
    assert len((tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()) == 3
    assert load_file(student / "pytorch_lora_weights.safetensors")


def test_measuring_is_real(data, tmp_path):
    """Unscripted: the figures are those of `compare` on the student's own sampler."""
    folder = distill(watched(data, every=4), tmp_path / "run").parent
    line = json.loads((folder / "evaluations.jsonl").read_text().splitlines()[0])
    assert line["step"] == 4 and line["FD"] > 0 and line["detail FD"] > 0 and 0 <= line["accuracy"] <= 1
