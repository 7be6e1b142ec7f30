"""What the rules of `fewstep diagnose` look for: each function says what a history shows beyond a limit, or None.

What the means of the log say is judged over its last third, unless a function says otherwise.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fewstep.reports.history import History, Series, columns, is_number

Seen = tuple[str, int, int]  # what was seen, in figures; the first and the last step of it

# Limits that more than one rule needs, and second ones.
BLIND, EVER, WORSE_THAN_CHANCE = 0.52, 0.54, 0.45  # a discriminator's accuracy: on average, in its best tenth, broken
LAGS = 1.1
UNMOVED = 0.003  # a fake score that learns at all is better than the teacher by more than this somewhere
ABSURD_RATE = 0.05  # weights are of the order 0.02 to 0.1: one AdamW step at this rate makes a new network
UNGUIDED, EXPLAINED = 1.1, 0.85  # the teacher's error, and its error plus variance: at most 1, and 1, in expectation
SATURATED, TEACHER_SATURATED = 0.04, 0.015
OUT_OF_SIGHT = 0.3  # so many answers beyond the data's range are told apart by any discriminator
MANY = 12  # lines, where noise has to be told from a trend


# ---------------------------------------------------------------- ends and rates


def not_finite(history: History, limit: float) -> Seen | None:
    for line in history.records:
        if "not_finite" in line:
            step = line.get("first_bad_step")
            step = step if type(step) is int else line["step"]
            before = "before any update: the data or the teacher are to blame" if step == 0 else "after sound steps"
            return f"the gradient of '{line['not_finite']}' is not finite at step {step}, {before}", step, line["step"]
    for name in [*history.names("loss"), *history.names("grad_norm")]:
        lines = [line for line in history.records if isinstance(line.get(name), float)]
        bad = [line["step"] for line in lines if not math.isfinite(line[name])]
        if bad:
            return f"{name} is not finite in {len(bad)} of {len(lines)} lines", bad[0], bad[-1]
    return None


def blown_up(history: History, limit: float) -> Seen | None:
    """Already in the first two lines the answers are far from the data, with gradients far above the later ones.

    Where answers are not logged, gradients alone must say it, and then by a factor of limit^3.
    """
    calm = history.first("grad_norm")
    settled = calm is not None and calm.values[:2].max() < limit * calm.tail.median
    for name in [] if settled else history.names("mean_shift"):
        player = name.removesuffix("mean_shift")
        std, data, shift = columns(history.records, f"{player}x0_std", f"{player}data_std", name)
        size = np.hypot(std.values / np.maximum(data.values, 1e-30), np.sqrt(np.maximum(shift.values, 0.0)))
        if size[:2].max(initial=0.0) > limit and not _teacher_out_of_range(history):
            last = int(std.steps[np.flatnonzero(size > limit)[-1]])
            return f"the answers went {size.max():.3g} standard deviations away from the data", int(std.steps[0]), last
    for name in [] if history.names("mean_shift") else history.names("grad_norm"):
        norm = history.series(name)
        if norm.enough and norm.values[:2].max() > limit**3 * max(norm.tail.median, 1e-30):
            said = f"{name} fell from {norm.values[:2].max():.3g} to {norm.tail.median:.3g}"
            return said, int(norm.steps[0]), int(norm.steps[-1])
    return None


def rate_too_high(history: History, limit: float) -> Seen | None:
    if discriminator_blind(history, BLIND) or (_critics_rate_is_lower(history) and fake_lags(history, LAGS)):
        return None  # an opponent that learns nothing drives the student away just so
    seen = blown_up(history, limit)
    if seen is None:
        ended = not_finite(history, limit)
        peak = _peak_rate(history)
        if ended and ended[1] > 0 and peak >= ABSURD_RATE:
            return f"{ended[0]}, and AdamW moves every weight by up to the rate, {peak:.3g}, in each", *ended[1:]
    return seen


def _peak_rate(history: History) -> float:
    """The highest rate of any player, logged or planned."""
    logged = [value for line in history.records for name, value in line.items() if name.endswith("learning_rate")]
    planned = [history.setting("training", name) for name in ("learning_rate", "critic_learning_rate")]
    return max((float(rate) for rate in [*logged, *planned] if is_number(rate)), default=0.0)


def _critics_rate_is_lower(history: History) -> bool:
    found = history.pair("learning_rate", "grad_norm")
    student = history.series("learning_rate")
    return found is not None and len(student) > 0 and found[0].median < 0.5 * student.median


def rate_too_low(history: History, limit: float) -> Seen | None:
    rate = history.series("learning_rate")
    if len(rate) < 3:
        return None
    reach = float((rate.values * np.diff(rate.steps, prepend=0.0)).sum())
    planned = history.setting("training", "steps")
    reach *= max(1.0, planned / history.step) if is_number(planned) else 1.0
    if reach > (limit / 20 if history.setting("student", "weights") == "full" else limit):  # small moves of all weights
        return None
    loss = history.series("student/loss")
    if reach > limit / 20 and loss.enough and loss.tail.median < 0.7 * loss.head.median:
        return None  # little, but it was enough
    said = f"all its steps together can move no weight by more than about {reach:.2g}"
    return said, int(rate.steps[0]), history.step


# ---------------------------------------------------------------- adversaries and fake scores


def discriminator_blind(history: History, limit: float) -> Seen | None:
    accuracy = history.first("d_accuracy")
    if accuracy is None:
        return None
    if accuracy.tail.mean < WORSE_THAN_CHANCE:
        said = f"its accuracy is {accuracy.tail.mean:.2f}, below chance: real and fake swapped, or it does not learn"
        return said, *accuracy.since(accuracy.values < WORSE_THAN_CHANCE)
    if accuracy.mean > limit or np.quantile(accuracy.values, 0.9) > EVER:
        return None
    said = f"its accuracy is {accuracy.values.min():.2f} to {accuracy.values.max():.2f} throughout"
    return said, int(accuracy.steps[0]), int(accuracy.steps[-1])


def discriminator_strong(history: History, limit: float) -> Seen | None:
    accuracy, beyond = history.first("d_accuracy"), history.first("saturation")
    if accuracy is None or (beyond is not None and beyond.tail.mean > OUT_OF_SIGHT):
        return None
    late = accuracy.part(slice(len(accuracy) // 2, None))
    if late.mean <= limit:
        return None
    return f"its accuracy is {late.mean:.3f} in the second half", *_between(accuracy, accuracy.values > limit)


def fake_lags(history: History, limit: float) -> Seen | None:
    found = history.pair("fake_error", "teacher_fake_error")
    if found is None:
        return None
    mine, teacher = found
    ratio = Series("ratio", mine.steps, mine.values / np.maximum(teacher.values, 1e-30))
    if np.abs(ratio.values - 1).max() < UNMOVED:
        said = "it denoises the student's answers exactly as the teacher does: it has not moved"
        return said, int(ratio.steps[0]), int(ratio.steps[-1])
    late = mine.tail.mean / max(teacher.tail.mean, 1e-30)
    behind = ratio.values > limit
    if behind.mean() < 0.4 and (late <= limit or behind[-len(ratio.tail) :].mean() < 0.5):
        return None  # a fake score that starts from nothing may be behind for a while
    worst = float(np.median(ratio.values[behind]))
    said = f"on the student's answers it errs {worst:.3g} times as much as the teacher, in {behind.mean():.0%} of lines"
    return said, *_between(ratio, behind)


def _between(series: Series, holds: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """The first and the last step of the lines in which ``holds`` [n] is true."""
    rows = np.flatnonzero(holds)
    return int(series.steps[rows[0]]), int(series.steps[rows[-1]])


# ---------------------------------------------------------------- teacher, data, answers


def _teacher_out_of_range(history: History) -> bool:
    share = history.first("teacher_saturation")
    return share is not None and share.tail.mean > TEACHER_SATURATED


def teacher_misfit(history: History, limit: float) -> Seen | None:
    found = history.pair("teacher_error", "teacher_variance")
    if found is None:
        return None
    error, variance = found
    alone = history.setting("method", "guidance_scale") == 1
    limit = UNGUIDED if alone else limit
    if error.tail.mean > limit and (alone or variance.tail.mean < 0.5 * error.tail.mean):  # guidance raises both
        said = f"its error on them is {error.tail.mean:.3g} times their variance"
        return said, *error.since(error.values > limit)
    explained = error.map(lambda values: values + variance.values)
    if explained.tail.mean >= EXPLAINED:
        return None
    said = f"error and variance of its answers together are {explained.tail.mean:.2g} of the data's variance, not 1"
    return said, *explained.since(explained.values < EXPLAINED)


def data_alike(history: History, limit: float) -> Seen | None:
    found = history.pair("data_spread", "data_std")
    if found is None or found[0].mean > limit * found[1].mean:
        return None
    ratio = found[0].mean / max(found[1].mean, 1e-30)
    return f"the pictures of a batch differ by {ratio:.2g} of their contrast", int(found[0].steps[0]), history.step


def teacher_saturated(history: History, limit: float) -> Seen | None:
    return _beyond(history.first("teacher_saturation"), limit)


def saturated(history: History, limit: float) -> Seen | None:
    return _beyond(history.first("saturation"), limit)


def _beyond(share: Series | None, limit: float) -> Seen | None:
    if share is None or share.tail.mean <= limit:
        return None
    said = f"{100 * share.tail.mean:.2g} % of them lie beyond the data's range"
    return said, *share.since(share.values > limit)


def drift(history: History, limit: float) -> Seen | None:
    shift = history.first("mean_shift")
    if shift is None:
        return None
    late = shift.tail
    distance = math.sqrt(max(0.0, late.mean))
    if distance <= limit or late.tail.mean < 0.75 * late.head.mean:  # far, but still coming closer
        return None
    return f"the answers' mean is {distance:.2g} standard deviations from the data's", *shift.since(
        shift.values > limit**2
    )


def diversity_lost(history: History, limit: float) -> Seen | None:
    found = history.pair("x0_spread", "data_spread")
    if found is not None:
        mine, data = found
        ratio = Series("ratio", mine.steps, mine.values / np.maximum(data.values, 1e-30))
        late = ratio.tail
        rising = late.head.mean * 1.2 < late.tail.mean  # blurred at first, and still getting sharper
        if late.mean < limit and not rising:
            return f"the answers vary {late.mean:.2g} times as much as the data", *ratio.since(ratio.values < limit)
    within = [line for line in history.samples if isinstance(line.get("diversity"), float)]
    if within and within[-1]["diversity"] < limit:
        said = f"samples of one prompt differ {within[-1]['diversity']:.2g} times as much as the teacher's"
        return said, within[-1]["step"], within[-1]["step"]
    return None


def reward_hacked(history: History, limit: float) -> Seen | None:
    """What is missing to the thresholds falls, and the reward that is held out falls too, from first third to last."""
    found = history.pair("held_out_mean", "held_out_std")
    if found is None or len(found[0]) < MANY:
        return None
    held, std = found
    fall = (held.head.mean - held.tail.mean) / max(std.mean, 1e-30)
    pleased = [s.name for s in _shortfalls(history) if s.enough and s.tail.mean < s.head.mean]
    if fall <= limit or not pleased:
        return None
    low = held.values < held.head.mean - limit * std.mean
    return f"{held.name} fell by {fall:.2g} standard deviations while {pleased[0]} fell", *held.since(low)


def _shortfalls(history: History) -> list[Series]:
    """What rewards are below their thresholds."""
    found = dict.fromkeys(name for line in history.records for name in line if name.endswith("_missing"))
    return [history.series(name) for name in found]


# ---------------------------------------------------------------- losses and gradients


def _adversarial(history: History) -> bool:
    """Whether the student's loss is what an opponent makes of it, and its level means nothing."""
    return bool(history.names("d_accuracy") or history.names("fake_error"))


def loss_rises(history: History, limit: float) -> Seen | None:
    for name in history.names("grad_norm"):
        norm = history.series(name)
        if norm.enough and norm.tail.median > 10 * limit * norm.head.median:
            return f"{name} rose from {norm.head.median:.3g} to {norm.tail.median:.3g}", *norm.since(
                norm.values > norm.head.median
            )
    loss = history.series("student/loss")
    if _adversarial(history) or not loss.enough or loss.tail.median <= limit * loss.head.median:
        return None
    said = f"student/loss rose from {loss.head.median:.3g} to {loss.tail.median:.3g}"
    return said, *loss.since(loss.values > loss.head.median)


def loss_flat(history: History, limit: float) -> Seen | None:
    """Flat beyond doubt: even two standard errors below what was measured the loss did not fall by the limit."""
    loss = history.series("student/loss")
    if _adversarial(history) or len(loss) < MANY:
        return None
    head, tail = loss.head, loss.tail
    error = math.hypot(*(float(part.values.std(ddof=1)) / math.sqrt(len(part)) for part in (head, tail)))
    if head.mean <= 0 or (head.mean - tail.mean + 2 * error) / head.mean > limit:
        return None
    return f"student/loss is {tail.mean:.3g}, and was {head.mean:.3g}", int(loss.steps[0]), history.step


def gradients_vanish(history: History, limit: float) -> Seen | None:
    short = _shortfalls(history)
    if short and all(s.enough and s.tail.median <= limit * s.head.median for s in short):
        return None  # nothing is missing any more, so nothing should pull
    for name in history.names("grad_norm"):
        norm = history.series(name)
        if norm.enough and norm.tail.median <= limit * norm.head.median:
            return f"{name} fell from {norm.head.median:.3g} to {norm.tail.median:.3g}", *norm.since(
                norm.values <= limit * norm.head.median
            )
    return None


def oscillates(history: History, limit: float) -> Seen | None:
    found = history.pair("x0_mean", "data_mean")
    unit = history.first("data_std")
    if found is None or unit is None or len(found[0]) < MANY:
        return None
    offset, steps = found[0].tail.values - found[1].tail.values, found[0].tail.steps
    line = np.polyval(np.polyfit(steps, offset, 1), steps)  # a drift is another matter
    swing = float((offset - line).std()) / max(unit.mean, 1e-30)
    if swing <= limit:
        return None
    return f"the answers' mean swings by {swing:.2g} standard deviations of the data", int(steps[0]), int(steps[-1])


def always_clipped(history: History, limit: float) -> Seen | None:
    for name in history.names("clipped"):
        share = history.series(name)
        if share.enough and share.mean >= limit:
            return f"{name} is {share.mean:.2f}", int(share.steps[0]), int(share.steps[-1])
    return None


def average_behind(history: History, limit: float) -> Seen | None:
    decay, planned = history.setting("training", "ema_decay"), history.setting("training", "steps")
    if not isinstance(decay, float) or not isinstance(planned, int) or planned < 100 or not 0 < decay < 1:
        return None
    left = decay**planned
    if left <= limit:
        return None
    said = f"with training.ema_decay {decay:g}, {100 * left:.0f} % of it is still the start after {planned} steps"
    return said, 0, history.step


def unfinished(history: History, limit: float) -> Seen | None:
    planned = history.setting("training", "steps")
    if not isinstance(planned, int) or history.step >= planned or any("not_finite" in r for r in history.records):
        return None
    return f"the log ends at step {history.step} of {planned}", history.step, history.step
