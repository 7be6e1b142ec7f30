"""Conditions: batches, nulls, dropout."""

import pytest
import torch

from fewstep.models.cond import Cond


def example(n=4, null_rows=1):
    text = torch.arange(n * 3.0).reshape(n, 3)
    return Cond(
        {"text": text, "label": torch.arange(n)},
        null={"text": torch.zeros(null_rows, 3), "label": torch.full((null_rows,), -1)},
    )


def test_names_and_size():
    cond = example()
    assert len(cond) == 4 and list(cond) == ["text", "label"] and "text" in cond and "image" not in cond
    assert len(Cond({})) == 0
    with pytest.raises(ValueError, match=r"share one batch size, not \[2, 3\]"):
        Cond({"a": torch.zeros(2), "b": torch.zeros(3)})


@pytest.mark.parametrize("key", [slice(1, 3), torch.tensor([1, 2]), torch.tensor([False, True, True, False]), [1, 2]])
@pytest.mark.parametrize("null_rows", [1, 4])
def test_parts_of_a_batch(key, null_rows):
    part = example(null_rows=null_rows)[key]
    assert part["label"].tolist() == [1, 2] and torch.equal(part["text"], example()["text"][1:3])
    assert part.null()["label"].tolist() == [-1, -1] and part.null()["text"].shape == (2, 3)


def test_null():
    null = example().null()
    assert null["label"].tolist() == [-1] * 4 and not null["text"].any()
    assert torch.equal(null.null()["text"], null["text"])
    with pytest.raises(ValueError, match="no null counterpart"):
        Cond({"label": torch.zeros(2)}).null()


def test_drop_replaces_rows():
    dropped = example().drop(torch.tensor([True, False, False, True]))
    assert dropped["label"].tolist() == [-1, 1, 2, -1]
    assert torch.equal(dropped["text"][1:3], example()["text"][1:3]) and not dropped["text"][[0, 3]].any()


@pytest.mark.parametrize("null_rows", [1, 4])
def test_cat(null_rows):
    joined = Cond.cat([example(null_rows=null_rows), example(null_rows=null_rows)])
    assert len(joined) == 8 and joined["label"].tolist() == [0, 1, 2, 3] * 2
    assert joined.null()["label"].tolist() == [-1] * 8
    assert joined[2:6]["label"].tolist() == [2, 3, 0, 1] and len(joined[2:6].null()) == 4
    for other in (Cond({"text": torch.zeros(4, 3)}), Cond({**example().tensors, "more": torch.zeros(4)})):
        with pytest.raises(ValueError, match="different names"):
            Cond.cat([example(), other])


def test_to_keeps_whole_numbers_whole():
    moved = example().to(torch.bfloat16)
    assert moved["text"].dtype == torch.bfloat16 and moved["label"].dtype == torch.int64
    assert moved.null()["text"].dtype == torch.bfloat16
    assert example()["text"].dtype == torch.float32
