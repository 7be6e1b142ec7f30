"""Where a student can read clean data off one prediction: the first time on tables that end far below the signal.

An error of a noise prediction weighs sigma / alpha in clean data. Stable Diffusion's table ends at 14.6, DDPM's (betas
1e-4 ... 0.02) at 157, a cosine table above 10,000. A teacher's solver takes a short step there; a student of a few
steps reads clean data, and at 157 one update of a usual size moves these by more than their own scale.

So few-step students that predict noise start at the noisiest index of a table where sigma / alpha is at most
`LARGEST`, from unit noise, as those of Stable Diffusion do (its alpha is 0.068 there). For networks that predict v, x0
or flow no time is ill-posed, on whatever table (`Schedule.for_network` says which they are).
"""

from __future__ import annotations

import numpy as np

from fewstep.diffusion.schedule import Schedule

LARGEST = 15.0
"""How much an error of a prediction may weigh in clean data: just above the end of Stable Diffusion's table."""


def first_time(schedule: Schedule) -> float:
    """The native time at which a few-step student starts: `Schedule.start`, or a later one on an ill-posed table."""
    noise = schedule.prediction_type == "epsilon" and schedule.family == "vp"
    if not noise or schedule.alphas_cumprod[-1] == 0:
        return schedule.start
    index = np.arange(schedule.num_train_timesteps, dtype=np.float64)
    usable = index[schedule.noise_to_signal(index) <= LARGEST]
    return float(usable[-1]) if len(usable) else schedule.start


def student_times(schedule: Schedule, num_inference_steps: int) -> tuple[float, ...]:
    """The trailing grid of a student that does not start at the schedule's start; empty where it does.

    As the schedule's own, ``round(k T / n) - 1`` for k = n ... 1, of a table that ends at `first_time`.
    """
    first, n = first_time(schedule), num_inference_steps
    if first == schedule.start or n > first + 1:
        return ()
    return tuple((np.round(np.arange(n, 0, -1) * (first + 1) / n) - 1).tolist())
