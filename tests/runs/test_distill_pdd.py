"""A PDD run from recipe to image: one file, three numbers of steps, a card that leads to the blocks."""

import json

import pytest
import torch

from fewstep.inference.load import load
from fewstep.recipe.load import load_recipe
from fewstep.runs.distill import distill
from fewstep.runs.setup import setup
from fewstep.students.card import load_card
from fewstep.students.lineage import open_teacher
from fewstep.students.student import load_student, load_weights
from fewstep.training import checkpoint
from tests.command_line import inside, stop_and_go_on

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(short, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "pdd"
    recipe = load_recipe("scenes-64-pdd", [*short, "training.ema_decay=0"])  # the file then has the last weights
    distill(recipe, folder)
    return recipe, folder


def test_one_file_takes_all_its_numbers_of_steps_and_no_other(run, monkeypatch, capsys, tmp_path):
    folder = run[1]
    model, card = load(folder), load_card(folder / "student")
    assert [p.name for p in (folder / "student").glob("*.safetensors")] == ["fewstep_student.safetensors"]
    assert (card.bank_steps, card.num_inference_steps, card.bank[0], card.bank[-1]) == ((4, 2, 8), 4, 999.0, -1.0)
    found = {n: model.sample(["a red star"], n, output_type="latent") for n in (None, 2, 4, 8)}
    assert torch.equal(found[None], found[4]) and not torch.equal(found[2], found[8])
    code, _, err = inside(monkeypatch, capsys, tmp_path, "sample", folder, "-p", "a red star", "--steps", "5")
    assert code == 2 and "was trained to take 2 or 4 or 8 steps, not 5" in err and err.count("\n") == 1
    code, _, err = inside(monkeypatch, capsys, tmp_path, "sample", folder, "-p", "a", "--timesteps", "900,400")
    assert code == 2 and "900 is none of them" in err and err.count("\n") == 1


def test_the_student_on_disk_is_the_trained_one(run, tmp_path):
    """The trained role, whose layers learn at a tenth of the rate, against the file, which holds their differences."""
    recipe, folder = run
    trained = setup(recipe, tmp_path / "again")
    trained.roles.load_tensors(checkpoint.split(checkpoint.load(checkpoint.latest(folder / "checkpoints"))[0], "roles"))
    card = load_card(folder / "student")
    weights = load_weights(folder / "student")
    assert weights["bank.weight"].shape[0] == 32 and weights["bank.weight"].any()
    student = load_student(trained.teacher, folder / "student", card)
    x, cond = (
        torch.randn(2, *trained.teacher.latent_shape),
        trained.teacher.encode_prompts(["a red star", "two shapes"]),
    )
    other = trained.roles.student(x, card.bank[8], cond, end=card.bank[16]).output
    torch.testing.assert_close(student(x, card.bank[8], cond, end=card.bank[16]).output, other, rtol=1e-4, atol=1e-5)


def test_a_step_costs_what_the_documents_say(run):
    """An image and a block: student 1 + 2, teacher 2 for guidance; 2, 4 or 8 blocks."""
    lines = [json.loads(line) for line in (run[1] / "log.jsonl").read_text().splitlines()]
    cost = [line["forward_equivalents"] for line in lines]
    assert cost[0] % (5 * 4 * 2) == 0 and cost == sorted(cost)
    assert any(key.startswith("student/block_") for key in lines[-1])


def test_it_is_no_teacher_and_its_export_is_refused(run, monkeypatch, capsys, tmp_path):
    folder = run[1]
    with pytest.raises(ValueError, match="has 32 last layers and cannot be a teacher: train it without them"):
        open_teacher(str(folder))
    for to in ("diffusers", "lora", "kohya", "merged"):
        code, _, err = inside(monkeypatch, capsys, tmp_path, "export", folder, "--to", to, "--out", "there")
        assert code == 2 and "a last layer for every step, which no pipeline of diffusers exchanges" in err
    assert not (tmp_path / "there").exists()


def test_stopping_and_resuming_ends_in_the_same_layers_and_moments(run, tmp_path, monkeypatch):
    recipe, folder = run
    stop_and_go_on(monkeypatch, recipe, tmp_path / "run", 2)
    mine, theirs = (
        checkpoint.load(checkpoint.latest(place / "checkpoints"))[0] for place in (tmp_path / "run", folder)
    )
    assert checkpoint.same(mine, theirs)
    assert any("bank.weight" in key for key in mine)
