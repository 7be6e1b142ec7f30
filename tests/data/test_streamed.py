"""Streams: which rows a step trains on, written apart; the same for any processes and after any resume; bounded."""

import io
import itertools
import threading
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.data import streamed
from fewstep.data.captions import as_text
from fewstep.data.entries import Skipped, Unusable
from fewstep.data.images import CaptionedImage
from fewstep.data.random import Rng, stream_key
from fewstep.data.rows import CAPTION
from fewstep.data.streamed import PIXELS, Counts, Stream, StreamSource
from fewstep.models.families import as_teacher
from tests.models.pipelines import SIZE, build

SIZES = (3, 7, 1, 5, 4, 6, 2)
SEED, BATCH, BUFFER = 3, 4, 12


class Shards:
    """Shard s holds entries s.0, s.1, ..., whose captions are their names; some of them are damaged."""

    def __init__(self, sizes=SIZES, bad=(), fails=()):
        self.sizes, self.bad, self.fails = sizes, set(bad), Counter(fails)
        self.names = [f"{number}.tar" for number in range(len(sizes))]
        self.opened, self.made = [], weakref.WeakSet()

    def read(self, number):
        self.opened.append(number)
        for i in range(self.sizes[number]):
            name = f"{number}.{i}"
            if self.fails[name]:
                self.fails[name] -= 1
                raise ConnectionError("the line is dead")
            if name in self.bad and i % 2:
                yield Skipped(name, "it has no caption")
                continue
            entry = CaptionedImage(name, name, "", name.encode)
            self.made.add(entry)
            yield entry


def stream(shards, folder, batch_size=BATCH, buffer=BUFFER, skipped=lambda entry: None, rank=0, threads=1):
    def decoded(entry):
        if entry.name in shards.bad:
            raise Unusable("it is damaged, or no image")
        return torch.full((3, 2, 2), int(entry.name.split(".")[0]), dtype=torch.uint8)

    return Stream(shards, Counts(folder, shards.names, rank), SEED, batch_size, buffer, decoded, skipped, threads)


def rows(source, first, end=None, batch_size=BATCH):
    """The captions of these rows."""
    return as_text(source.take(np.arange(first, first + batch_size if end is None else end))[CAPTION])


def shuffled(key, items):
    items = list(items)
    return [items[i] for i in np.random.Generator(np.random.Philox(stream_key(SEED, *key))).permutation(len(items))]


def expected(steps, sizes=SIZES, batch_size=BATCH, buffer=BUFFER, lanes=4):
    """The rule: rows are dealt to lanes; epochs of shards, and blocks of entries, are shuffled by the seed."""
    found = {}
    for lane in range(lanes):
        entries, size = [], buffer // lanes
        for epoch in itertools.count():
            for shard in shuffled(("shards", epoch), range(len(sizes)))[lane::lanes]:
                entries += [f"{shard}.{i}" for i in range(sizes[shard])]
            if len(entries) >= steps * batch_size + size:
                break
        blocks = [entries[i : i + size] for i in range(0, len(entries), size)][: len(entries) // size]
        order = [entry for number, block in enumerate(blocks) for entry in shuffled(("block", lane, number), block)]
        each = batch_size // lanes
        found |= {(step, lane * each + i): order[step * each + i] for step in range(steps) for i in range(each)}
    return [[found[step, row] for row in range(batch_size)] for step in range(steps)]


@pytest.mark.parametrize(("sizes", "batch_size", "buffer", "lanes"), [
    (SIZES, 4, 12, 4), (SIZES, 8, 7, 4), ((9,), 4, 5, 1), ((2, 3), 6, 100, 2), (SIZES, 6, 1, 6),
])  # fmt: skip
def test_the_rows_of_a_step_follow_from_seed_step_and_shards(tmp_path, sizes, batch_size, buffer, lanes):
    source = stream(Shards(sizes), tmp_path, batch_size, buffer)
    wanted = expected(20, sizes, batch_size, max(buffer, lanes), lanes)
    assert [rows(source, step * batch_size, None, batch_size) for step in range(20)] == wanted


def test_every_image_is_seen_once_an_epoch(tmp_path):
    source = stream(Shards((6, 6, 6, 6)), tmp_path)
    seen = Counter(caption for step in range(18) for caption in rows(source, step * BATCH))
    assert set(seen.values()) == {3} and len(seen) == 24
    assert rows(stream(Shards((6, 6, 6, 6)), tmp_path), 0) != rows(stream(Shards((6, 6, 6, 6)), tmp_path), 24)


def test_processes_share_the_shards_and_train_on_the_rows_of_one(tmp_path):
    """Each reads the lanes of its own rows alone, whose shards are its own; micro-batches change nothing."""
    sizes = (8,) * 8
    whole = [rows(stream(Shards(sizes), tmp_path / "one"), step * BATCH) for step in range(4)]
    for count in (2, 4):
        each, opened = BATCH // count, []
        for rank in range(count):
            shards = Shards(sizes)
            source = stream(shards, tmp_path / str(count), rank=rank)
            for step in range(4):
                first = step * BATCH + rank * each
                assert rows(source, first, first + each) == whole[step][rank * each : (rank + 1) * each]
            opened.append(set(shards.opened))
        assert not set.intersection(*opened) and max(map(len, opened)) <= 8 // count


@pytest.mark.parametrize("counted", [True, False])
def test_it_goes_on_at_any_step(tmp_path, counted):
    """With the entries of shards counted before nothing but the beginning of one is read again; else all are."""
    wanted = expected(30)
    stream_ = stream(Shards(), tmp_path)
    for step in range(30):
        assert rows(stream_, step * BATCH) == wanted[step]
    for thread in [t for t in threading.enumerate() if t.name == "fewstep-shards"]:
        thread.join(5)
    for first in (0, 1, 2, 3, 7, 20, 29):
        shards = Shards()
        source = stream(shards, tmp_path if counted else tmp_path / str(first), rank=1)
        assert [rows(source, step * BATCH) for step in range(first, 30)] == wanted[first:]
        if counted and first == 29:
            assert len(shards.opened) <= 4 * 4  # of each lane the blocks of this step and of the next
    (tmp_path / "shards-0.json").write_text("damaged")
    assert rows(stream(Shards(), tmp_path), 20 * BATCH) == wanted[20]


def test_counts_of_other_shards_are_no_counts(tmp_path):
    counts = Counts(tmp_path, ["a", "b"])
    counts.note(1, 7)
    assert Counts(tmp_path, ["a", "b"], 3)[1] == 7 and Counts(tmp_path, ["a", "b"])[0] is None
    assert Counts(tmp_path, ["b", "a"])[1] is None


def test_what_cannot_be_used_leaves_its_place_to_the_next_of_its_block(tmp_path):
    bad, told = {"1.1", "1.2", "5.3"}, []
    source = stream(Shards(bad=bad), tmp_path, skipped=lambda entry: told.append(str(entry)))
    good = expected(12)
    found = [rows(source, step * BATCH) for step in range(12)]
    for mine, theirs in zip(itertools.chain(*found), itertools.chain(*good), strict=True):
        assert (mine == theirs) != (theirs in bad) and mine not in bad
    assert set(told) == {"1.1: it has no caption", "1.2: it is damaged, or no image", "5.3: it has no caption"}
    again = stream(Shards(bad=bad), tmp_path)
    assert rows(again, 5 * BATCH) == found[5]
    with pytest.raises(
        ValueError, match=r"^data\.path: none of 1024 images in a row could be used, the first: \d\.\d: it"
    ):
        rows(stream(Shards((3,) * 4, bad=[f"{s}.{i}" for s in range(4) for i in range(3)]), tmp_path / "bad"), 0)
    with pytest.raises(ValueError, match=r"^data\.path: the shards hold no images, such as 0\.tar\.$"):
        rows(stream(Shards((0, 0)), tmp_path / "empty"), 0)


def test_of_a_block_that_cannot_be_used_the_next_ones_are_taken(tmp_path):
    """At the same place of each; three blocks of a lane here, and all blocks where each has one entry."""
    lane = [row for step in expected(12, (6, 5), 1, 2, 1) for row in step]
    bad = set(lane[:6])
    found = [rows(stream(Shards((6, 5), bad=bad), tmp_path / "a", 1, 2), step, step + 1)[0] for step in range(6)]
    assert found == [lane[6], lane[7]] * 3
    one = [row for step in expected(12, (6, 5), 1, 1, 1) for row in step]
    source = stream(Shards((6, 5), bad={one[3], one[4]}), tmp_path / "b", 1, 1)
    wanted = [one[5] if row in (3, 4) else one[row] for row in range(11)]
    assert [rows(source, row, row + 1)[0] for row in range(11)] == wanted
    again = stream(Shards((6, 5), bad={one[3], one[4]}), tmp_path / "b", 1, 1)
    assert [rows(again, row, row + 1)[0] for row in range(4, 11)] == wanted[4:]


def test_empty_shards_among_others_are_passed_over(tmp_path):
    """Also where they are all that a lane has in an epoch."""
    sizes = (0, 3, 0, 5)
    source = stream(Shards(sizes), tmp_path)
    wanted = expected(8, sizes)
    assert [rows(source, step * BATCH) for step in range(8)] == wanted
    assert rows(stream(Shards(sizes), tmp_path), 5 * BATCH) == wanted[5]


def test_a_shard_that_the_network_fails_to_give_is_opened_again(tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(streamed.time, "sleep", pauses.append)
    source = stream(Shards(fails={"1.4": 2, "3.0": 1}), tmp_path)
    assert [rows(source, step * BATCH) for step in range(15)] == expected(15)
    assert sorted(pauses) == [2.0, 2.0, 4.0]
    source = stream(Shards((5,), fails={"0.2": 9}), tmp_path / "dead")
    with pytest.raises(
        ValueError, match=r"the shard 0\.tar cannot be read any further \(the line is dead\): go on with"
    ):
        rows(source, 0)

    class Gone(Shards):
        def read(self, number):
            raise FileNotFoundError(self.names[number])

    with pytest.raises(ValueError, match=r"^data\.path: there is no shard '0\.tar'\.$"):
        rows(stream(Gone((5,)), tmp_path / "gone"), 0)


def test_two_blocks_are_held_at_most(tmp_path):
    shards = Shards((50,) * 8)
    source = stream(shards, tmp_path, buffer=16)
    most = 0
    for step in range(60):
        rows(source, step * BATCH)
        most = max(most, len(shards.made))
    assert most <= 2 * 16 + 4  # and the one that each reader has just made


def test_the_next_block_is_read_before_it_is_asked_for(tmp_path):
    shards, main = Shards((40,) * 4), threading.current_thread()
    read, readers, done = shards.read, set(), threading.Semaphore(0)

    def noted(number):
        for count, entry in enumerate(read(number), start=1):
            readers.add(threading.current_thread())
            yield entry
            if count in (3, 6):
                done.release()

    shards.read = noted
    source = stream(shards, tmp_path)
    rows(source, 0)
    for _ in range(4):  # every lane is within its second block, which nobody has asked for
        assert done.acquire(timeout=5)
    assert main not in readers


def jpeg(number):
    data = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, "JPEG")
    return data.getvalue()


class Pictures(Shards):
    def read(self, number):
        for i in range(self.sizes[number]):
            name = f"{number}.{i}"
            data = jpeg(10 * number + i) if name not in self.bad else b"no image"
            yield CaptionedImage(name, f"a red circle {name}", "", lambda data=data: data)


@pytest.mark.parametrize("family", ["sdxl", pytest.param("flux", marks=pytest.mark.slow)])
def test_batches_are_what_the_encoders_make_of_images_and_captions(family, tmp_path):
    """By the teacher's own calls, rounded to float16; read ahead or not; captions come as text too."""
    teacher, shards = as_teacher(build(family), size=SIZE), Pictures((3, 4), bad={"0.1"})
    source = StreamSource(shards, teacher, Counts(tmp_path, shards.names), 4, tmp_path / "skipped.txt")
    for step in range(6):
        for part in (slice(0, 2), slice(2, 4)):
            rng = Rng(SEED, step, 4, part)
            batch = source.batch(rng)
            assert len(batch.prompts) == len(batch.x0) == 2 and batch.has_data
            names = [prompt.split()[-1] for prompt in batch.prompts]
            entries = [next(e for e in shards.read(int(n[0])) if e.name == n) for n in names]
            pixels = [streamed.decode(entry, lambda height, width: (SIZE, SIZE)) for entry in entries]
            mean, std = teacher.encode_images(torch.stack(pixels).float() / 127.5 - 1)
            noise = rng.sample.normal("posterior", teacher.latent_shape)
            assert torch.equal(batch.x0, torch.addcmul(mean.half().float(), std.half().float(), noise))
            cond = teacher.encode_prompts(batch.prompts).to(torch.float16)
            assert all(torch.equal(batch.cond[name], cond[name]) for name in cond) and set(batch.cond) == set(cond)
            assert all(torch.equal(batch.cond.null()[name], cond.null()[name]) for name in cond)
            source.prefetch(Rng(SEED, step + (part.stop == 4), 4, slice(0, 2) if part.stop == 4 else slice(2, 4)))
    assert (tmp_path / "skipped.txt").read_text() == "0.1: it is damaged, or no image\n"
    assert source._ahead(Rng(SEED, 0, 4)).fetch(np.arange(2), False)[PIXELS].shape == (2, 3, SIZE, SIZE)
