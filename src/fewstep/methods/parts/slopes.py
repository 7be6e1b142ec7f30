"""Slopes of trajectories in coordinates in which a jump along a prediction is a straight line, on every schedule.

With z = x / (alpha + sigma) at the level tau = sigma / (alpha + sigma), x = alpha x0 + sigma eps becomes

    z = (1 - tau) x0 + tau eps,        dz/dtau = eps - x0,

which is rectified flow: on flow schedules z is x itself and tau is t. Unlike sigma/alpha, tau is finite at pure noise.
Slopes over several stretches of a trajectory are averaged in proportion to the stretches of tau.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedule import USUAL_STEPS, Array, Schedule, Time, expand
from fewstep.methods.parts.distances import bounded_gain


def level(schedule: Schedule, t: Time) -> Array:
    """tau = sigma / (alpha + sigma) at native time ``t`` (number or [B]): 0 at clean data, 1 at pure noise."""
    alpha, sigma = schedule.alpha_sigma(t)
    return np.asarray(sigma / (alpha + sigma))


def time_at_level(schedule: Schedule, tau: npt.ArrayLike) -> Array:
    """The native time of a level: the inverse of `level`, clamped to the table of VP schedules."""
    tau = np.asarray(tau, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return schedule.time_at(tau / (1 - tau))


def to_line(schedule: Schedule, x: Tensor, t: Time) -> Tensor:
    """z = x / (alpha + sigma) of the state x [B, ...] at ``t`` (number or [B])."""
    return expand(np.asarray(1 / np.add(*schedule.alpha_sigma(t))), x) * x


def from_line(schedule: Schedule, z: Tensor, t: Time) -> Tensor:
    """x = (alpha + sigma) z, the inverse of `to_line`."""
    return expand(np.asarray(np.add(*schedule.alpha_sigma(t))), z) * z


def time_at_height(schedule: Schedule, height: Tensor) -> Tensor:
    """Native times of heights [B] from 0, the schedule's end, to 1, its start, as training grids are spaced between.

    Uniform heights are uniform table indices of VP schedules, and shifted uniform times of flow schedules.
    """
    steps = min(USUAL_STEPS, schedule.num_train_timesteps)
    grid = schedule.training_grid(steps)
    return torch.from_numpy(np.interp(height.numpy(), np.linspace(0, 1, steps + 1), grid))


def slope_errors(prediction: Prediction, slope: Tensor) -> Tensor:
    """[B] mean squares of the prediction's eps - x0 against ``slope`` [B, ...].

    A network that predicts x0 is compared in x0: near clean data its slope would be its error over sigma. One that
    predicts noise has its error times 1 + sigma/alpha there, which `bounded_gain` bounds.
    """
    if prediction.prediction_type == "sample":
        mine, wanted = prediction.x0, Prediction(prediction.x, slope, prediction.t, prediction.schedule, "flow").x0
        return (mine - wanted).flatten(1).square().mean(1)
    errors = (prediction.flow - slope).flatten(1).square().mean(1)
    weight = bounded_gain(prediction.gain(-1.0, 1.0), "l2")
    return errors if weight is None else expand(weight, errors) * errors
