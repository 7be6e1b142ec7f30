"""The checks of `fewstep diagnose`: each function looks for one problem, its limit and its reason stand above it.

The order is that of causes: a problem stands before those that it brings along (a learning rate that is too high also
saturates, drifts and loses diversity). Means are taken over the last third of the log where nothing else is stated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fewstep.reports.history import History, Series, columns, is_number

Evidence = tuple[str, int, int]
"""The figures in words, and the first and the last step at which they hold."""

MANY = 12  # lines that it takes to distinguish noise from a trend
TINY = 1e-30  # in place of a zero that would be divided by


@dataclass(frozen=True)
class Check:
    """One problem that a run may have.

    Attributes:
        name: of the problem. needs: statistics of the log, or keys of the recipe, without which it cannot be found.
        limit: beyond which there is a problem; reason: why the limit is there.
        problem: the first half of a finding's sentence; advice: what to do about it.
        find: the evidence in a history, given the limit; None where there is no problem.
        fatal: False for what is worth knowing but not wrong.
        turns: what the advice would turn up or down, as in "-rate +critic" (`opposes`).
        early: whether it can be made after a handful of steps.
    """

    name: str
    needs: tuple[str, ...]
    limit: float
    reason: str
    problem: str
    advice: str
    find: Callable[[History, float], Evidence | None]
    fatal: bool = True
    turns: frozenset[str] = frozenset()
    early: bool = False

    def opposes(self, other: Check) -> bool:
        """Whether one advice turns up what the other turns down: a rate, a player's updates, the length of the run."""
        return any({"+": "-", "-": "+"}[turn[0]] + turn[1:] in other.turns for turn in self.turns)

    def __call__(self, history: History) -> Evidence | None:
        return self.find(history, self.limit)


CHECKS: list[Check] = []


def check(
    name: str,
    *needs: str,
    limit: float,
    reason: str,
    problem: str,
    advice: str,
    fatal: bool = True,
    turns: str = "",
    early: bool = False,
) -> Callable[[Callable[[History, float], Evidence | None]], Check]:
    """Make a check of a function, and add it to `CHECKS`."""

    def register(find: Callable[[History, float], Evidence | None]) -> Check:
        CHECKS.append(Check(name, needs, limit, reason, problem, advice, find, fatal, frozenset(turns.split()), early))
        return CHECKS[-1]

    return register


# ---------------------------------------------------------------- learning rates and numbers that are not finite

ABSURD_RATE = 0.05  # weights are of the order 0.02 to 0.1: one AdamW step at this rate makes a new network


@check(
    "learning rate too high",
    "grad_norm",
    limit=10.0,
    reason="no published student predicts ten times as wide as its data; an update of such a size makes a new network",
    problem="The first updates destroyed the weights",
    advice="lower training.learning_rate (or critic_learning_rate) 10 to 1000 times, and start again",
    turns="-rate -critic -resume",
)
def rate_too_high(history: History, limit: float) -> Evidence | None:
    if discriminator_blind(history) or (_critics_rate_is_lower(history) and fake_score_lags(history)):
        return None  # an opponent that learns nothing drives the student away in the same manner
    found = _destroyed(history, limit)
    if found is None:
        ended = not_finite(history)
        peak = _peak_rate(history)
        if ended and ended[1] > 0 and peak >= ABSURD_RATE:
            return f"{ended[0]}, and a step moves every weight by up to the learning rate, {peak:.3g}", *ended[1:]
    return found


def _destroyed(history: History, limit: float) -> Evidence | None:
    """Predictions far from the data in the first two lines already, with gradients far above the later ones.

    Where predictions are not logged, the gradients alone must show it, by a factor of limit^3.
    """
    norm = history.first("grad_norm")
    calm = norm is not None and norm.values[:2].max() < limit * norm.tail.median
    for name in [] if calm else history.names("mean_shift"):
        player = name.removesuffix("mean_shift")
        std, data, shift = columns(history.records, f"{player}x0_std", f"{player}data_std", name)
        size = np.hypot(std.over(data).values, np.sqrt(np.maximum(shift.values, 0.0)))
        if size[:2].max(initial=0.0) > limit and not teacher_saturated(history):
            first, last = int(std.steps[0]), int(std.steps[np.flatnonzero(size > limit)[-1]])
            return f"the predictions went up to {size.max():.3g} standard deviations away from the data", first, last
    for name in [] if history.names("mean_shift") else history.names("grad_norm"):
        norm = history.series(name)
        if norm.enough and norm.values[:2].max() > limit**3 * max(norm.tail.median, TINY):
            return f"{name} fell from {norm.values[:2].max():.3g} to {norm.tail.median:.3g}", *norm.span
    return None


def _peak_rate(history: History) -> float:
    """The highest learning rate of any player, logged or planned."""
    logged = [value for line in history.records for name, value in line.items() if name.endswith("learning_rate")]
    planned = [history.setting("training", name) for name in ("learning_rate", "critic_learning_rate")]
    return max((float(rate) for rate in [*logged, *planned] if is_number(rate)), default=0.0)


def _critics_rate_is_lower(history: History) -> bool:
    found = history.pair("learning_rate", "grad_norm")
    student = history.series("learning_rate")
    return found is not None and len(student) > 0 and found[0].median < 0.5 * student.median


@check(
    "not finite",
    "loss",
    "grad_norm",
    limit=0.0,
    reason="a number that is not finite never becomes finite again",
    problem="The training met numbers that are not finite",
    advice="look for NaN in the data and the teacher's weights, else lower the learning rates; continue with --resume",
    turns="-rate -critic +resume",
    early=True,
)
def not_finite(history: History, limit: float) -> Evidence | None:
    for line in history.records:
        if "not_finite" in line:
            step = line.get("first_bad_step")
            step = step if type(step) is int else line["step"]
            when = "before any update: the data or the teacher are the cause" if step == 0 else "after finite steps"
            return f"the gradient of '{line['not_finite']}' is not finite at step {step}, {when}", step, line["step"]
    for name in [*history.names("loss"), *history.names("grad_norm")]:
        lines = [line for line in history.records if isinstance(line.get(name), float)]
        bad = [line["step"] for line in lines if not math.isfinite(line[name])]
        if bad:
            return f"{name} is not finite in {len(bad)} of {len(lines)} lines", bad[0], bad[-1]
    return None


# ---------------------------------------------------------------- teacher and data

# Without guidance a teacher's error is at most 1, and its error plus its variance is 1 in expectation.
UNGUIDED_ERROR, EXPLAINED = 1.1, 0.85


@check(
    "teacher does not fit the data",
    "teacher_error",
    "teacher_variance",
    limit=2.0,
    reason="a posterior mean is never worse than the prior's, which has 1; guidance adds to it: 0.4 at 3 on scenes-64",
    problem="The teacher cannot denoise these data",
    advice="check the latents' scaling factor, the teacher's prediction_type and schedule, and the captions",
)
def teacher_misfit(history: History, limit: float) -> Evidence | None:
    found = history.pair("teacher_error", "teacher_variance")
    if found is None:
        return None
    error, variance = found
    alone = history.setting("method", "guidance_scale") == 1
    limit = UNGUIDED_ERROR if alone else limit
    if error.tail.mean > limit and (alone or variance.tail.mean < 0.5 * error.tail.mean):  # guidance raises both
        return f"its error is {error.tail.mean:.3g} times their variance", *error.since(error.values > limit)
    explained = Series("explained", error.steps, error.values + variance.values)
    if explained.tail.mean >= EXPLAINED:
        return None
    text = f"its error and its predictions' variance add up to {explained.tail.mean:.2g} of the data's variance, not 1"
    return text, *explained.since(explained.values < EXPLAINED)


@check(
    "data all alike",
    "data_spread",
    "data_std",
    limit=0.1,
    reason="images of any set differ from each other about as much as they have contrast",
    problem="The images of a batch are nearly the same",
    advice="check data.size and the source: a student that sees one image learns nothing else",
)
def data_alike(history: History, limit: float) -> Evidence | None:
    found = history.pair("data_spread", "data_std")
    if found is None or found[0].mean > limit * found[1].mean:
        return None
    ratio = found[0].mean / max(found[1].mean, TINY)
    return f"they differ by {ratio:.2g} of their contrast", int(found[0].steps[0]), history.step


# ---------------------------------------------------------------- discriminators and fake scores

EVER = 0.54  # accuracy that a discriminator reaches in a tenth of the lines if it sees anything
WORSE_THAN_CHANCE = 0.45
OUT_OF_SIGHT = 0.3  # share of predictions beyond the data's range that any discriminator recognises
UNMOVED = 0.003  # least advantage over the teacher, at some noise level, of a fake score that learns


@check(
    "discriminator blind",
    "d_accuracy",
    limit=0.52,
    reason="one half is chance; unless the student begins perfect, the discriminator must be better at some time",
    problem="The discriminator cannot distinguish real from generated samples",
    advice="check its noise levels, its condition, the order of real and fake, and its learning rate",
)
def discriminator_blind(history: History, limit: float) -> Evidence | None:
    accuracy = history.first("d_accuracy")
    if accuracy is None:
        return None
    if accuracy.tail.mean < WORSE_THAN_CHANCE:
        text = (
            f"its accuracy is {accuracy.tail.mean:.2f}, below chance: real and fake are swapped, or it does not learn"
        )
        return text, *accuracy.since(accuracy.values < WORSE_THAN_CHANCE)
    if accuracy.mean > limit or np.quantile(accuracy.values, 0.9) > EVER:
        return None
    return f"its accuracy is {accuracy.values.min():.2f} to {accuracy.values.max():.2f} throughout", *accuracy.span


@check(
    "discriminator too strong",
    "d_accuracy",
    limit=0.95,
    reason="if it stays above this the student's gradient vanishes (the specification's section 11.4)",
    problem="The discriminator is nearly always right",
    advice="add more noise to its inputs, give it fewer or smaller updates (critic_learning_rate) or an R1 penalty",
    turns="-critic",
)
def discriminator_strong(history: History, limit: float) -> Evidence | None:
    accuracy, beyond = history.first("d_accuracy"), history.first("saturation")
    if accuracy is None or (beyond is not None and beyond.tail.mean > OUT_OF_SIGHT):
        return None
    late = accuracy.part(slice(len(accuracy) // 2, None))
    if late.mean <= limit:
        return None
    return f"its accuracy is {late.mean:.3f} in the second half", *accuracy.part(accuracy.values > limit).span


@check(
    "fake score lagging",
    "fake_error",
    "teacher_fake_error",
    limit=1.1,
    reason="it must be at most 1 (section 11.3 of the specification), and above 1.05 something should be done",
    problem="The fake score does not keep up with the student",
    advice="give it more updates per step of the student, a higher critic_learning_rate or a higher rank",
    turns="+critic +rank",
)
def fake_score_lags(history: History, limit: float) -> Evidence | None:
    found = history.pair("fake_error", "teacher_fake_error")
    if found is None:
        return None
    mine, teacher = found
    ratio = mine.over(teacher)
    if np.abs(ratio.values - 1).max() < UNMOVED:
        return "it denoises the student's samples exactly as the teacher does: it has not moved", *ratio.span
    late = mine.tail.mean / max(teacher.tail.mean, TINY)
    behind = ratio.values > limit
    if behind.mean() < 0.4 and (late <= limit or behind[-len(ratio.tail) :].mean() < 0.5):
        return None  # a fake score that starts from random weights may be behind for a while
    worst = float(np.median(ratio.values[behind]))
    text = f"on the student's samples its error is {worst:.3g} times the teacher's, in {behind.mean():.0%} of the lines"
    return text, *ratio.part(behind).span


# ---------------------------------------------------------------- the student's predictions and loss


@check(
    "learning rate too low",
    "learning_rate",
    limit=2e-3,
    reason="weights are of the order 0.02 to 0.1; published runs could move them by 0.01 or more",
    problem="The student can learn next to nothing at this learning rate in so few steps",
    advice="raise training.learning_rate (LoRA: 1e-4 to 2e-3, all weights: 1e-6 to 1e-5), or train longer",
    turns="+rate +length",
)
def rate_too_low(history: History, limit: float) -> Evidence | None:
    rate = history.series("learning_rate")
    if len(rate) < 3:
        return None
    reach = float((rate.values * np.diff(rate.steps, prepend=0.0)).sum())
    planned = history.setting("training", "steps")
    reach *= max(1.0, planned / history.step) if is_number(planned) else 1.0
    if reach > (
        limit / 20 if history.setting("student", "weights") == "full" else limit
    ):  # full weights move less each, but all of them do
        return None
    loss = history.series("student/loss")
    if reach > limit / 20 and loss.enough and loss.tail.median < 0.7 * loss.head.median:
        return None  # the updates were small, but the loss fell
    text = f"all its steps together can move no weight by more than about {reach:.2g}"
    return text, int(rate.steps[0]), history.step


@check(
    "saturation of the teacher",
    "teacher_saturation",
    limit=0.015,
    reason="beyond 1.5 times what 0.5 % of the data exceed: on scenes-64 0.05 % of them at guidance 3, 2.3 % at 20",
    problem="The teacher's own predictions are saturated, and the student learns them",
    advice="lower method.guidance_scale; if it is low, check the teacher's prediction_type and the latents' scaling",
    turns="-guidance",
)
def teacher_saturated(history: History, limit: float) -> Evidence | None:
    return _beyond(history.first("teacher_saturation"), limit)


def _beyond(share: Series | None, limit: float) -> Evidence | None:
    if share is None or share.tail.mean <= limit:
        return None
    text = f"{100 * share.tail.mean:.2g} % of them lie beyond the data's range"
    return text, *share.since(share.values > limit)


@check(
    "diverging",
    "loss",
    "grad_norm",
    limit=3.0,
    reason="three times the loss, or thirty times the gradient, of the run's first third is no noise",
    problem="The training diverges",
    advice="lower training.learning_rate, or let the target follow the student as an average (target_decay 0.95)",
    turns="-rate",
)
def loss_rises(history: History, limit: float) -> Evidence | None:
    limits = {name: 10 * limit for name in history.names("grad_norm")}
    if not _adversarial(history):
        limits["student/loss"] = limit
    for name, factor in limits.items():
        found = history.series(name)
        if found.enough and found.tail.median > factor * found.head.median:
            text = f"{name} rose from {found.head.median:.3g} to {found.tail.median:.3g}"
            return text, *found.since(found.values > found.head.median)
    return None


def _adversarial(history: History) -> bool:
    """Whether the student's loss depends on an opponent, so that its level means nothing."""
    return bool(history.names("d_accuracy") or history.names("fake_error"))


@check(
    "saturation",
    "saturation",
    limit=0.04,
    reason="the range is 1.5 times what 0.5 % of the data exceed; of scenes-64's students 0.05 % lie beyond",
    problem="The student's predictions are saturated",
    advice="lower the teacher's guidance_scale, and check the scale of the predictions and of the latents",
    turns="-guidance",
)
def saturated(history: History, limit: float) -> Evidence | None:
    return _beyond(history.first("saturation"), limit)


@check(
    "drift of the mean",
    "mean_shift",
    limit=0.5,
    reason="half a standard deviation in every channel; students that work stay below 0.1, small GANs below 0.4",
    problem="The mean of the predictions has drifted away from that of the data",
    advice="look for a biased target or teacher, a fake score that lags, or batches that are too small",
)
def drift(history: History, limit: float) -> Evidence | None:
    shift = history.first("mean_shift")
    if shift is None:
        return None
    late = shift.tail
    distance = math.sqrt(max(0.0, late.mean))  # the log holds the square
    if distance <= limit or late.tail.mean < 0.75 * late.head.mean:  # far, but still coming closer
        return None
    return f"it is {distance:.2g} standard deviations away", *shift.since(shift.values > limit**2)


@check(
    "lost diversity",
    "x0_spread",
    "data_spread",
    limit=0.5,
    reason="half the data's spread is a quarter of its variance; students that work keep 0.75 and more",
    problem="The student has lost diversity",
    advice="raise the weight of the adversarial loss or of the fake score, lower that of the distillation loss and "
    "guidance_scale",
    turns="+opponent -guidance",
)
def diversity_lost(history: History, limit: float) -> Evidence | None:
    found = history.pair("x0_spread", "data_spread")
    if found is not None:
        ratio = found[0].over(found[1])
        late = ratio.tail
        rising = late.head.mean * 1.2 < late.tail.mean  # blurred at first, and still getting sharper
        if late.mean < limit and not rising:
            text = f"its predictions vary {late.mean:.2g} times as much as the data"
            return text, *ratio.since(ratio.values < limit)
    within = [line for line in history.samples if isinstance(line.get("diversity"), float)]
    if within and within[-1]["diversity"] < limit:
        text = f"samples of one prompt differ {within[-1]['diversity']:.2g} times as much as the teacher's"
        return text, within[-1]["step"], within[-1]["step"]
    return None


@check(
    "reward hacking",
    "held_out_mean",
    "held_out_std",
    limit=0.25,
    reason="a quarter of the standard deviation between images: what people like, a reward model that nobody trained "
    "against likes too",
    problem="The student gains in the rewards that it is trained on, and loses in the one that is held out",
    advice="train shorter, lower the thresholds or the rank, raise method.perceptual_weight or method.anchor_weight, "
    "or merge it with a smaller scale",
    turns="-length -rank",
)
def reward_hacked(history: History, limit: float) -> Evidence | None:
    """From the first to the last third, both the shortfall of a reward and the held-out reward fall."""
    found = history.pair("held_out_mean", "held_out_std")
    if found is None or len(found[0]) < MANY:
        return None
    held, std = found
    fall = (held.head.mean - held.tail.mean) / max(std.mean, TINY)
    gained = [s.name for s in _shortfalls(history) if s.enough and s.tail.mean < s.head.mean]
    if fall <= limit or not gained:
        return None
    low = held.values < held.head.mean - limit * std.mean
    return f"{held.name} fell by {fall:.2g} standard deviations while {gained[0]} fell", *held.since(low)


def _shortfalls(history: History) -> list[Series]:
    """By how much rewards are below their thresholds."""
    found = dict.fromkeys(name for line in history.records for name in line if name.endswith("_missing"))
    return [history.series(name) for name in found]


@check(
    "vanishing gradients",
    "grad_norm",
    limit=1e-3,
    reason="at a thousandth of the first third's, no gradient reaches the weights any more",
    problem="Gradients have vanished",
    advice="look for a loss that is saturated or detached",
)
def gradients_vanish(history: History, limit: float) -> Evidence | None:
    short = _shortfalls(history)
    if short and all(s.enough and s.tail.median <= limit * s.head.median for s in short):
        return None  # all rewards are above their thresholds, so there is no gradient
    for name in history.names("grad_norm"):
        norm = history.series(name)
        if norm.enough and norm.tail.median <= limit * norm.head.median:
            text = f"{name} fell from {norm.head.median:.3g} to {norm.tail.median:.3g}"
            return text, *norm.since(norm.values <= limit * norm.head.median)
    return None


@check(
    "oscillation",
    "x0_mean",
    "data_mean",
    "data_std",
    limit=0.4,
    reason="the brightness of whole batches: students that work stay below 0.1, small GANs that settle below 0.35",
    problem="The student oscillates",
    advice="give the critic more updates per step of the student, or lower the student's learning rate",
    turns="+critic -rate",
)
def oscillates(history: History, limit: float) -> Evidence | None:
    found = history.pair("x0_mean", "data_mean")
    unit = history.first("data_std")
    if found is None or unit is None or len(found[0]) < MANY:
        return None
    offset, steps = found[0].tail.values - found[1].tail.values, found[0].tail.steps
    line = np.polyval(np.polyfit(steps, offset, 1), steps)  # without its linear drift, which another check finds
    swing = float((offset - line).std()) / max(unit.mean, TINY)
    if swing <= limit:
        return None
    return f"its predictions' mean swings by {swing:.2g} standard deviations of the data", *found[0].tail.span


@check(
    "loss not falling",
    "loss",
    limit=0.03,
    reason="a fall of 3 % would have been seen, with 97.5 % certainty",
    problem="The student's loss does not fall",
    advice="raise training.learning_rate or max_grad_norm, and check that the loss reaches the student's weights",
    turns="+rate",
)
def loss_flat(history: History, limit: float) -> Evidence | None:
    """Even two standard errors below the measured one, the loss of the last third has not fallen by the limit."""
    loss = history.series("student/loss")
    if _adversarial(history) or len(loss) < MANY:
        return None
    head, tail = loss.head, loss.tail
    error = math.hypot(*(float(part.values.std(ddof=1)) / math.sqrt(len(part)) for part in (head, tail)))
    if head.mean <= 0 or (head.mean - tail.mean + 2 * error) / head.mean > limit:
        return None
    return f"student/loss is {tail.mean:.3g}, and was {head.mean:.3g}", int(loss.steps[0]), history.step


# ---------------------------------------------------------------- worth knowing


@check(
    "average far behind",
    "training.ema_decay",
    limit=0.5,
    reason="more than half of what is exported would be the untrained student",
    problem="The average of the student's weights has hardly moved",
    advice="lower training.ema_decay, or train longer",
    turns="+length",
    early=True,
)
def average_behind(history: History, limit: float) -> Evidence | None:
    decay, planned = history.setting("training", "ema_decay"), history.setting("training", "steps")
    if not isinstance(decay, float) or not isinstance(planned, int) or planned < 100 or not 0 < decay < 1:
        return None
    left = decay**planned
    if left <= limit:
        return None
    text = f"with training.ema_decay {decay:g}, {100 * left:.0f} % of it is still the start after {planned} steps"
    return text, 0, history.step


@check(
    "always clipped",
    "clipped",
    limit=0.95,
    reason="with AdamW this costs little, because only the gradient's direction counts",
    problem="Nearly every gradient was clipped",
    advice="raise training.max_grad_norm if single batches should count by their size",
    fatal=False,
)
def always_clipped(history: History, limit: float) -> Evidence | None:
    for name in history.names("clipped"):
        share = history.series(name)
        if share.enough and share.mean >= limit:
            return f"{name} is {share.mean:.2f}", *share.span
    return None


@check(
    "unfinished",
    "training.steps",
    limit=0.0,
    reason="the number of steps in the recipe",
    problem="The run is not finished",
    advice="continue with fewstep distill ... --resume, unless it is running now",
    fatal=False,
    turns="+resume +length",
    early=True,
)
def unfinished(history: History, limit: float) -> Evidence | None:
    planned = history.setting("training", "steps")
    if not isinstance(planned, int) or history.step >= planned or any("not_finite" in r for r in history.records):
        return None
    return f"the log ends at step {history.step} of {planned}", history.step, history.step
