"""`fewstep benchmark`: one cost, the same prompts and noise, slices that go on, one table."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
from safetensors import safe_open

from fewstep.data.files import held
from fewstep.evaluation.compare import Candidate, compare
from fewstep.evaluation.result import Result, gap_closed_in, lower_by
from fewstep.models.families import load_teacher
from fewstep.recipe.chain import load
from fewstep.recipe.load import load_recipe
from fewstep.recipe.validate import RecipeError
from fewstep.reports.benchmark import Benchmark
from fewstep.reports.jobs import BenchmarkEntry, Run, every_method, within
from fewstep.reports.results import over_seeds, rows, summary, verdict
from fewstep.runs.plan import memory_of_step, plan
from fewstep.sampling import DDIMSampler
from fewstep.scenes64.prompts import unseen_prompts
from fewstep.students.card import load_card, sampler_of
from fewstep.students.lineage import teacher_of
from fewstep.students.student import load_student
from tests.reports.made import result

COUNT, CURVES = 8, ("ddim",)


@pytest.fixture(scope="module")
def runs(short):
    job = BenchmarkEntry("tcd", "scenes-64-tcd", {"method.num_grid_steps": 8}, seeds=(0, 1), steps=(1, 2), count=COUNT)
    return list(job.runs([*short, "sample.teacher_steps=5"]))


@pytest.fixture(scope="module")
def work(runs, tmp_path_factory):
    """Finished after a slice of no time, one that ends after the first run, and one without an end."""
    folder = tmp_path_factory.mktemp("benchmark")
    assert not Benchmark(runs, folder / "out", folder / "runs", minutes=0).work(lambda line: None)
    assert not (folder / "runs").exists()
    assert not Benchmark(runs[:1], folder / "out", folder / "runs", minutes=0, curves=()).work(lambda line: None)
    done = Benchmark(runs, folder / "out", folder / "runs", curves=CURVES)
    assert done.work(lambda line: None)
    return done


@pytest.mark.slow
def test_every_run_is_measured_once_and_on_the_same_prompts_and_noise(work, runs, tiny):
    """Held against one joint comparison of the teacher and a student: figures, and what is closed, to the last bit."""
    said = []
    assert work.work(said.append) and said == []
    found = work.results()
    assert [(e.model, e.seed, e.steps) for e in found.results[1:]] == [
        ("teacher, ddim", None, 1), ("teacher, ddim", None, 2),
        ("tcd", 0, 1), ("tcd", 0, 2), ("tcd", 1, 1), ("tcd", 1, 2),
    ]  # fmt: skip
    folder = work.place / "tcd-s1" / "student"
    card, teacher = load_card(folder), load_teacher(str(tiny))
    student = load_student(teacher_of(folder, card), folder, card)
    scale = runs[0].last.sample.guidance_scale
    ways = [
        Candidate("teacher", teacher.denoiser, DDIMSampler(num_inference_steps=found.full.steps), scale),
        Candidate("teacher", teacher.denoiser, DDIMSampler(num_inference_steps=2), scale),
        Candidate("student", student, sampler_of(card, num_inference_steps=2)),
    ]
    joint = compare(teacher, ways, unseen_prompts(teacher, COUNT))
    mine = next(e for e in found.results if (e.model, e.seed, e.steps) == ("tcd", 1, 2))
    few = next(e for e in found.results if (e.model, e.steps) == ("teacher, ddim", 2))
    for name in ("FD", "detail FD"):
        assert mine.figures[name] == joint.results[2].figures[name]
        assert found.gap_closed(mine, name) == gap_closed_in(joint.results, name, joint.results[2])
        assert lower_by(name, mine, few) == lower_by(name, joint.results[2], joint.results[1])


@pytest.mark.slow
def test_figures_of_another_recipe_or_teacher_are_not_taken_for_these(work, runs):
    assert all(work.is_measured(run) for run in runs)
    longer = within(runs[0].recipe, 1e6)
    assert not work.is_measured(replace(runs[0], recipe=longer))
    guided = runs[0].recipe.model_copy(
        update={"sample": runs[0].recipe.sample.model_copy(update={"guidance_scale": 2.0})}
    )
    other = Benchmark([replace(runs[0], recipe=guided)], work.out, work.place, minutes=0, curves=CURVES)
    assert other.results() is None and not other.work(lambda line: None)


@pytest.mark.slow
def test_what_is_written(work):
    found = work.write()
    pages, results = {"table.md", "table.csv", "table.json", "grid.png", "report.html"}, {"tcd-s0.json", "tcd-s1.json"}
    assert {path.name for path in work.out.iterdir()} == pages | results
    lines = list(csv.DictReader(io.StringIO((work.out / "table.csv").read_text())))
    assert len(lines) == len(found.results) and lines[0]["model"] == "teacher, ddim"
    by_label = {(row["model"], row["seed"], row["steps"]): row for row in lines}
    mine = next(e for e in found.results if (e.model, e.seed, e.steps) == ("tcd", 0, 2))
    row = by_label["tcd", "0", "2"]
    assert float(row["detail FD"]) == mine.figures["detail FD"]
    assert float(row["forward_equivalents"]) == load_card(work.place / "tcd-s0" / "student").forward_equivalents > 0
    lines = (work.out / "table.md").read_text().splitlines()
    assert sum(line.startswith("| ") for line in lines) == 3 * (2 + 2) + (
        3 + len(found.results)
    )  # with heads and floor
    kept = json.loads((work.out / "tcd-s1.json").read_text())
    assert list(kept["steps"]) == ["1", "2"] and kept["prompts"] == COUNT
    page = unescape((work.out / "report.html").read_text())
    assert page.count('role="img"') == 6 and "http" not in page
    for sentence in verdict(found):
        assert sentence in page and f"- {sentence}" in lines and sentence.startswith("tcd, mean of 2 seeds, ")
    assert (
        f'<p class="note">{COUNT} captions of unseen scenes, against real scenes; teacher {work.recipe.teacher.path}.'
        in page
    )


@pytest.mark.slow
def test_the_summary_is_over_seeds(work):
    """A column for each number of steps, compared with the figures of the results."""
    found = work.results()
    table = summary(found, "FD")
    teacher, student = table.rows
    assert table.head == ["FD", "1 step", "2 steps", f"{found.full.steps} steps"]
    assert (teacher[0], student[0]) == ("teacher, ddim", "tcd, seeds 0, 1")
    assert "±" not in "".join(teacher) and student[3] == ""
    two = [e.figures["FD"] for e in found.results if (e.model, e.steps) == ("tcd", 2)]
    mean, spread = student[2].split(" ± ")
    assert float(mean) == pytest.approx(sum(two) / 2, rel=0.005)
    assert float(spread) == pytest.approx(abs(two[0] - two[1]) / 2**0.5, abs=0.005 * sum(two) / 2)


def test_a_cell_of_the_summary():
    one = result("lcm", 4, 0.21234, accuracy=0.531)
    assert over_seeds("FD", [one]) == one.in_words("FD")
    two = [one, result("lcm", 4, 0.23234, accuracy=0.531)]
    assert over_seeds("FD", two) == "0.222 ± 0.014" and over_seeds("accuracy", two) == "0.531 ± 0.000"
    assert over_seeds("FD", [result("lcm", 4, 12345.0)] * 2) == "12345 ± 0" and over_seeds("FD", []) == ""


def test_two_processes_take_different_runs(runs, tmp_path, monkeypatch):
    """What another one is at is left to it."""
    mine, trained, said = Benchmark(runs, tmp_path / "out", tmp_path, curves=()), [], []
    monkeypatch.setattr(mine, "_train", lambda run: trained.append(run.name) or True)
    monkeypatch.setattr(mine, "_measure", lambda run: True)
    with held(tmp_path / "tcd-s0.lock") as ours:
        assert ours and not mine.work(said.append)
    assert trained == ["tcd-s1"] and said == [
        "tcd-s0: another process is working on it",
        "tcd-s1: training and measuring",
    ]
    mine.work(said.append)
    assert trained == ["tcd-s1", "tcd-s0", "tcd-s1"]


@pytest.mark.slow
def test_who_finds_nothing_but_what_others_are_at_is_not_done(work):
    with held(work.place / "teacher.lock"):
        assert not work.work(lambda line: None)
    assert work.work(lambda line: None)


@pytest.mark.slow
def test_what_another_process_has_finished_meanwhile_is_done(work, monkeypatch):
    """The first look finds it busy; the last one, that it is there."""
    looks = iter([False, True, True, True])
    monkeypatch.setattr(work, "is_measured", lambda run: next(looks))
    with held(work.place / "tcd-s0.lock"):
        assert work.work(lambda line: None)


@pytest.mark.slow
def test_a_result_is_read_as_it_was_written_and_a_damaged_one_is_named(work, tmp_path):
    before = work.results().results[-1]
    before.save(tmp_path / "one.safetensors")
    with safe_open(tmp_path / "one.safetensors", framework="pt") as file:  # as files of earlier versions
        assert file.metadata().keys() == {"entry"} and "pictures" in file.keys()  # noqa: SIM118
    after = Result.load(tmp_path / "one.safetensors")
    assert after.as_plain() == before.as_plain() and after.images.equal(before.images)
    assert all(after.resampled[name].equal(values) for name, values in before.resampled.items())
    (tmp_path / "two.safetensors").write_bytes((tmp_path / "one.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"two.safetensors is damaged"):
        Result.load(tmp_path / "two.safetensors")


# ---------------------------------------------------------------- one cost


@pytest.mark.slow
def test_a_budget_sets_the_steps(work, short):
    """The real cost of a run within a budget: not above it, and no whole step below."""
    recipe = load_recipe("scenes-64-tcd", short)
    spent = load_card(work.place / "tcd-s0" / "student").forward_equivalents
    per_step = spent / recipe.training.steps
    assert within(recipe, 7 * per_step).training.steps == 7
    assert within(recipe, 7.99 * per_step).training.steps == 7
    with pytest.raises(RecipeError, match="too small"):
        within(recipe, 0.5 * per_step)


@pytest.mark.slow
def test_the_memory_of_a_chain_is_that_of_the_stage_that_needs_most(short, work):
    """And what a row says is what `--dry-run` says of its recipe."""
    (row,) = [r for r in rows(work.results()) if (r["model"], r["seed"], r["steps"]) == ("tcd", 0, 1)]
    assert row["memory"] == sum(plan(work.runs[0].recipe, timed=False).estimate.training.values()) > 0
    chain = load("scenes-64-lightning", [f"teacher={short[0].partition('=')[2]}", "training.batch_size=4"])
    run = Run(work.runs[0].job, 0, chain, ())
    needs = {name: memory_of_step(recipe) for name, recipe in chain.on_first_teacher().items()}
    assert run.memory == max(needs.values()) == needs["conditional"] > needs["unconditional"]


@pytest.mark.slow
def test_a_chain_shares_its_budget_among_its_stages(short):
    chain = load("scenes-64-lightning", [f"teacher={short[0].partition('=')[2]}", "training.batch_size=4"])
    sized = within(chain, 2e6)
    steps = [[stage.recipe.training.steps for stage in one.stages] for one in (chain, sized)]
    longer = [new / old for old, new in zip(*steps, strict=True)]
    assert min(longer) > 1.5 and max(longer) / min(longer) < 1.01


@pytest.mark.slow
def test_pairs_are_paid_for_first(short):
    recipe = load_recipe("scenes-64-dmd", [*short, "pairs.size=10", "pairs.num_inference_steps=5"])
    cost = 10 * 5 * 2  # guided
    per_step = (6_000 - cost) / within(recipe, 6_000).training.steps
    assert within(recipe, cost + 100.5 * per_step).training.steps == pytest.approx(100, abs=1)
    with pytest.raises(RecipeError, match="too small"):
        within(recipe, cost)


# ---------------------------------------------------------------- jobs


def test_a_jobs_file_says_what_to_run(tmp_path):
    file = tmp_path / "quick.yaml"
    file.write_text("recipe: scenes-64-lcm\nset: {training.steps: 7}\nseeds: [3, 4]\nsteps: [4]\n")
    job = BenchmarkEntry.of(str(file))
    assert (job.name, job.seeds, job.steps, job.count) == ("quick", (3, 4), (4,), 5000)
    assert [(run.name, run.steps, run.last.seed) for run in job.runs()] == [("quick-s3", 7, 3), ("quick-s4", 7, 4)]
    assert BenchmarkEntry.of(str(file), seeds=(0,), count=None).seeds == (0,)
    assert BenchmarkEntry.of("scenes-64-tcd").name == "scenes-64-tcd"
    file.write_text("recipe: scenes-64-lcm\nsead: 3\n")
    with pytest.raises(RecipeError, match="no key 'sead'"):
        BenchmarkEntry.of(str(file))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("seeds: 3", "seeds: input should be a valid tuple, not 3"),
        ("seeds: []", "seeds: tuple should have at least 1 item"),
        ("steps: [0]", "steps.0: input should be greater than 0"),
        ("set: [1, 2]", "set: input should be a valid dictionary"),
        ("budget: much", "budget: input should be a valid number"),
        ("budget: .inf", "budget: input should be a finite number"),
        ("count: 7", "count: input should be greater than or equal to 8"),
        ("without: one", "without: input should be a valid tuple"),
        ("name: ../elsewhere", "to be the name of a folder"),
        ("name: ..", "to be the name of a folder"),
    ],
)
def test_a_job_that_makes_no_sense_is_one_sentence(wrong, said, tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text(f"recipe: scenes-64-tcd\n{wrong}\n")
    with pytest.raises(RecipeError, match=f"job.yaml: .*{said}"):
        BenchmarkEntry.of(str(file))


def test_a_job_may_leave_out_what_no_later_stage_begins_with():
    """The unified LoRA of Hyper-SD without the one-step model beside it: its budget, its measured steps."""
    job = BenchmarkEntry("hyper", "scenes-64-hyper", without=("one-step",))
    (run,) = job.runs()
    assert [stage.name for stage in run.recipe.stages] == ["eight", "four", "two", "one", "unified"]
    assert run.measured_at == (1, 2, 4, 8)
    for left_out, said in ((("eight",), "a later stage begins with eight"), (("nine",), "nine is no stage of this")):
        with pytest.raises(RecipeError, match=said):
            list(replace(job, without=left_out).runs())
    with pytest.raises(RecipeError, match="it has none"):
        list(BenchmarkEntry("tcd", "scenes-64-tcd", without=("one",)).runs())


def test_the_jobs_of_the_documents_are_there():
    """One table of every method, and what the claims want beside it."""
    folder = Path(__file__).parents[2] / "benchmarks"
    for place, names in (("table", 18), ("claims", 5)):
        jobs = [replace(BenchmarkEntry.of(str(file)), budget=None) for file in (folder / place).glob("*.yaml")]
        assert len({run.job.name for job in jobs for run in job.runs()}) == names


def test_a_student_of_its_own_steps_is_measured_at_no_others():
    job = BenchmarkEntry("pcm", "scenes-64-pcm", {"method.num_phases": 2}, steps=(1, 2, 4))
    others = replace(job, recipe="scenes-64-tcd", set={})
    assert [next(one.runs()).measured_at for one in (job, others)] == [(2,), (1, 2, 4)]


def test_one_table_holds_one_teacher_one_guidance_and_different_names(runs, tmp_path):
    other = Run(runs[0].job, 7, load_recipe("scenes-64-tcd", ["sample.guidance_scale=1"]), ())
    for wrong, said in (([other], "teachers"), ([runs[0]], "one name")):
        with pytest.raises(RecipeError, match=said):
            Benchmark([*runs, *wrong], tmp_path, tmp_path)


def test_all_methods_have_a_recipe_to_be_compared_by():
    names = every_method()
    assert len(names) >= 10 and all(load(name) is not None for name in names)
