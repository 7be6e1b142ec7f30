"""`fewstep doctor`, `--dry-run` and running out of memory: what users read before, instead of and after a run."""

from __future__ import annotations

import json
import os
import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from fewstep.methods.tcd import TCD
from fewstep.planning import doctor
from fewstep.planning.doctor import NOTE, OK, PROBLEM, difference, examine, lora_step, packages
from fewstep.recipe.load import load_recipe, parse_recipe
from fewstep.runs.distill import distill
from fewstep.runs.out_of_memory import OutOfMemory, explained
from fewstep.runs.plan import Change, Plan, _seconds, cheaper, describe, fits, plan
from tests.command_line import inside, sets

# ------------------------------------------------------------------ dry run and plan


def test_a_dry_run_is_a_recipe_with_remarks(tmp_path, monkeypatch, capsys):
    code, output, errors = inside(
        monkeypatch, capsys, tmp_path, "distill", "scenes-64-tcd", "--dry-run", *sets(["training.batch_size=4"])
    )
    assert code == 0 and "Error" not in errors
    assert not any(tmp_path.iterdir())
    again = parse_recipe(yaml.safe_load(output))
    assert again.as_yaml() == load_recipe("scenes-64-tcd", ["training.batch_size=4"]).as_yaml()
    remarks = [line for line in output.splitlines() if line.startswith("# ")]
    assert output.endswith("\n".join(remarks) + "\n")  # the recipe first, then what it needs
    said = "\n".join(remarks)
    for words in (
        "unet 2,515,592",
        "student 1,253,632 (LoRA of rank 32 on 115 layers)",
        "network calls per step: student 1, teacher 1, target 1; cost per image: 6 forward passes "
        "(a backward pass counts as 2)",
        "10.1 MB  the teacher's network",
        "41.0 MB  encoded data",
        "10.0 MB  optimiser",
    ):
        assert words in said
    assert re.search(r"1,000 steps of 4 images: about \d+(\.\d)? (seconds|minutes|hours) on this cpu", said)


def test_a_plan_of_what_cannot_be_distilled_counts_parameters(tmp_path, monkeypatch, capsys):
    config = {"_class_name": "DiTTransformer2DModel", "num_layers": 1, "attention_head_dim": 8, "sample_size": 8}
    (tmp_path / "dit").mkdir()
    (tmp_path / "dit" / "config.json").write_text(json.dumps(config))
    arguments = ["doctor", "--plan", "scenes-64-tcd", *sets([f"teacher.path={tmp_path / 'dit'}"])]
    code, output, _ = inside(monkeypatch, capsys, tmp_path, *arguments)
    assert code == 1 and "parameters of" in output
    assert "DiTTransformer2DModel is not supported as a teacher: use Stable Diffusion" in output


def test_what_does_not_fit_is_said_and_parts_add_up(monkeypatch):
    planned = plan(load_recipe("scenes-64-tcd"), timed=False)
    assert fits(planned) and not any("DOES NOT FIT" in line for line in describe(planned))
    monkeypatch.setattr("fewstep.runs.plan.memory", lambda device: (100_000_000, 200_000_000))
    assert not fits(planned) and "THIS DOES NOT FIT: 135 MB are needed and 100 MB are free" in describe(planned)
    assert _seconds(planned.recipe, planned.outline, planned.estimate) is None  # and no step is tried then
    monkeypatch.undo()
    parts = [line for line in describe(planned) if line.startswith("  ")]
    said = sum(float(line.split()[0]) for line in parts)
    assert said == pytest.approx(sum(planned.estimate.training.values()) / 1e6, abs=0.1 * len(parts))


# ------------------------------------------------------------------ less memory


def test_advice_is_ordered_by_what_it_saves(monkeypatch):
    """Whatever the rehearsals say; here each setting has a price of its own."""
    asked = []

    def price(recipe, sketch, **known):
        asked.append(("step" in known, "memory_alone" in known))
        t, kind = recipe.training, recipe.student.weights
        cost = 1000 * t.batch_size // t.accumulation - 3000 * t.gradient_checkpointing + 500 * (kind == "full")
        cost += {"fp32": 70, "bf16": 0}[t.precision] + {"adamw": 1, "adamw8bit": 0}[t.optimizer] + recipe.student.rank
        cost += 40 * (recipe.teacher.quantize is None)
        return SimpleNamespace(training={"all": cost}, rehearsal=None)

    monkeypatch.setattr("fewstep.runs.plan._estimate", price)

    def advice(*changes):
        recipe = load_recipe("scenes-64-tcd", ["training.batch_size=6", *changes])
        return cheaper(Plan(recipe, None, price(recipe, None), "", None))

    assert [(c.key, c.value, c.saves, c.same_run) for c in advice("student.weights=full")] == [
        ("training.accumulation", "2", 3000, True),
        ("training.gradient_checkpointing", "true", 3000, True),
        ("student.weights", "lora", 500, False),
        ("training.precision", "bf16", 70, False),
    ]  # eight bits save less than half a per cent
    last = advice("training.accumulation=6", "training.gradient_checkpointing=true", "training.precision=bf16",
                  "training.optimizer=adamw8bit", "student.rank=2020")  # fmt: skip
    assert [(c.key, c.value, c.same_run) for c in last] == [
        ("student.rank", "1010", False),
        ("teacher.quantize", "int8", False),
    ]
    assert asked[-3:] == [(False, False), (False, True), (True, False)]  # a quantised base has the same step
    assert str(last[0]) == "student.rank=1010 (saves about 1.0 kB)"


@pytest.mark.slow
def test_out_of_memory_is_one_sentence_with_advice(short, tmp_path, monkeypatch, capsys):
    error = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096000000 bytes. Error code 12"
    calls = []
    original = TCD.student

    def student(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError(error)
        return original(self, *arguments)

    with monkeypatch.context() as planted:
        planted.setattr(TCD, "student", student)
        arguments = ["distill", "scenes-64-tcd", "--out", "run", *sets(short), "-q"]
        code, _, errors = inside(planted, capsys, tmp_path, *arguments)
    last = errors.strip().splitlines()[-1]
    assert code == 2 and "Traceback" not in errors
    assert last.startswith("Error: Out of memory on cpu: 4.10 GB more were asked for (")
    assert re.search(r"This run needs about \d+(\.\d)? MB at its peak", last)
    assert "training.accumulation=2 (saves about" in last
    assert "with --resume" not in last and "a run may be resumed" in last
    assert os.path.join("run", "checkpoints", "step-0000002") in last
    saved = [float(size) for size in re.findall(r"saves about ([\d.]+) MB", last)]
    assert len(saved) >= 2 and saved == sorted(saved, reverse=True)
    # and it may: accumulation changes no number beyond rounding
    changed = load_recipe("scenes-64-tcd", [*short, "training.accumulation=2", "training.gradient_checkpointing=true"])
    assert distill(changed, tmp_path / "run", resume=True).is_dir()


def test_cuda_says_it_in_its_own_way(tmp_path, monkeypatch):
    changes = [Change("training.accumulation", "2", 9 * 10**9), Change("student.rank", "16", 10**8)]
    monkeypatch.setattr("fewstep.runs.out_of_memory.plan", lambda recipe, timed: SimpleNamespace(estimate=None))
    monkeypatch.setattr("fewstep.runs.out_of_memory.cheaper", lambda planned: changes)
    recipe = load_recipe("scenes-64-tcd", ["training.device=cuda"])
    with pytest.raises(OutOfMemory) as caught, explained(recipe, tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.81 GiB. GPU 0 has 24 GiB")
    assert str(caught.value) == (
        "Out of memory on cuda: 4.09 GB more were asked for. What helps, most effective first: "
        "training.accumulation=2 (saves about 9.00 GB), student.rank=16 (saves about 100 MB); with "
        "training.accumulation a run may be resumed, the others need another --out. "
        "No checkpoint was written yet."
    )


def test_memory_may_run_out_while_encoding(short, tmp_path, monkeypatch):
    def encode(*arguments):
        raise MemoryError

    monkeypatch.setattr("fewstep.runs.dataset.scene_latents", encode)
    monkeypatch.setattr("fewstep.runs.out_of_memory.cheaper", lambda planned: [])
    with pytest.raises(OutOfMemory, match=r"^Out of memory on cpu \(.* free\)\. .*No checkpoint was written yet\.$"):
        distill(load_recipe("scenes-64-tcd", short), tmp_path / "run")


def test_other_errors_pass(short, tmp_path, monkeypatch):
    def encode(*arguments):
        raise RuntimeError("something else")

    monkeypatch.setattr("fewstep.runs.dataset.scene_latents", encode)
    with pytest.raises(RuntimeError, match="something else"):
        distill(load_recipe("scenes-64-tcd", short), tmp_path / "run")


def test_sampling_may_run_out_of_memory_too(tmp_path, monkeypatch, capsys):
    def load(*_, **__):
        torch.empty(10**15)

    monkeypatch.setattr("fewstep.inference.generate.load_model", load)
    code, _, errors = inside(monkeypatch, capsys, tmp_path, "sample", "scenes-64")
    assert (code, errors) == (2, "Error: Out of memory: ask for fewer images at once (--prompt, --count).\n")


# ------------------------------------------------------------------ the machine


def found(versions):
    def find(name):
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    return find


REQUIRED = ["torch>=2.6", "peft>=0.18", "rich", 'bitsandbytes>=0.48; extra == "lowmem"', 'pytest; extra == "dev"']


@pytest.mark.parametrize("versions, level, says", [
    ({"torch": "2.13.0+cpu", "peft": "0.18", "rich": "15"}, OK, "torch 2.13.0+cpu (>=2.6)"),
    ({"torch": "2.5.1", "peft": "0.18", "rich": "15"}, PROBLEM, "torch 2.5.1 is not >=2.6 -> pip install 'torch>=2.6'"),
    ({"torch": "2.6", "peft": "0.17.9", "rich": "15"}, PROBLEM, "peft 0.17.9 is not >=0.18"),
    ({"torch": "2.6", "peft": "0.18"}, PROBLEM, "rich is missing -> pip install 'rich'"),
])  # fmt: skip
def test_versions_are_held_against_their_ranges(versions, level, says):
    lines = list(packages(REQUIRED, found(versions)))
    assert [str(line) for line in lines if says in str(line)] and level in {line.level for line in lines}
    assert sum(line.level == PROBLEM for line in lines) == (level == PROBLEM)
    assert not any("pytest" in str(line) for line in lines)


@pytest.mark.parametrize("there", [True, False])
def test_extras_say_what_they_give(there):
    versions = {"torch": "2.6", "peft": "0.18", "rich": "15"} | ({"bitsandbytes": "0.50.2"} if there else {})
    line = list(packages(REQUIRED, found(versions)))[-1]
    assert line.level == (OK if there else NOTE) and "adamw8bit" in line.text
    assert there or "pip install 'fewstep[lowmem]'" in line.advice


def test_a_torchvision_that_breaks_diffusers_is_found(tmp_path, monkeypatch):
    assert doctor._torchvision().level == OK
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    line = doctor._torchvision()
    assert line.level == PROBLEM and "nms does not exist" in line.text and line.advice == "pip uninstall torchvision"


def test_little_room_is_a_note_and_none_a_problem(tmp_path, monkeypatch):
    usage = type("usage", (), {})
    for free, level in ((50e9, OK), (1e9, NOTE), (1e6, PROBLEM)):
        usage.free = free
        monkeypatch.setattr("shutil.disk_usage", lambda place: usage)
        assert doctor._disk(tmp_path / "not" / "there").level == level
    for free, level in ((50e9, OK), (1e9, NOTE)):
        monkeypatch.setattr("fewstep.planning.doctor.memory", lambda device, free=free: (int(free), 64 * 10**9))
        assert doctor._memory().level == level


def test_more_threads_than_processors_are_noticed(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    assert any("set OMP_NUM_THREADS=1" in str(line) for line in doctor._torch())


def test_a_wrong_number_is_a_problem(monkeypatch):
    line = doctor._numbers("cpu")
    assert line.level == OK and "a LoRA step of 4 images takes" in line.text
    silu = torch.nn.functional.silu

    def wrong(x, inplace=False):  # a kernel that is 2 % off, in single precision alone
        return silu(x) * (1.02 if x.dtype == torch.float32 else 1.0)

    monkeypatch.setattr("torch.nn.functional.silu", wrong)
    line = doctor._numbers("cpu")
    assert line.level == PROBLEM and "off float64's" in line.text
    monkeypatch.setattr("fewstep.planning.doctor.load_teacher", lambda name: Path("/no/such").read_text())
    assert "scenes-64 does not run on cpu" in doctor._numbers("cpu").text


def test_a_difference_that_is_no_number_is_no_agreement():
    exact = {"a": torch.ones(4, dtype=torch.float64)}
    assert difference({"a": torch.tensor([1.0, 1.0, 1.0, 1.2])}, exact) == pytest.approx(0.1)
    assert not difference({"a": torch.full((4,), float("nan"))}, exact) < 1


def test_the_steps_numbers_are_those_of_the_pipeline():
    """The teacher's landing point by diffusers alone: DDIM's own scheduler, guidance written out."""
    from fewstep.data.random import Rng
    from fewstep.diffusion.schedule import Schedule
    from fewstep.models.families import load_teacher

    numbers, seconds = lora_step("cpu", "fp64")
    assert seconds > 0 and numbers["loss"].dtype == torch.float64
    teacher = load_teacher("scenes-64")
    pipeline = teacher.pipeline
    rng = Rng(0, 0, 4)
    x0, noise = (rng.sample.normal(name, teacher.latent_shape) for name in ("x0", "noise"))
    draws = TCD(Schedule.scaled_linear()).draw(type("B", (), {"x0": x0}), rng, None)
    grid = TCD(Schedule.scaled_linear()).grid
    t, u = grid[draws.index + 1].long(), grid[draws.index]
    bar = pipeline.scheduler.alphas_cumprod
    x_t = pipeline.scheduler.add_noise(x0, noise, t)
    embeds = teacher.encode_prompts(["a red circle", "two shapes", "a blue star", "a striped square"])
    with torch.no_grad():
        with_ = pipeline.unet(x_t, t, encoder_hidden_states=embeds["prompt_embeds"]).sample
        without = pipeline.unet(x_t, t, encoder_hidden_states=embeds.null()["prompt_embeds"]).sample
    eps = without + 3 * (with_ - without)
    a_t = bar[t].reshape(-1, 1, 1, 1)
    a_u = torch.where(u < 0, 1.0, bar[u.long().clamp_min(0)]).reshape(-1, 1, 1, 1)
    landed = a_u.sqrt() * (x_t - (1 - a_t).sqrt() * eps) / a_t.sqrt() + (1 - a_u).sqrt() * eps
    torch.testing.assert_close(numbers["teacher"].float(), landed.float(), rtol=1e-3, atol=1e-3)


def test_the_doctor_ends_with_its_verdict(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fewstep.planning.doctor._numbers", lambda device: doctor.Finding(OK, f"numbers on {device}"))
    code, output, errors = inside(monkeypatch, capsys, tmp_path, "doctor")
    assert (code, errors) == (0, "")
    lines = output.splitlines()
    assert all(line.split()[0] in (OK, NOTE, PROBLEM) for line in lines)
    free = ("of memory are free", "of disk are free")
    for words in ("python 3.", "torch 2.", *free, "diffusers ", "models from the Hugging Face Hub", "numbers on cpu"):
        assert sum(words in line for line in lines) >= 1
    assert len(lines) == len(list(examine()))
    monkeypatch.setattr("fewstep.planning.doctor._numbers", lambda device: doctor.Finding(PROBLEM, "wrong", "do this"))
    code, output, _ = inside(monkeypatch, capsys, tmp_path, "doctor")
    assert code == 1 and output.splitlines()[-1] == "problem  wrong -> do this"
