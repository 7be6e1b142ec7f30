"""The teacher's samples on disk and in batches: rows stay together, files are whole, others' are refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fewstep.data.pairs import ABOUT, PairFiles, PairSource, WithPairs, noise_of
from fewstep.data.random import Rng, stream_key
from fewstep.data.sources import LatentSource
from fewstep.models.cond import Cond

ABOUT_THEM = {
    "size": 10, "batch_size": 4, "seed": 3, "solver": "ddim", "guidance_scale": 2.0, "teacher": "a", "prompts": "b",
}  # fmt: skip


def made(rows):
    """Row i is all i, its condition too."""
    x0 = torch.tensor(rows, dtype=torch.float32)[:, None].expand(-1, 3)
    return x0, Cond({"row": x0[:, :2], "label": torch.tensor(rows)}, {"row": torch.full((1, 2), -1.0), "label": LABEL})


LABEL = torch.tensor([-1])


def files(place, **changes):
    return PairFiles(place, ABOUT_THEM | changes)


def fill(found, numbers=None):
    found.check()
    found.claim()
    for number in found.missing() if numbers is None else numbers:
        found.write(number, *made(list(found.rows(number))), cost=7.0)


def step(step=0, size=4, rows=None, dtype=torch.float64):
    return Rng(11, step, size, rows, dtype=dtype)


def test_what_is_written_is_read_with_its_conditions_its_nulls_and_its_cost(tmp_path):
    there = files(tmp_path / "pairs")
    assert len(there) == 3 and [list(there.rows(n)) for n in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    fill(there)
    source = files(tmp_path / "pairs").load()
    assert source.mean[:, 0].tolist() == list(range(10)) and source.cond["row"][:, 1].tolist() == list(range(10))
    assert source.mean.dtype == source.cond["row"].dtype == torch.float16 and source.cond["label"].dtype == torch.int64
    assert source.cond.null()["row"].tolist() == [[-1.0, -1.0]] * 10 and source.cost == 21.0


def test_noise_is_each_rows_own_and_the_same_for_ever():
    """By the rule, not by the function: unit normals of torch's generator, keyed by (seed, "pair", row)."""
    wanted = torch.randn(3, 2, generator=torch.Generator().manual_seed(stream_key(3, "pair", 5)))
    assert torch.equal(noise_of(3, 5, (3, 2)), wanted)
    assert torch.equal(noise_of(3, 5, (3, 2)), noise_of(3, 5, torch.Size([3, 2])))
    assert not torch.equal(noise_of(3, 6, (3, 2)), wanted) and not torch.equal(noise_of(4, 5, (3, 2)), wanted)
    many = torch.stack([noise_of(0, i, (50,)) for i in range(400)])
    assert abs(float(many.mean())) < 0.03 and abs(float(many.std()) - 1) < 0.03


def test_rows_of_a_batch_belong_together(tmp_path):
    fill(files(tmp_path))
    source = files(tmp_path).load()
    for number in range(5):
        pairs = source.pairs(step(number))
        assert pairs.x0.dtype == pairs.noise.dtype == torch.float64
        rows = pairs.x0[:, 0].long().tolist()
        assert pairs.cond["row"][:, 0].tolist() == rows and pairs.cond["label"].tolist() == rows
        for noise, row in zip(pairs.noise, rows, strict=True):
            assert torch.equal(noise.float(), noise_of(3, row, (3,)))
        data = source.batch(step(number))  # as data: latents without any noise, conditions with them
        assert data.x0[:, 2].tolist() == data.cond["label"].tolist() and data.pairs is None


def test_pairs_go_round_in_an_order_of_their_own_that_depends_on_the_step_alone():
    source = PairSource(torch.arange(20.0)[:, None], None, seed=0)
    rows = [source.pairs(step(n, 8)).x0[:, 0].tolist() for n in range(10)]
    epochs = torch.tensor(rows).reshape(4, 20)
    assert all(sorted(epoch.tolist()) == list(range(20)) for epoch in epochs) and len({*map(tuple, epochs)}) == 4
    as_data = [source.batch(step(n, 8)).x0[:, 0].tolist() for n in range(10)]
    assert as_data != rows and sorted(as_data[0] + as_data[1] + as_data[2][:4]) == list(range(20))
    again = PairSource(torch.arange(20.0)[:, None], None, seed=0)  # nothing is carried: any first step, any split
    parts = [again.pairs(step(7, 8, part)) for part in (slice(0, 2), slice(2, 8))]
    assert torch.cat([part.x0 for part in parts])[:, 0].tolist() == rows[7]
    assert torch.equal(torch.cat([part.noise for part in parts]), source.pairs(step(7, 8)).noise)
    assert source.pairs(Rng(12, 0, 8)).x0[:, 0].tolist() != rows[0]


def test_data_beside_pairs_is_the_data_it_would_be_without():
    generator = torch.Generator().manual_seed(0)
    data = LatentSource(torch.randn(7, 2, generator=generator), torch.rand(7, 2, generator=generator), None)
    source = PairSource(torch.arange(7.0)[:, None].expand(-1, 2), None, seed=0)
    for number in range(3):
        batch = WithPairs(data, source).batch(step(number))
        assert torch.equal(batch.x0, data.batch(step(number)).x0) and data.batch(step(number)).pairs is None
        assert torch.equal(batch.pairs.x0, source.pairs(step(number)).x0)


def test_files_that_are_there_are_kept_and_damaged_ones_made_again(tmp_path):
    there = files(tmp_path)
    fill(there, [0, 2])
    assert there.missing() == [1]
    with pytest.raises(ValueError, match="lacks 1 of its 3 files"):
        there.load()
    fill(there)
    assert there.missing() == []
    whole = (tmp_path / "pairs-00002.safetensors").read_bytes()
    (tmp_path / "pairs-00002.safetensors").write_bytes(whole[:-3])
    (tmp_path / "pairs-00000.safetensors").write_bytes(b"")
    (tmp_path / ".pairs-00001.safetensors.part").write_bytes(whole[:50])  # somebody died while writing
    assert there.missing() == [0, 2]
    fill(there)
    assert there.load().mean[:, 0].tolist() == list(range(10))


def test_killed_while_it_writes_it_leaves_whole_files_only(tmp_path):
    """kill -9 of a process that writes one file after the other, over and over."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_pairs import *\n"
        "there = files(Path(sys.argv[2])); fill(there); print('there', flush=True)\n"
        "while True: fill(there, range(3))"
    )
    words = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stdout.readline() == b"there\n"
    for number in range(3):
        (tmp_path / f"pairs-{number:05d}.safetensors").unlink(missing_ok=True)  # whatever is there is new
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = files(tmp_path)
    there.check()
    for path in tmp_path.glob("pairs-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.get_tensor("x0").shape[1] == 3
    fill(there)
    assert there.load().mean[:, 0].tolist() == list(range(10))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"guidance_scale": 3.0}, r"samples of pairs.guidance_scale = 2.0, not 3.0: delete the folder .* pairs.path"),
        ({"size": 11}, r"samples of pairs.size = 10, not 11"),
        ({"seed": 4}, r"samples of pairs.seed = 3, not 4"),
        ({"teacher": "c"}, "samples of another teacher: delete"),
        ({"prompts": "c"}, "samples of other prompts: delete"),
    ],
)
def test_samples_of_anything_else_are_refused(tmp_path, changes, sentence):
    fill(files(tmp_path), [0])
    with pytest.raises(ValueError, match=sentence):
        files(tmp_path, **changes).check()
    assert files(tmp_path, **changes).missing() == [0, 1, 2]  # a file alone knows it too
    files(tmp_path).check()


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file, no folder"):
        files(tmp_path / "file").check()
    fill(files(tmp_path / "pairs"))
    for text in ("", "[1]", None):
        about = tmp_path / "pairs" / ABOUT
        about.unlink() if text is None else about.write_text(text)
        with pytest.raises(ValueError, match="samples of unknown origin"):
            files(tmp_path / "pairs").check()


def test_what_decides_the_values_stands_there_in_plain_words(tmp_path):
    fill(files(tmp_path), [])
    assert json.loads((tmp_path / ABOUT).read_text()) == ABOUT_THEM
