"""The rules of `fewstep diagnose`: what each looks at, where its limit is and why, and what it says.

They stand in the order in which they are told: causes first, because most of them bring the later ones along (a
learning rate too high saturates, drifts and loses diversity too). What is seen, and how, is in `symptoms`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fewstep.reports import symptoms
from fewstep.reports.history import History


@dataclass(frozen=True)
class Rule:
    """One thing that can be wrong with a run.

    Attributes:
        name: by which it is known.
        looks_at: statistics without which it cannot be checked.
        limit: its threshold, and reason: why there.
        wrong: what is wrong, advice: what to do, in plain words.
        see: what the history shows of it beyond the limit; None where it does not.
        fatal: False for what is only worth knowing.
    """

    name: str
    looks_at: tuple[str, ...]
    limit: float
    reason: str
    wrong: str
    advice: str
    see: Callable[[History, float], symptoms.Seen | None]
    fatal: bool = True


RULES = (
    Rule(
        "learning rate too high",
        ("grad_norm",),
        10.0,
        "no published student is ten times as wide as its data; an update of such a size is a new network",
        "The weights were blown up by the first updates",
        "lower training.learning_rate (or critic_learning_rate) 10 to 1000 times, and start again",
        symptoms.rate_too_high,
    ),
    Rule(
        "not finite",
        ("loss", "grad_norm"),
        0.0,
        "a number that is not finite never becomes one again",
        "Training met numbers that are not finite",
        "look for NaN in the data and the teacher's weights, else lower the learning rates; continue with --resume",
        symptoms.not_finite,
    ),
    Rule(
        "teacher does not fit the data",
        ("teacher_error", "teacher_variance"),
        2.0,
        "a posterior mean is never worse than the prior's, which has 1; guidance adds to it: 0.4 at 3 on scenes-64",
        "The teacher cannot denoise these data",
        "check the latents' scaling factor, the teacher's prediction_type and schedule, and that captions are its own",
        symptoms.teacher_misfit,
    ),
    Rule(
        "data all alike",
        ("data_spread", "data_std"),
        0.1,
        "pictures of any set differ from each other about as much as they have contrast",
        "The pictures of a batch are nearly the same",
        "check data.size and the source: a student of one picture learns nothing else",
        symptoms.data_alike,
    ),
    Rule(
        "discriminator blind",
        ("d_accuracy",),
        symptoms.BLIND,
        "one half is chance; with a student that begins as anything but perfect it must be better at some time",
        "The discriminator cannot tell real from fake",
        "check its noise levels, its condition, the order of real and fake, and its learning rate",
        symptoms.discriminator_blind,
    ),
    Rule(
        "discriminator too strong",
        ("d_accuracy",),
        0.95,
        "above this for long the student's gradient vanishes (the specification's section 11.4)",
        "The discriminator wins every time",
        "noise its inputs more, give it fewer or smaller updates (critic_learning_rate) or an R1 penalty",
        symptoms.discriminator_strong,
    ),
    Rule(
        "fake score lagging",
        ("fake_error", "teacher_fake_error"),
        symptoms.LAGS,
        "it must be at most 1 (section 11.3 of the specification), and above 1.05 something is to be done",
        "The fake score does not keep up with the student",
        "give it more updates per step of the student, a higher critic_learning_rate or a higher rank",
        symptoms.fake_lags,
    ),
    Rule(
        "learning rate too low",
        ("learning_rate",),
        2e-3,
        "weights are of the order 0.02 to 0.1; published runs could move them by 0.01 or more",
        "Next to nothing can be learnt at this rate in so few steps",
        "raise training.learning_rate (LoRA: 1e-4 to 2e-3, all weights: 1e-6 to 1e-5), or train longer",
        symptoms.rate_too_low,
    ),
    Rule(
        "saturation of the teacher",
        ("teacher_saturation",),
        symptoms.TEACHER_SATURATED,
        "beyond 1.5 times what 0.5 % of the data exceed: on scenes-64 0.05 % of them at guidance 3, 2.3 % at 20",
        "The teacher's own answers are symptoms.saturated, and the student learns them",
        "lower method.guidance_scale; if it is low, check the teacher's prediction_type and the latents' scaling",
        symptoms.teacher_saturated,
    ),
    Rule(
        "diverging",
        ("loss", "grad_norm"),
        3.0,
        "three times the loss, or thirty times the gradient, of the run's first third is no noise",
        "Training diverges",
        "lower training.learning_rate, or let the target trail by an average (target_decay 0.95)",
        symptoms.loss_rises,
    ),
    Rule(
        "saturation",
        ("saturation",),
        symptoms.SATURATED,
        "the range is 1.5 times what 0.5 % of the data exceed; of scenes-64's students 0.05 % lie beyond",
        "The student's answers are saturated",
        "lower the teacher's guidance_scale, and check the scale of answers and of latents",
        symptoms.saturated,
    ),
    Rule(
        "drift of the mean",
        ("mean_shift",),
        0.5,
        "half a standard deviation in every channel; students that work stay below 0.1, small GANs below 0.4",
        "The answers' mean has drifted away from the data's",
        "look for a biased target or teacher, a fake score that lags, or batches too small",
        symptoms.drift,
    ),
    Rule(
        "lost diversity",
        ("x0_spread", "data_spread"),
        0.5,
        "half the data's spread is a quarter of its variance; students that work keep 0.75 and more",
        "The student has lost diversity",
        "weigh the adversary or the fake score more, the distillation loss and guidance_scale less",
        symptoms.diversity_lost,
    ),
    Rule(
        "reward hacking",
        ("held_out_mean", "held_out_std"),
        0.25,
        "a quarter of what pictures differ by: what people like, a judge that nobody trained on likes too",
        "The student pleases the rewards that it is trained on, and not the one that is held out",
        "train shorter, lower the thresholds or the rank, raise method.perceptual_weight or method.anchor_weight, or "
        "merge it with a smaller scale",
        symptoms.reward_hacked,
    ),
    Rule(
        "vanishing gradients",
        ("grad_norm",),
        1e-3,
        "a thousandth of the first third's: nothing reaches the weights any more",
        "Gradients have vanished",
        "look for a loss that is saturated or detached",
        symptoms.gradients_vanish,
    ),
    Rule(
        "oscillation",
        ("x0_mean", "data_mean", "data_std"),
        0.4,
        "the brightness of whole batches: students that work stay below 0.1, small GANs that settle below 0.35",
        "The student oscillates",
        "give the critic more updates per step of the student, or lower the student's rate",
        symptoms.oscillates,
    ),
    Rule(
        "loss not falling",
        ("loss",),
        0.03,
        "a fall of 3 % would have been seen, with 97.5 % certainty",
        "The student learns nothing that its loss sees",
        "raise training.learning_rate or max_grad_norm, and check that the loss reaches the student's weights",
        symptoms.loss_flat,
    ),
    Rule(
        "average far behind",
        ("ema_decay",),
        0.5,
        "more than half of what is exported would be the untrained student",
        "The student's average has hardly moved",
        "lower training.ema_decay, or train longer",
        symptoms.average_behind,
    ),
    Rule(
        "always clipped",
        ("clipped",),
        0.95,
        "with AdamW this costs little: it sees only the gradient's direction",
        "Nearly every gradient was clipped",
        "raise training.max_grad_norm if single batches should count by their size",
        symptoms.always_clipped,
        fatal=False,
    ),
    Rule(
        "unfinished",
        ("steps",),
        0.0,
        "the recipe's number of steps",
        "The run is not finished",
        "go on with fewstep distill ... --resume, unless it is running now",
        symptoms.unfinished,
        fatal=False,
    ),
)
