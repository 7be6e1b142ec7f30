"""What methods log beside their losses: statistics that `fewstep diagnose` reads.

Everything stays on the device as detached scalars; the names are a contract (docs/diagnosing.md). Ratios are formed of
means over many steps, when a log is read, wherever a ratio of one batch would be noise.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fewstep.diffusion.schedule import working

BINS = 10  # of equal width over the noise levels
TAIL, MARGIN = 0.005, 1.5  # the data's range: the distance from their channel's mean that 0.5 % exceed, times 1.5


@torch.no_grad()
def student_statistics(x0: Tensor, data: Tensor, teacher_x0: Tensor | None = None) -> dict[str, Tensor]:
    """A student's clean predictions beside the data of the same batch (and its teacher's at the same points).

    ``x0_mean``, ``x0_std``, ``data_mean``, ``data_std``: over all elements. ``saturation``: the share of predictions
    further from their channel's mean than the data's range; ``teacher_saturation``: the same of the teacher's.
    ``teacher_error``: the mean square of teacher_x0 - data, ``teacher_variance``: of teacher_x0 about its mean, both
    over the data's variance. Without guidance the first is at most 1, because a posterior's mean is no worse a guess
    than the prior's, and their sum is 1, the law of total variance. Of two rows or more also ``x0_spread``,
    ``data_spread``: the standard deviation over the batch, root mean square over all places (a student that gives one
    image to all has none, whatever contrast the image has), and ``mean_shift``: `mean_shift` over the data's
    variance.

    Args:
        x0: [B, C, ...] the predictions. data: [B, C, ...] the batch. teacher_x0: [B, C, ...] or None.
    """
    x0, data = working(x0), working(data)
    variance, mean = torch.var_mean(data, correction=0)
    away = _from_the_middle(data)
    limit = MARGIN * away.topk(max(1, round(TAIL * away.numel())), sorted=False).values.amin()
    found = {
        "x0_mean": x0.mean(),
        "x0_std": x0.std(correction=0),
        "data_mean": mean,
        "data_std": variance.sqrt(),
        "saturation": (_from_the_middle(x0) > limit).to(x0.dtype).mean(),
    }
    if len(x0) > 1:
        found["x0_spread"] = x0.var(dim=0).mean().sqrt()
        found["data_spread"] = data.var(dim=0).mean().sqrt()
        found["mean_shift"] = mean_shift(x0, data) / variance
    if teacher_x0 is not None:
        teacher_x0 = working(teacher_x0)
        found["teacher_error"] = (teacher_x0 - data).square().mean() / variance
        found["teacher_variance"] = teacher_x0.var(correction=0) / variance
        found["teacher_saturation"] = (_from_the_middle(teacher_x0) > limit).to(teacher_x0.dtype).mean()
    return found


def mean_shift(x0: Tensor, data: Tensor) -> Tensor:
    """The squared distance between the means of predictions and data, [B, C, ...] each, averaged over channels.

    Without bias: it is the product of two halves of the batch, whose noise is independent, where the square of one
    mean would add that mean's own variance. One value may be negative; the mean over steps tends to the truth.
    """
    difference = (x0 - data).flatten(2).mean(2) if x0.ndim > 2 else x0 - data
    return (difference[0::2].mean(0) * difference[1::2].mean(0)).mean()


@torch.no_grad()
def discriminator_statistics(real_logits: Tensor, fake_logits: Tensor) -> dict[str, Tensor]:
    """Statistics of a discriminator whose logit is positive for real, in any shape; heads, tokens and rows count alike.

    ``d_real``, ``d_fake``: the mean sigmoid. ``d_accuracy``: the mean of both shares on the right side of 0, ties
    half. ``d_logit_std``: over all logits.
    """
    real, fake = working(real_logits), working(fake_logits)
    right = (1 + (real.sign().mean() - fake.sign().mean()) / 2) / 2
    return {
        "d_real": real.sigmoid().mean(),
        "d_fake": fake.sigmoid().mean(),
        "d_accuracy": right,
        "d_logit_std": torch.cat([real.flatten(), fake.flatten()]).std(correction=0),
    }


@torch.no_grad()
def fake_score_statistics(fake_x0: Tensor, teacher_x0: Tensor, x0_student: Tensor) -> dict[str, Tensor]:
    """How well the fake score denoises the student's predictions, beside the teacher on the same noised predictions.

    ``fake_error``, ``teacher_fake_error``: mean squares of fake_x0 and teacher_x0 against x0_student, [B, ...]. A fake
    score that keeps up is the better of the two: it is trained on these, the teacher on data.
    """
    x0_student = working(x0_student)
    return {
        "fake_error": (working(fake_x0) - x0_student).square().mean(),
        "teacher_fake_error": (working(teacher_x0) - x0_student).square().mean(),
    }


@torch.no_grad()
def by_time(values: Mapping[str, Tensor], t: Tensor, levels: Tensor, what: str) -> dict[str, Tensor]:
    """A statistic of single rows over time: vectors over ten bins of the noise levels, the cleanest first.

    Each value is ``<name>_by_time``, the sum over a bin's rows over the batch; ``<what>_share_by_time`` is the share of
    rows in each bin. Over many steps the one divided by the other is the mean in a bin, where a batch has few rows.

    Args:
        values: [B] each. t: [B], native times on the host. levels: all of them, increasing, on the host.
    """
    like = next(iter(values.values()))
    bins = (torch.searchsorted(levels, t.to(levels)) * BINS // len(levels)).clamp(max=BINS - 1)
    rows = torch.nn.functional.one_hot(bins, BINS).to(like.device, non_blocking=True).to(like.dtype) / len(t)
    found = {f"{name}_by_time": working(value) @ working(rows) for name, value in values.items()}
    return found | {f"{what}_share_by_time": rows.sum(0)}


def _from_the_middle(x: Tensor) -> Tensor:
    """How far every element of [B, C, ...] is from its channel's mean, flat."""
    channels = x.movedim(1, 0).flatten(1) if x.ndim > 1 else x[None]
    return (channels - channels.mean(1, keepdim=True)).abs().flatten()
