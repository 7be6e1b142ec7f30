"""Several processes encode one data set: evenly, each file once, and on from where they were killed."""

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from io import BytesIO
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from several import spawn

from fewstep.data import cache
from fewstep.data.cache import Share, image_latents
from fewstep.data.images import CaptionedImage, Collection
from fewstep.data.random import Rng
from fewstep.models.cond import Cond
from fewstep.training import distributed

SIDE, SIZE = 8, 22


class Teacher:
    """Encodes an image as its middle pixel and a caption as its number."""

    image_size, multiple, latent_shape, origin = SIDE, 1, (1, 2, 2), "tiny"
    family = SimpleNamespace(shapes=lambda tokens: {"prompt_embeds": (3, 2)}, text_dtype=torch.float16)

    def encode_images(self, images):
        mean = images[:, :1, 3:5, 3:5]
        return mean, torch.zeros_like(mean)

    def encode_prompts(self, prompts, size=None):
        rows = torch.tensor([float(text.split()[-1]) for text in prompts])
        return Cond(
            {"prompt_embeds": rows[:, None, None].expand(-1, 3, 2)}, {"prompt_embeds": torch.full((1, 3, 2), -1.0)}
        )


def png(number):
    data = BytesIO()
    Image.new("RGB", (SIDE, SIDE), (10 * number,) * 3).save(data, "PNG")
    return data.getvalue()


def pictures(note=lambda number: None, size=SIZE):
    def image(number):
        def read():
            note(number)
            return png(number) if number != 5 else b"no image"

        return CaptionedImage(f"{number}.png", f"image {number}", "0", read)

    return Collection(tuple(image(number) for number in range(size)))


def check(source, folder):
    """Row i of the latents and captions is image i, without the damaged one."""
    rows = [number for number in range(SIZE) if number != 5]
    assert source.cond["prompt_embeds"][:, 0, 0].tolist() == rows
    torch.testing.assert_close(
        source.mean[:, 0, 0, 0].float(), torch.tensor([10 * row / 127.5 - 1 for row in rows]), rtol=1e-3, atol=1e-3
    )
    assert (folder / "skipped.txt").read_text() == "5.png: it is damaged, or no image\n"


def encode(folder, share, note, **changes):
    return image_latents(folder / "latents", Teacher(), pictures(note), share=share, **changes)


def shares(count):
    """The shares of ``count`` threads that stand in for processes."""
    barrier = threading.Barrier(count)
    return [Share(rank, count, lambda: barrier.wait(20) and None) for rank in range(count)]


def together(folder, count, note=lambda rank, number: None):
    """The sources that so many encoders get, which work at once, and what each of them read."""
    read, found = [[] for _ in range(count)], [None] * count

    def work(share):
        def noted(number):
            note(share.rank, number)
            read[share.rank].append(number)

        found[share.rank] = encode(folder, share, noted)

    threads = [threading.Thread(target=work, args=(share,)) for share in shares(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found, read


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_work_is_shared_evenly_and_nothing_is_encoded_twice(tmp_path, count, monkeypatch):
    monkeypatch.setattr(cache, "_PER_FILE", 3)
    found, read = together(tmp_path, count)
    assert Counter(chain(*read)) == dict.fromkeys(range(SIZE), 1)
    assert max(map(len, read)) - min(map(len, read)) <= 3  # a file
    for source in found:
        check(source, tmp_path)
        assert source.checksum() == found[0].checksum()
    again, read = together(tmp_path, 3)  # whatever the number of those who find it
    assert read == [[], [], []] and again[2].checksum() == found[0].checksum()


def test_few_images_are_shared_too(tmp_path):
    """Fewer than fill one file of the usual size."""
    _, read = together(tmp_path, 4)
    assert [len(its) for its in read] == [6, 6, 6, 4] and len(list(tmp_path.glob("*.safetensors"))) == 4


def test_files_of_large_rows_have_fewer_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_FILE", 7 * (4 * 4 + 2 * 6))  # seven rows: two latents and a prompt in float16
    check(encode(tmp_path, Share(), lambda number: None), tmp_path)
    with safe_open(tmp_path / "latents-00001.safetensors", framework="pt") as file:
        assert file.metadata()["rows"] == "7 to 14 of 22"
    monkeypatch.setattr(cache, "_FILE", 10**9)  # what is there is read as it is
    read = []
    (tmp_path / "latents-00002.safetensors").unlink()
    check(encode(tmp_path, Share(), read.append), tmp_path)
    assert sorted(read) == list(range(14, 21))


def test_files_of_former_versions_are_read(tmp_path, monkeypatch):
    """They have 512 rows each, and no checksum."""
    monkeypatch.setattr(cache, "_PER_FILE", 16)
    new = encode(tmp_path, Share(), lambda number: None)
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors, about = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
        assert about.pop("checksum")
        cache.replace_tensors(path, tensors, about)
    monkeypatch.setattr(cache, "_PER_FILE", 512)
    read = []
    old = encode(tmp_path, Share(), read.append)
    check(old, tmp_path)
    assert read == [] and old.checksum() == new.checksum()


def test_rows_on_disk_and_in_memory_are_the_same_data(tmp_path, monkeypatch):
    held = encode(tmp_path, Share(), lambda number: None)
    monkeypatch.setattr(cache, "HELD", 0)
    stored = encode(tmp_path, Share(), lambda number: None)
    check(stored, tmp_path)
    assert (type(held.rows).__name__, type(stored.rows).__name__) == ("Held", "Stored")
    assert held.checksum() == stored.checksum()
    for step in range(4):
        one, other = (source.batch(Rng(0, step, 8)) for source in (held, stored))
        assert torch.equal(one.x0, other.x0) and torch.equal(one.cond["prompt_embeds"], other.cond["prompt_embeds"])


# ---------------------------------------------------------------- processes


def _encode(folder, until=None):
    """Encode in this process; with ``until``, be killed when that image is read."""
    cache._PER_FILE = 3
    rank = distributed.rank()

    def note(number):
        if number == until:
            os.kill(os.getpid(), signal.SIGKILL)
        with open(Path(folder) / f"read-{rank}", "a") as file:
            file.write(f"{number}\n")

    share = Share(rank, distributed.count(), distributed.wait)
    source = encode(Path(folder), share, note)
    distributed.wait()  # until the first has listed what was skipped
    check(source, Path(folder))


def numbers(path):
    return [int(line) for line in path.read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_work(tmp_path, count):
    spawn(_encode, str(tmp_path), count=count)
    read = [numbers(tmp_path / f"read-{rank}") for rank in range(count)]
    assert Counter(chain(*read)) == dict.fromkeys(range(SIZE), 1)
    assert max(map(len, read)) - min(map(len, read)) <= 3


@pytest.mark.slow
def test_killed_while_encoding_the_others_go_on_with_it(tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_encoding_shared as t; t._encode(sys.argv[2], 13)"
    words = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)]
    assert subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode == -signal.SIGKILL
    whole = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("latents-*.safetensors")}
    assert len(whole) == 4  # rows 0 to 11
    (tmp_path / "read-0").unlink()
    spawn(_encode, str(tmp_path), count=2)
    read = [numbers(tmp_path / f"read-{rank}") for rank in range(2)]
    assert sorted(chain(*read)) == list(range(12, SIZE))
    assert whole.items() <= {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("latents-*")}.items()
