"""Conditions whose texts have no common length: padded only where batches are joined, with lengths on the host."""

import pytest
import torch

from fewstep.models.cond import Cond
from fewstep.models.helpers import pooled_prompt


def text(*lengths, null=2, states=(), start=1.0):
    """Rows of so many tokens [B, tokens, *states, 3], counted from ``start``; the null has ``null`` tokens of -1."""
    rows = [torch.arange(start, start + n).reshape(n, *[1] * len(states), 1).expand(n, *states, 3) for n in lengths]
    embeds = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    none = torch.full((1, null, *states, 3), -1.0)
    counts = {"prompt_length": torch.tensor(lengths)}
    return Cond({"prompt_embeds": embeds, **counts}, {"prompt_embeds": none, "prompt_length": torch.tensor([null])})


def real(cond):
    """The tokens of each row, without padding."""
    rows = zip(cond["prompt_embeds"], cond["prompt_length"].tolist(), strict=True)
    return [row[:n, ..., 0].flatten().tolist() for row, n in rows]


def test_lengths_stay_on_the_host():
    moved = text(3, 1).to("meta", torch.float16)
    assert moved["prompt_embeds"].device.type == "meta" and moved["prompt_embeds"].dtype == torch.float16
    assert moved["prompt_length"].device.type == moved.null()["prompt_length"].device.type == "cpu"
    assert moved[1:]["prompt_length"].tolist() == [1]


def test_the_null_keeps_its_own_length():
    null = text(5, 4, null=2).null()
    assert null["prompt_embeds"].shape == (2, 2, 3) and null["prompt_length"].tolist() == [2, 2]
    longer = text(1, null=4)
    assert longer.null()["prompt_embeds"].shape == (1, 4, 3) and longer.flat()["null.prompt_embeds"].shape == (1, 4, 3)


@pytest.mark.parametrize("null", [1, 7])
def test_batches_are_joined_with_zeros_behind_the_shorter_texts(null):
    first, second = text(3, 1, null=null), text(4, null=null, start=10.0)
    joined = Cond.cat([first, second])
    assert joined["prompt_embeds"].shape == (3, 4, 3) and real(joined) == [[1, 2, 3], [1], [10, 11, 12, 13]]
    assert not joined["prompt_embeds"][0, 3:].any() and not joined["prompt_embeds"][1, 1:].any()
    both = Cond.cat([first.null(), first])  # what guidance asks
    assert real(both) == [[-1.0] * null] * 2 + [[1, 2, 3], [1]]
    flat = Cond.cat_flat([first.flat(), second.flat()])
    assert flat["cond.prompt_embeds"].shape == (3, 4, 3) and flat["null.prompt_embeds"].shape == (1, null, 3)


@pytest.mark.parametrize("null", [1, 5])
def test_dropped_rows_have_the_nulls_length(null):
    dropped = text(3, 2, null=null).drop(torch.tensor([True, False]))
    assert real(dropped) == [[-1.0] * null, [1, 2]]
    assert dropped["prompt_embeds"].shape == (2, max(3, null), 3)


def test_a_mask_allows_unequal_lengths_too_and_nothing_else_does():
    masked = [
        Cond({"prompt_embeds": torch.ones(1, n, 3), "prompt_mask": torch.ones(1, n, dtype=kind)})
        for n, kind in ((2, torch.bool), (3, torch.bool))
    ]
    joined = Cond.cat(masked)
    assert joined["prompt_mask"].tolist() == [[True, True, False], [True, True, True]]
    with pytest.raises(RuntimeError):
        Cond.cat([Cond({"prompt_embeds": torch.ones(1, n, 3)}) for n in (2, 3)])


def test_a_prompt_as_one_vector_is_the_mean_of_its_real_tokens_and_states():
    assert pooled_prompt(text(3, 1)).tolist() == [[2.0] * 3, [1.0] * 3]
    assert pooled_prompt(text(3, 1, states=(4,))).tolist() == [[2.0] * 3, [1.0] * 3]
