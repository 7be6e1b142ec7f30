"""Inputs that people get wrong: one sentence that names the place, before any work is done, and nothing lost."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fewstep.inference.generate import generate, load_model
from fewstep.recipe.load import load_recipe
from fewstep.recipe.validate import RecipeError
from fewstep.runs.distill import distill
from fewstep.runs.fit import check_device
from fewstep.students.card import CARD_FILE, load_card
from fewstep.training.console import command
from fewstep.training.logging import JsonLines


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.betas", "[2, 3]"),
        ("training.eps", "-1"),
        ("training.weight_decay", "-1"),
        ("training.warmup_steps", "-3"),
        ("training.max_grad_norm", "-1"),
        ("training.ema_decay", "1.0"),
        ("training.ema_decay", ".nan"),
        ("training.learning_rate", ".inf"),
        ("training.critic_learning_rate", "-1"),
        ("sample.prompts", "[]"),
        ("sample.guidance_scale", ".inf"),
        ("seed", "99999999999999999999999"),
        ("training", "{5: 3}"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(key, value):
    with pytest.raises(RecipeError, match=key.removesuffix("{5: 3}")):
        load_recipe("scenes-64-tcd", [f"{key}={value}"])


@pytest.mark.parametrize("value", [".nan", "-1", "[3, .inf]"])
def test_a_guidance_scale_out_of_range_is_refused(short, tmp_path, value):
    with pytest.raises(ValueError, match=r"guidance_scale must be at least 0|one number or"):
        distill(load_recipe("scenes-64-tcd", [*short, f"method.guidance_scale={value}"]), tmp_path / "run")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("training.device=foo", "no device 'foo'"),
        ("training.device=meta", "no device 'meta'"),
        ("sample.num_inference_steps=60", "60 exceeds original_inference_steps 10"),
        ("method.num_grid_steps=3", "4 exceeds original_inference_steps 3"),
        ("sample.teacher_steps=2000", "2000 exceeds the 1000 training timesteps"),
        ("student.targets=[nonsense]", "nonsense"),
    ],
)
def test_what_cannot_run_is_refused_at_once_and_claims_no_folder(short, tmp_path, wrong, says):
    with pytest.raises(ValueError, match=says):
        distill(load_recipe("scenes-64-tcd", [*short, wrong]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_cpu_is_a_device():
    check_device("cpu")


@pytest.mark.parametrize("content", [b"{{{", b"", b"\xff\xfe"])
def test_a_damaged_stored_recipe_is_one_sentence(short, tmp_path, content):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match="is damaged"):
        distill(load_recipe("scenes-64-tcd", short), tmp_path, resume=True)
    assert (tmp_path / "recipe.yaml").read_bytes() == content


def test_a_log_with_foreign_lines_is_read(tmp_path):
    good = json.dumps({"step": 2, "loss": 1.0})
    (tmp_path / "log.jsonl").write_bytes(f"{good}\n[1, 2]\n5\nnull\n".encode() + b'\xff\xfe\n{"step": 3, "lo')
    JsonLines(tmp_path / "log.jsonl", resume_step=4)
    assert (tmp_path / "log.jsonl").read_text() == good + "\n"


@pytest.mark.parametrize(("key", "value"), [("eta", "x"), ("rank", "a"), ("teacher", 5), ("weights", "foo")])
def test_a_card_of_wrong_types_is_one_sentence(tmp_path, key, value):
    card = {"method": "tcd", "sampler": "tcd", "num_inference_steps": 4, "weights": "lora", "teacher": "t", "format": 1}
    (tmp_path / CARD_FILE).write_text(json.dumps(card))
    assert load_card(tmp_path).method == "tcd"
    (tmp_path / CARD_FILE).write_text(json.dumps({**card, key: value}))
    with pytest.raises(ValueError, match=f"damaged: {key}"):
        load_card(tmp_path)


@pytest.mark.parametrize(("scale", "seed"), [(float("nan"), 0), (float("inf"), 0), (-1.0, 0), (1.0, 2**70), (1.0, -1)])
def test_no_picture_is_made_of_nonsense(tiny, tmp_path, scale, seed):
    with pytest.raises(ValueError, match=r"guidance_scale must|seed must"):
        generate(
            load_model(str(tiny)), ["a red star"], None, {"num_inference_steps": 1}, scale, seed, tmp_path / "a.png"
        )
    assert not (tmp_path / "a.png").exists()


def test_commands_can_be_pasted():
    assert command("sample", "runs/my run", "-p", "a star") == "fewstep sample 'runs/my run' -p 'a star'"


INTERRUPTED = """
import signal
import fewstep.inference.generate, fewstep.cli
def interrupted(*_, **__):
    signal.raise_signal(signal.SIGINT)
fewstep.inference.generate.load_model = interrupted
fewstep.cli.main()
"""


def test_an_interrupted_command_says_so():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, "sample", "x"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (130, "Interrupted.")
