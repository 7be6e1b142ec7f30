"""Full weights of which no process holds more than its rows: built, saved, killed and resumed; and files in pieces."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from several import spawn

from benchmarks import sharded
from fewstep.models.sharding import Part, waiting
from fewstep.models.tensor_files import StoredFiles, write_parts, write_pieces
from fewstep.recipe.load import load_recipe
from fewstep.runs import setup
from fewstep.runs.distill import distill
from fewstep.training import checkpoint, distributed
from tests.fuzz.__main__ import tiny_teacher


@pytest.fixture(scope="module")
def measured():
    return sharded.measure(256, 8, "fp64")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["build", "checkpoint", "student"])
def test_no_process_of_four_holds_more_than_its_rows(measured, moment):
    """At the build teacher and student, each of which has these weights; rows of one process more at the save."""
    networks = {"build": 2, "checkpoint": 0, "student": 0}[moment]
    spare = 0.1 * measured["network"] + measured["largest tensor"]
    assert measured[moment] <= networks * measured["network"] / 4 + spare


@pytest.fixture(scope="module")
def in_background():
    return sharded.measure(256, 8, "fp64", background=True)


@pytest.mark.slow
def test_a_checkpoint_in_the_background_costs_a_copy_of_a_processs_rows(in_background):
    """Weights and two moments of each: a quarter of what the checkpoint holds."""
    held, spare = 3 * in_background["network"], 0.1 * in_background["network"] + in_background["largest tensor"]
    assert held <= in_background["in a checkpoint"] <= 1.01 * held
    assert held / 4 <= in_background["checkpoint"] <= held / 4 + spare


@pytest.mark.slow
def test_killed_while_it_writes_in_the_background_it_continues_from_the_last_whole_checkpoint(in_background):
    assert -9 in in_background["killed while saving"] and 0 not in in_background["killed while saving"]
    assert in_background["last checkpoint"] == "step-0000001" and in_background["resumed by two"] == [0, 0]
    assert in_background["difference of the resumed step"] == 0
    assert in_background["difference from one process"] < 1e-10


@pytest.mark.slow
def test_killed_while_it_writes_it_continues_from_the_last_whole_checkpoint(measured):
    assert -9 in measured["killed while saving"] and 0 not in measured["killed while saving"]
    assert measured["last checkpoint"] == "step-0000001"
    assert measured["resumed by two"] == [0, 0]
    assert measured["difference of the resumed step"] == 0
    assert measured["difference from one process"] < 1e-10


@pytest.mark.slow
def test_the_student_is_that_of_the_checkpoint(measured):
    assert measured["difference of the student"] == 0


RECIPE = """
method: {name: tcd, num_grid_steps: 4}
teacher: TEACHER
student: {weights: full}
data: {size: 16}
training: {steps: 2, batch_size: 2, log_every: 1, learning_rate: 1.0e-3, precision: fp64, fsdp: true, ema_decay: 0.9}
sample: {every: 1000, teacher_steps: 2, num_inference_steps: 1, prompts: [a star]}
"""


def _distil(recipe, folder):
    waited, build = [], setup.build_roles

    def noted(teacher, *arguments):
        waited.append(len(waiting(teacher.network)))
        return build(teacher, *arguments)

    setup.build_roles = noted
    distill(load_recipe(str(recipe)), Path(folder))
    if distributed.count() > 1:
        Path(folder, f"waited-{distributed.rank()}").write_text(str(waited[0]))


@pytest.mark.slow
def test_a_teacher_stays_in_its_files_until_it_is_spread_and_trains_the_same_student(tmp_path):
    with tiny_teacher() as teacher:
        (tmp_path / "my.yaml").write_text(RECIPE.replace("TEACHER", str(teacher)))
        _distil(tmp_path / "my.yaml", tmp_path / "one")
        spawn(_distil, str(tmp_path / "my.yaml"), str(tmp_path / "two"))
    assert min(int((tmp_path / "two" / f"waited-{rank}").read_text()) for rank in range(2)) > 50
    one, two = (load_file(tmp_path / name / "student" / sharded.OWN_FILE) for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one) > 50
    for name, tensor in one.items():
        # float32 weights: where a gradient is next to zero, Adam's first steps magnify its rounding
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-5)


TENSORS = {
    "a/weight": torch.arange(30.0).view(10, 3),
    "a/step": torch.tensor(7.0),
    "b": torch.arange(5, dtype=torch.float64),
    "b/none": torch.zeros(0, 4),
    "half": torch.arange(6).view(2, 3).to(torch.bfloat16),
}


def test_a_file_in_pieces_is_one_that_safetensors_reads(tmp_path):
    path = tmp_path / "file.safetensors"
    about = {name: (t.dtype, t.shape) for name, t in TENSORS.items()}
    write_pieces(
        path, about, lambda name: TENSORS[name].split(4) if TENSORS[name].ndim else [TENSORS[name]], {"é": "x"}
    )
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], t) and found[name].dtype == t.dtype for name, t in TENSORS.items())
    with pytest.raises(OSError, match="bytes and not"):
        write_pieces(path, about, lambda name: [])


def rows_in_files(folder, count=4, lost=None):
    """TENSORS of dimension 0 in as many files as processes, split as torch.chunk does."""
    save_file({"a/step": TENSORS["a/step"]}, folder / "tensors.safetensors")
    for rank in range(count):
        parts, first = {}, {}
        for name, t in TENSORS.items():
            each = -(-len(t) // count) if t.ndim else 0
            first[name] = min(rank * each, len(t)) if t.ndim else 0
            if t.ndim:
                parts[name] = Part(t[first[name] : first[name] + each], t.shape, first[name])
        if rank != lost:
            write_parts(folder / f"rows-{rank}.safetensors", parts)
    return StoredFiles(sorted(folder.glob("*.safetensors")))


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_rows_of_any_number_of_processes_are_read_by_any_other(tmp_path, count):
    stored = rows_in_files(tmp_path, count)
    assert set(stored) == TENSORS.keys() and len(stored) == len(TENSORS)
    for name, tensor in TENSORS.items():
        assert stored.shape(name) == tensor.shape
        assert torch.equal(stored[name], tensor) and stored[name].dtype == tensor.dtype
    weight = TENSORS["a/weight"]
    for first in range(11):
        for last in range(first, 11):
            assert torch.equal(stored.rows("a/weight", first, last), weight[first:last])
    below = stored.under("a")
    assert set(below) == {"weight", "step"} and torch.equal(below.rows("weight", 2, 9), weight[2:9])


def test_a_lost_file_of_rows_is_noticed(tmp_path):
    with pytest.raises(ValueError, match=r"rows of .* are missing"):
        rows_in_files(tmp_path, lost=1)
    with pytest.raises(ValueError, match=r"rows of .* are missing"):
        StoredFiles([tmp_path / "rows-0.safetensors"])


def test_half_a_file_is_none(tmp_path):
    rows_in_files(tmp_path)
    path = tmp_path / "rows-1.safetensors"
    raw = path.read_bytes()
    for end in (0, 5, 60, len(raw) - 1):
        path.write_bytes(raw[:end])
        with pytest.raises(ValueError, match="is no safetensors file, or only a part of one"):
            StoredFiles([path])


def with_header(path, change):
    """Change the text of a file's header, of the same length after it."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    text = change(raw[8 : 8 + size].decode()).encode()
    assert len(text) == size
    path.write_bytes(raw[:8] + text + raw[8 + size :])


@pytest.mark.parametrize("word", ['"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', "F32", "[4,3]", "{"])
def test_a_changed_header_is_refused_in_a_sentence(tmp_path, word):
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(4, 3), "v": torch.ones(2)}, path, metadata={"rows": "{}"})
    changed = {"F32": "F16", "[4,3]": "[4,9]", "{": "["}.get(word, '"' + "x" * (len(word) - 2) + '"')
    with_header(path, lambda text: text.replace(word, changed, 1))
    with pytest.raises(ValueError, match="is no safetensors file, or only a part of one"):
        StoredFiles([path])


def test_numbers_of_other_types_disturb_nothing(tmp_path):
    path = tmp_path / "a.safetensors"
    other = {
        "mask": torch.tensor([True, False]),
        "short": torch.tensor([-3], dtype=torch.int16),
        "fp8": torch.tensor([1.5]).to(torch.float8_e4m3fn),
    }
    save_file({"w": torch.ones(4, 3), "strange": torch.ones(2), **other}, path)
    raw = path.read_bytes()
    at = raw.index(b"F32", raw.index(b'"strange"'))
    path.write_bytes(raw[:at] + b"F33" + raw[at + 3 :])
    stored = StoredFiles([path])
    assert torch.equal(stored["w"], torch.ones(4, 3)) and all(stored.readable(name) for name in ["w", *other])
    for name, tensor in other.items():
        assert stored[name].dtype == tensor.dtype and torch.equal(stored[name].float(), tensor.float())
    assert not stored.readable("strange")
    with pytest.raises(ValueError, match="strange has numbers of type F33"):
        stored["strange"]


def test_no_process_opens_files_in_which_another_one_has_found_damage(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 4, {"w": torch.ones(4, 3)}, {})
    opened = []
    monkeypatch.setattr(checkpoint, "StoredFiles", lambda files: opened.append(files))
    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "everywhere", lambda mine: ["the other one's", mine])
    with pytest.raises(ValueError, match="the other one's"):
        checkpoint.load(tmp_path / "step-0000004")
    assert not opened


def test_a_header_says_which_rows_a_file_has(tmp_path):
    rows_in_files(tmp_path)
    raw = (tmp_path / "rows-1.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert json.loads(header["__metadata__"]["rows"])["a/weight"] == [3, [10, 3]]
