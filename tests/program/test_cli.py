"""The command line as users meet it: real processes, real exit codes, one sentence and no traceback."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import typer
from safetensors.torch import load_file

from fewstep.cli import app
from fewstep.recipe.load import load_recipe
from fewstep.training.checkpoint import same
from fewstep.training.trainer import Trainer
from tests.command_line import inside, sets

MAIN = [sys.executable, "-c", "from fewstep.cli import main; main()"]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def fewstep(*arguments, cwd=None):
    return subprocess.run([*MAIN, *map(str, arguments)], capture_output=True, text=True, env=ENV, cwd=cwd, timeout=240)


def test_help_is_quick_and_names_every_command():
    times = []
    for _ in range(3):
        before = os.times()
        done = fewstep("--help")
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(times) < 0.5
    assert done.returncode == 0
    for command in ("distill", "sample", "verify", "methods", "recipes", "demo", "diagnose", "teacher"):
        assert command in done.stdout


def commands(command, name="fewstep"):
    yield name, command
    for part, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{name} {part}")


def test_every_command_and_option_is_explained_by_a_sentence():
    wrong = []
    for name, command in commands(typer.main.get_command(app)):
        texts = {parameter.name: parameter.help for parameter in command.params if parameter.name != "help"}
        for where, text in {"": command.help, **texts}.items():
            first = (text or "").strip().split("\n\n")[0]
            if not first.endswith((".", ").")) or first.startswith(("Of ", "Whose ", "What ")):
                wrong.append((name, where, first))
    assert wrong == []


def test_the_version_is_printed(tmp_path, monkeypatch, capsys):
    code, output, _ = inside(monkeypatch, capsys, tmp_path, "--version")
    assert code == 0 and re.fullmatch(r"fewstep \d+\.\d+\.\d+\S*\n", output)


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    arguments = ["distill", "scenes-64-tcd", "--dry-run", "--set", "student.rank=7", "--set", "training.batch_size=4"]
    code, output, _ = inside(monkeypatch, capsys, tmp_path, *arguments)
    assert code == 0
    assert "rank: 7" in output
    assert "network calls per step: student 1, teacher 1, target 1" in output
    assert not any(tmp_path.iterdir())


def test_methods_and_recipes_are_listed(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        return inside(monkeypatch, capsys, tmp_path, "recipes", *arguments)

    assert {"lcm", "tcd"} <= set(inside(monkeypatch, capsys, tmp_path, "methods")[1].split())
    assert "scenes-64-tcd" in run()[1] and run()[1] == run("list")[1]
    assert "trajectory consistency" in run("show", "scenes-64-tcd")[1]
    assert "Did you mean 'scenes-64-tcd'?" in run("show", "scenes-64-tccd")[2]


def test_a_shipped_recipe_becomes_ones_own(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        return inside(monkeypatch, capsys, tmp_path, "recipes", "copy", *arguments)

    assert "fewstep distill mine.yaml" in run("scenes-64-tcd", "mine.yaml")[1]
    assert run("scenes-64-lcm")[0] == 0 and (tmp_path / "scenes-64-lcm.yaml").is_file()
    assert load_recipe(tmp_path / "mine.yaml") == load_recipe("scenes-64-tcd")
    code, _, errors = run("scenes-64-lcm", "mine.yaml")
    assert code == 2 and "mine.yaml exists already" in errors
    assert "There is no folder new to write mine.yaml to" in run("scenes-64-lcm", "new/mine.yaml")[2]
    assert load_recipe(tmp_path / "mine.yaml") == load_recipe("scenes-64-tcd")


def test_a_chain_is_diagnosed_by_its_last_stage_and_planned_by_dry_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "chain.yaml").write_text("stages: [{name: a, method: lcm}]")
    code, _, errors = inside(monkeypatch, capsys, tmp_path, "doctor", "--plan", "chain.yaml")
    assert code == 2 and "has stages: fewstep distill chain.yaml --dry-run prints what each needs" in errors
    for folder in ("run", "run/01-a"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "recipe.yaml").write_text("{}")
    assert "run/01-a, 0 steps" in inside(monkeypatch, capsys, tmp_path, "diagnose", "run")[1]


@pytest.mark.slow
def test_several_seeds_are_several_runs(short, tmp_path, monkeypatch, capsys):
    arguments = ["distill", "scenes-64-lcm", "--out", "runs", "--seeds", "0,3", *sets(short), "-q"]
    code, output, errors = inside(monkeypatch, capsys, tmp_path, *arguments)
    assert code == 0, errors
    assert "runs/seed-0/student" in output and "runs/seed-3/student" in output
    names = [tmp_path / "runs" / s / "student" / "pytorch_lora_weights.safetensors" for s in ("seed-0", "seed-3")]
    assert not same(*(load_file(name) for name in names))
    assert load_recipe(tmp_path / "runs" / "seed-3" / "recipe.yaml").seed == 3
    assert inside(monkeypatch, capsys, tmp_path, *arguments)[0] == 2
    assert inside(monkeypatch, capsys, tmp_path, *arguments, "--resume")[0] == 0
    for wrong in ("one", ",", ""):
        assert "--seeds needs whole numbers" in inside(monkeypatch, capsys, tmp_path, *arguments, "--seeds", wrong)[2]


@pytest.mark.parametrize("arguments, sentence", [
    (["distill", "scenes-64-tccd"], "There is no recipe 'scenes-64-tccd'. Did you mean 'scenes-64-tcd'?"),
    (["distill", "scenes-64-tcd", "--set", "trainig.steps=5"], "Unknown key 'trainig': did you mean 'training'?"),
    (["distill", "scenes-64-tcd", "--set", "training.stepz=5"],
     "Unknown key 'training.stepz': did you mean 'steps'?"),
    (["distill", "scenes-64-tcd", "--set", "method.guidance_scal=5"], "did you mean 'guidance_scale'?"),
    (["distill", "scenes-64-tcd", "--set", "training.steps=0"],
     "training.steps: input should be greater than or equal to 1, not 0."),
    (["distill", "scenes-64-tcd", "--set", "training.steps=many"], "training.steps"),
    (["distill", "scenes-64-tcd", "--set", "student.rank=large"], "student.rank"),
    (["distill", "scenes-64-tcd", "--set", "method=tdc"], "Unknown method 'tdc'"),
    (["distill", "scenes-64-tcd", "--set", "training.precision=fp16"], "precision"),
    (["distill", "scenes-64-tcd", "--set", "teacher.path=/no/such"], "There is no teacher '/no/such'"),
    (["distill", "scenes-64-tcd", "--set", "steps"], "--set needs key.subkey=value"),
    (["sample", "/no/such"], "There is no teacher '/no/such'"),
    (["verify", "tdc"], "Unknown method 'tdc'"),
    (["verify", "tcd", "--mixture", "/no/such.json"], "/no/such.json"),
])  # fmt: skip
def test_errors_are_one_sentence_and_exit_code_2(arguments, sentence, tmp_path, monkeypatch, capsys):
    code, output, errors = inside(monkeypatch, capsys, tmp_path, *arguments)
    assert code == 2
    assert sentence in errors
    assert len(errors.strip().splitlines()) == 1
    assert "Traceback" not in errors + output


def test_an_error_looks_the_same_from_outside(tmp_path):
    done = fewstep("checkpoints", "sdxl-lightnig", cwd=tmp_path)  # one that imports no torch
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("Error: There is no checkpoint")
    assert "Traceback" not in done.stderr


def test_a_wrong_option_is_explained(tmp_path):
    done = fewstep("export", cwd=tmp_path)
    assert done.returncode == 2
    assert "Missing argument" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_foreign_teacher_folder_is_refused(tiny, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "teacher"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    config["prediction_type"] = "velocity"
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    code, _, errors = inside(monkeypatch, capsys, tmp_path, "sample", folder)
    assert code == 2
    assert "Unknown prediction_type 'velocity'" in errors


def test_sampling_times_must_decrease(tiny, tmp_path, monkeypatch, capsys):
    code, _, errors = inside(monkeypatch, capsys, tmp_path, "sample", tiny, "--timesteps", "499,999")
    assert code == 2
    assert errors.strip().splitlines()[-1] == "Error: timesteps must decrease from step to step, not 499, 999."


@pytest.mark.slow
def test_ctrl_c_saves_and_resumes_to_the_same_weights(short, tmp_path, monkeypatch, capsys):
    """Interrupted in the middle, resumed in another process, and held against a run that was left alone."""
    long = [*sets(short), "--set", "training.steps=12", "--set", "training.checkpoint_every=100", "-q"]
    here = [monkeypatch, capsys, tmp_path, "distill", "scenes-64-tcd", *long, "--out"]
    code, _, errors = inside(*here, "whole")
    assert code == 0, errors
    command = [*MAIN, "distill", "scenes-64-tcd", "--out", str(tmp_path / "cut"), *long]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENV)
    log = tmp_path / "cut" / "log.jsonl"
    while process.poll() is None and not (log.is_file() and log.read_text()):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "All is saved; continue with: fewstep distill scenes-64-tcd" in errors
    assert "Traceback" not in errors
    code, _, errors = inside(*here, "cut", "--resume")
    assert code == 0, errors
    name = "student/pytorch_lora_weights.safetensors"
    assert same(load_file(tmp_path / "whole" / name), load_file(tmp_path / "cut" / name))


@pytest.mark.slow
def test_the_demo_writes_a_picture_and_a_table(short, tmp_path, monkeypatch, capsys):
    arguments = ["demo", "--out", tmp_path / "demo", *sets(short), "--count", "8", "-q"]
    trains = Trainer.run
    before = tmp_path / "demo" / "before.png"
    monkeypatch.setattr(Trainer, "run", lambda self: before.is_file() and trains(self))
    code, output, errors = inside(monkeypatch, capsys, tmp_path, *arguments)
    assert code == 0, errors
    said = output.splitlines()
    assert said[0] == f"The teacher in 2 and in 4 steps, which the student will need: {before}."
    assert re.fullmatch(
        r"Next: 16 images are encoded; 4 steps of training last about \d+ s, the comparison on 8 unseen prompts "
        r"about \d+ s\.", said[1],
    )  # fmt: skip
    assert said[-1].startswith("Your own model: fewstep distill sdxl-lcm --set teacher.path=")
    assert "teacher, 2 steps" in output
    assert "student, 4 steps" in output
    assert (tmp_path / "demo" / "demo.png").is_file()
    figures = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert [way["evaluations"] for way in figures["ways"].values()] == [4, 8, 4]
    trained = (tmp_path / "demo" / "checkpoints" / "step-0000004" / "tensors.safetensors").stat().st_mtime_ns
    assert inside(monkeypatch, capsys, tmp_path, *arguments)[0] == 0
    again = (tmp_path / "demo" / "checkpoints" / "step-0000004" / "tensors.safetensors").stat().st_mtime_ns
    assert again == trained


@pytest.mark.slow
def test_a_report_is_one_page(short, tmp_path, monkeypatch, capsys):
    made = inside(monkeypatch, capsys, tmp_path, "distill", "scenes-64-lcm", "--out", "run", *sets(short), "-q")
    assert made[0] == 0, made
    code, _, errors = inside(monkeypatch, capsys, tmp_path, "report", "run", "--count", "8", "-q")
    assert code == 0, errors
    page = (tmp_path / "report.html").read_text()
    assert len(page) < 10e6
    assert "student, 8 steps" in page
    assert "student/loss" in page
    assert "Diagnosis" in page and "fewer than 6 lines in the log" in page
    figures = json.loads((tmp_path / "report.json").read_text())
    assert next(iter(figures["ways"])) == "teacher, 2 steps"
    assert figures["ways"]["student, 8 steps"]["evaluations"] == 8
    assert inside(monkeypatch, capsys, tmp_path, "report", tmp_path)[0] == 2


def test_a_diagnosis_in_words_and_as_json(tmp_path, monkeypatch, capsys):
    line = {"student/mean_shift": 0.01, "student/data_std": 1.0}
    for name, shift, code in (("sound", 0.01, 0), ("drifted", 4.0, 1)):
        lines = [{"step": 100 * (i + 1), **line, "student/mean_shift": shift} for i in range(10)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        found = inside(monkeypatch, capsys, tmp_path, "diagnose", name)
        assert found[0] == code
        assert ("Drift of the mean: " in found[1]) == (code == 1)
        said = inside(monkeypatch, capsys, tmp_path, "diagnose", name, "--json")
        assert said[0] == code and json.loads(said[1])["healthy"] is (code == 0)
    code, _, errors = inside(monkeypatch, capsys, tmp_path, "diagnose", "none")
    assert code == 2 and errors.strip() == "Error: There is no run directory none."


@pytest.mark.slow
def test_verify_prints_every_quantity(tmp_path, monkeypatch, capsys):
    code, output, _ = inside(monkeypatch, capsys, tmp_path, "verify", "lcm", "--steps", "0", "-q")
    assert code == 0
    assert "loss at the exact fixed point" in output
    assert "NO" not in output.split()
    code, output, _ = inside(monkeypatch, capsys, tmp_path, "verify", "cm", "--steps", "0", "-q")
    assert code == 0 and output.count("cm (cd):") == output.count("cm (ct):") == 1
    code, output, _ = inside(monkeypatch, capsys, tmp_path, "verify", "lcm", "--steps", "3", "-q")
    assert code == 1
    assert "NO" in output.split()
