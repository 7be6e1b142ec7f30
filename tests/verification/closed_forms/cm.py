"""CT on one Gaussian: its fixed point is Euler's, at first order."""

from __future__ import annotations

from fewstep.diffusion.consistency import consistency
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule
from fewstep.verification.bench import Bench
from fewstep.verification.fixed_points import CTFixedPoint, compose
from fewstep.verification.report import Row
from fewstep.verification.sizes import rms


def rows(schedule: Schedule) -> list[Row]:
    """On one Gaussian f is linear: the mean of f is f of the mean, and CT's fixed point is Euler's, at first order."""
    mixture = GaussianMixture([1.0], [0.3], [0.5])
    gaussian = Bench(mixture, schedule)
    x, errors = gaussian.starts[0][:1024], []
    exact = gaussian.flow(x, schedule.start, schedule.end, None)
    for hops in (40, 80):
        grid = schedule.training_grid(hops)
        answer = consistency(CTFixedPoint(mixture, schedule, grid).denoiser()(x, schedule.start))
        errors.append(rms(answer - exact))
    apart = rms(answer - compose(gaussian.teacher, x, grid[::-1].tolist()))
    return [
        Row("conditional means of a Gaussian: distance to composed Euler steps", 0.0, apart, 1e-9),
        Row(
            "conditional means of a Gaussian on 40 / 80 solver steps: ratio of distances",
            2.0,
            errors[0] / errors[1],
            0.2,
        ),
    ]
