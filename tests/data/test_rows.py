"""Rows that stay on disk: the same rows in the same order as in memory, read ahead, errors as themselves."""

import threading

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fewstep.data.random import Rng, stream_key
from fewstep.data.rows import CUT, LENGTHS, Ahead, Held, Stored, checksum, cut_padding
from fewstep.data.sources import Buckets, CaptionDropout, LatentSource, Order, Prompts, prefetch
from fewstep.models.cond import Cond

SIZES = (5, 1, 4)
COND = {"cond.text": (3, 2), "cond.ids": (), "cond.mask": (3,)}
DTYPES = {"cond.ids": torch.int64, "cond.mask": torch.bool}


def whole(n=sum(SIZES)):
    """Row i of every tensor tells i; "std" too, and the null condition is of one row."""
    tensors = {
        "mean": torch.arange(n * 6.0).reshape(n, 2, 3).half(),
        "std": torch.arange(n * 6.0).reshape(n, 2, 3).half(),
    }
    for name, shape in COND.items():
        rows = torch.arange(float(n)).reshape(n, *[1] * len(shape)).expand(n, *shape)
        tensors[name] = rows.to(DTYPES.get(name, torch.bfloat16)).contiguous()
    return tensors


NULL = {
    "null.text": torch.full((1, 3, 2), -1, dtype=torch.bfloat16),
    "null.ids": torch.tensor([-1]),
    "null.mask": torch.zeros(1, 3, dtype=torch.bool),
}


def stored(folder, sizes=SIZES, prefix=""):
    paths, first, tensors = [], 0, whole(sum(sizes))
    for number, size in enumerate(sizes):
        paths.append(folder / f"{number}.safetensors")
        part = {name: t[first : first + size].contiguous() for name, t in tensors.items()}
        others = {f"other/{name}": t + 1 for name, t in part.items() if t.is_floating_point()}
        save_file({prefix + name: t for name, t in (part | NULL).items()} | (others if prefix else {}), paths[-1])
        first += size
    return Stored(paths, prefix)


@pytest.mark.parametrize("prefix", ["", "8x8/"], ids=["plain", "sizes"])
def test_rows_are_those_of_the_files_in_any_order(tmp_path, prefix):
    rows, tensors = stored(tmp_path, prefix=prefix), whole()
    picked = np.array([9, 0, 5, 5, 4, 6, 0])
    found = rows.take(picked)
    assert len(rows) == 10 and found.keys() == tensors.keys() and rows.shape("mean") == (2, 3)
    for name, t in tensors.items():
        assert torch.equal(found[name], t[picked]) and found[name].dtype == t.dtype
    assert rows.null.keys() == NULL.keys() and all(torch.equal(rows.null[name], t) for name, t in NULL.items())
    held, same = rows.held(), Held(tensors | NULL)
    assert all(torch.equal(held.take(picked)[name], same.take(picked)[name]) for name in tensors)
    assert rows.nbytes == held.nbytes == sum(t.nbytes for t in tensors.values())


def masked(lengths, first=1.0, tokens=5, width=3):
    """Rows with so many tokens each; the padding holds values too."""
    values = torch.arange(first, first + len(lengths) * tokens * width).reshape(len(lengths), tokens, width).half()
    mask = (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()
    return {
        "cond.prompt_embeds": values,
        "cond.prompt_mask": mask,
        "null.prompt_embeds": values[:1].clone(),
        "null.prompt_mask": mask[:1].clone(),
    }


def test_padding_that_is_masked_is_not_stored_and_comes_back_as_zeros(tmp_path):
    """In files of their own each; one whose mask leaves out tokens in the middle is stored whole."""
    pieces = [masked([2, 5, 1]), masked([0, 3], first=100.0), masked([4, 4], first=200.0)]
    pieces[2]["cond.prompt_mask"][0] = torch.tensor([1, 0, 1, 1, 1])
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path, piece in zip(paths, pieces, strict=True):
        kept = cut_padding(piece)
        assert kept.keys() - {"null.prompt_embeds", "null.prompt_mask"} == (
            {"cond.prompt_embeds", "cond.prompt_mask"} if path is paths[2] else {CUT, LENGTHS}
        )
        save_file({name: t.contiguous() for name, t in kept.items()}, path)
    mask = torch.cat([piece["cond.prompt_mask"] for piece in pieces])
    whole = torch.cat([piece["cond.prompt_embeds"] for piece in pieces])
    wanted = torch.where(mask[..., None].bool(), whole, torch.zeros((), dtype=torch.half))
    wanted[5:] = whole[5:]
    for order in (range(7), (6, 1, 3, 0, 4, 1)):
        picked = np.array(order)
        for rows in (Stored(paths), Stored(paths).held()):
            found = rows.take(picked)
            assert torch.equal(found["cond.prompt_mask"], mask[picked]) and torch.equal(
                found["cond.prompt_embeds"], wanted[picked]
            )
            assert (
                found.keys() == {"cond.prompt_embeds", "cond.prompt_mask"}
                and found["cond.prompt_mask"].dtype == torch.int64
            )
    source = Prompts(Stored(paths[:2]), (1,))
    assert torch.equal(source.cond.null()["prompt_embeds"][0], whole[0])  # the null stays whole
    assert Stored(paths).nbytes == 7 * (5 * 3 * 2 + 5 * 8)
    same = masked([1, 2])
    del same["cond.prompt_mask"]
    assert cut_padding(same).keys() == same.keys()  # no mask: the network sees the padding


def expected(seed, step, size, batch_size, name="order"):
    """Shuffled epochs by the rule: permutation e is keyed by (seed, name, e), batches run across their ends."""
    places = range(step * batch_size, (step + 1) * batch_size)
    shuffled = {
        e: np.random.Generator(np.random.Philox(stream_key(seed, name, e))).permutation(size)
        for e in {place // size for place in places}
    }
    return [int(shuffled[place // size][place % size]) for place in places]


def test_the_order_is_that_of_former_versions():
    """Literals of version 0.1, and the rule written apart."""
    assert Order(20).rows(Rng(0, 0, 8)).tolist() == [18, 10, 7, 17, 1, 8, 16, 3] == expected(0, 0, 20, 8)
    assert Order(20).rows(Rng(0, 7, 8)).tolist() == [19, 11, 9, 0, 17, 2, 0, 16] == expected(0, 7, 20, 8)
    assert Order(20, "pairs").rows(Rng(3, 2, 8, slice(4, 8))).tolist() == [5, 18, 10, 13]
    few = Buckets([LatentSource(torch.zeros(n, 1), torch.zeros(n, 1), None) for n in (5, 9)])
    visited = [
        (b, few.sources[b].order.rows(Rng(0, 0, 4), n).tolist()) for b, n in (few.pick(Rng(0, s, 4)) for s in range(4))
    ]
    assert visited == [(0, [2, 0, 1, 3]), (1, [7, 1, 0, 6]), (1, [8, 4, 2, 5]), (1, [3, 0, 4, 8])]


@pytest.mark.parametrize("first", [0, 3])
def test_batches_from_disk_are_those_from_memory(tmp_path, first):
    """Read ahead or not, of any step and part, with conditions and their nulls; the posterior's noise is the step's."""
    source, tensors = LatentSource.of(stored(tmp_path)), whole()
    rng = Rng(1, first, 4)
    for step in range(first, first + 6):
        parts = [Rng(1, step, 4, slice(0, 2)), Rng(1, step, 4, slice(2, 4))]
        wanted = expected(1, step, 10, 4)
        noise = torch.cat([part.sample.normal("posterior", (2, 3)) for part in parts])
        for number, rng in enumerate(parts):
            batch, rows = source.batch(rng), wanted[2 * number : 2 * number + 2]
            mean, spread = (tensors[name][rows].double() for name in ("mean", "std"))
            spread = spread * noise[2 * number : 2 * number + 2]
            limit = 2.0**-23 * (mean.abs() + spread.abs())  # two roundings, where the terms may cancel
            assert ((batch.x0 - (mean + spread)).abs() <= limit).all()
            assert batch.cond["ids"].tolist() == rows and torch.equal(batch.cond["text"], tensors["cond.text"][rows])
            assert batch.cond.null()["ids"].tolist() == [-1, -1]
            prefetch(source, parts[1] if number == 0 else Rng(1, step + 1, 4, slice(0, 2)))
    assert source.batch(Rng(5, 0, 4)).cond["ids"].tolist() == expected(5, 0, 10, 4)  # whatever was read ahead


def test_the_null_condition_is_copied_to_a_device_once(tmp_path):
    source = LatentSource.of(stored(tmp_path))
    first, second = (source.batch(Rng(0, step, 4, device="meta")).cond.given() for step in range(2))
    assert first["null.text"] is second["null.text"] and first["cond.text"] is not second["cond.text"]
    assert source.batch(Rng(0, 0, 4)).cond.null()["ids"].tolist() == [-1] * 4  # each device has its own


def test_data_on_the_host_reach_whatever_device_the_step_is_on(tmp_path):
    for source in (LatentSource.of(stored(tmp_path)), Prompts(stored(tmp_path), (2, 3))):
        batch = source.batch(Rng(0, 0, 4, device="meta"))
        assert batch.x0.is_meta and batch.cond["text"].is_meta and batch.cond.null()["text"].is_meta


def test_reading_ahead_is_done_by_a_thread_that_ends():
    asked = []

    def read(picked, pin):
        asked.append((picked.tolist(), threading.current_thread() is threading.main_thread()))
        return {"row": torch.from_numpy(picked)}

    ahead = Ahead(read)
    for rows in ([0, 1], [2, 3]):
        ahead.prefetch(np.array(rows), pin=False)
        assert ahead.fetch(np.array(rows), pin=False)["row"].tolist() == rows
    assert ahead.fetch(np.array([7]), pin=False)["row"].tolist() == [7]  # not forecast: read now
    assert asked == [([0, 1], False), ([2, 3], False), ([7], True)]
    for thread in [t for t in threading.enumerate() if t.name == "fewstep-rows"]:
        thread.join(5)
        assert not thread.is_alive()


@pytest.mark.parametrize("ahead", [False, True])
def test_errors_of_reading_are_raised_where_the_batch_is_asked_for(tmp_path, ahead):
    source = LatentSource.of(stored(tmp_path))
    last = tmp_path / "2.safetensors"
    last.write_bytes(last.read_bytes()[:-100])  # within the last tensor
    rng = Rng(0, 0, 10)
    if ahead:
        prefetch(source, rng)
    with pytest.raises(OSError, match=r"2\.safetensors was cut short"):
        source.batch(rng)
    last.unlink()
    if ahead:
        prefetch(CaptionDropout(source, 0.5), rng)
    with pytest.raises(FileNotFoundError) as caught:
        source.batch(rng)
    assert caught.value.filename == str(last)


def test_a_checksum_knows_names_types_shapes_and_values():
    tensors = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    b = {"b": tensors["b"]}
    others = [
        {"a": torch.zeros(2, 3)},
        b | {"a": torch.zeros(3, 2)},
        b | {"aa": torch.zeros(2, 3)},
        b | {"a": torch.zeros(2, 3, dtype=torch.int32)},
        tensors | {"b": torch.full((1,), 2.0)},
    ]
    found = {checksum(t) for t in (tensors, *others)}
    assert len(found) == 6 and checksum(dict(reversed(tensors.items()))) == checksum(tensors)
    assert Held(tensors | {"a": torch.zeros(1, 3)}).checksum == checksum({"a": torch.zeros(1, 3), "b": torch.ones(1)})
    given = Cond({"x": torch.ones(2)}, {"x": torch.ones(1)}).given()
    assert given.keys() == {"cond.x", "null.x"}
