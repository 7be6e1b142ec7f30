"""Exports as files: equal to the byte each time, and nothing half-written when the disk is full."""

from __future__ import annotations

import resource
from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open

from fewstep.data.files import save_tensors
from fewstep.export import publish
from fewstep.export.publish import export
from fewstep.recipe.load import load_recipe
from fewstep.runs.distill import distill
from tests.command_line import inside
from tests.export.test_publish import run  # noqa: F401


@contextmanager
def room_for(size):
    """Within this block no file may grow beyond ``size`` bytes: every library meets the system's own error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_safetensors_file_is_the_same_each_time(tmp_path):
    """Its own library writes the header's entries in a new order each time; tensors and entries are what they were."""
    entries = {f"key {i}": 'é"\\\n\t\x01\x7f' * i for i in range(20)}
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.float16), "c": torch.zeros(0)}
    for i in range(8):
        save_tensors(tmp_path / str(i), tensors, dict(sorted(entries.items(), reverse=bool(i % 2))))
    assert len({(tmp_path / str(i)).read_bytes() for i in range(8)}) == 1
    with safe_open(tmp_path / "0", "pt") as file:
        assert file.metadata() == entries
        assert all(torch.equal(file.get_tensor(name), value) for name, value in tensors.items())
    save_tensors(tmp_path / "bare", tensors)
    with safe_open(tmp_path / "bare", "pt") as file:
        assert file.metadata() in (None, {}) and torch.equal(file.get_tensor("b"), tensors["b"])


@pytest.mark.slow
@pytest.mark.parametrize("to", ["lora", "kohya", "diffusers", "merged"])
def test_two_exports_are_equal_to_the_byte(to, run, in_this_process, tmp_path):  # noqa: F811
    for name in ("first", "second"):
        export(run, to, tmp_path / name)
    first, second = contents(tmp_path / "first"), contents(tmp_path / "second")
    assert first.keys() == second.keys() and len(first) >= 5
    assert [name for name in first if first[name] != second[name]] == []


@pytest.mark.parametrize("to, size", [
    pytest.param("lora", 0, marks=pytest.mark.slow), ("lora", 10_000),
    *(pytest.param(to, size, marks=pytest.mark.slow)
      for to in ("diffusers", "merged", "kohya") for size in (100, 3_000, 40_000)),
])  # fmt: skip
def test_a_full_disk_is_one_sentence_and_leaves_nothing(to, size, run, in_this_process, tmp_path):  # noqa: F811
    with room_for(size), pytest.raises(ValueError) as error:
        export(run, to, tmp_path / "new" / "deeper" / "out")
    said = str(error.value)
    assert said.startswith(f"The export cannot be written to {tmp_path}") and said.endswith("nothing was left behind.")
    assert "\n" not in said and "(File too large" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("late", ["README.md", "LICENSE.md"])
def test_a_disk_that_fills_up_at_the_end(late, run, in_this_process, tmp_path, monkeypatch, capsys):  # noqa: F811
    real = publish.write_text

    def write(path, text):
        if path.name == late:
            raise OSError(28, "No space left on device", str(path))
        real(path, text)

    monkeypatch.setattr(publish, "write_text", write)
    code, _, err = inside(monkeypatch, capsys, tmp_path, "export", run, "--to", "lora", "--out", "there")
    assert code == 2 and err.count("\n") == 1 and "No space left on device" in err and "Traceback" not in err
    assert not (tmp_path / "there").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("out", ["file/inside", "file", "n" * 300, "file/in/side"])
def test_a_place_that_cannot_be_is_one_sentence(out, run, tmp_path, monkeypatch, capsys):  # noqa: F811
    (tmp_path / "file").write_bytes(b"mine")
    code, _, err = inside(monkeypatch, capsys, tmp_path, "export", run, "--to", "lora", "--out", out)
    assert code == 2 and err.count("\n") == 1 and "--out" in err and "Traceback" not in err
    assert contents(tmp_path) == {"file": b"mine"} and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_holds_something_is_left_alone(run, tmp_path):  # noqa: F811
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_bytes(b"x")
    with pytest.raises(ValueError, match="is there already"):
        export(run, "lora", tmp_path / "out")
    assert contents(tmp_path) == {"out/mine": b"x"}


@pytest.mark.slow
def test_two_runs_of_one_recipe_are_equal_to_the_byte(short, tmp_path):
    """Student, card, its samples and the training state; the log has times, and the folder is another one's."""
    recipe = load_recipe("scenes-64-tcd", short)
    for name in ("first", "second"):
        distill(recipe, tmp_path / name)
    first, second = contents(tmp_path / "first"), contents(tmp_path / "second")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name] and name != "log.jsonl"] == []
    assert {"student/pytorch_lora_weights.safetensors", "student/few_step.json"} <= first.keys()
    assert any(name.startswith("checkpoints/") for name in first)
