"""What is said at the start of training about a schedule on which clean data cannot be read off at the first time."""

from __future__ import annotations

import torch

from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.well_posed import LARGEST, student_times
from fewstep.methods.base import Method
from fewstep.models.denoiser import Denoiser


def first_time_remark(method: Method, student: Denoiser) -> str:
    """A sentence that names the first time, what an error weighs there and what to do; empty where all is well."""
    schedule, times = method.schedule, method.sampling(method.settings).timesteps
    if method.default_times:
        listed = ", ".join(f"{time:g}" for time in times)
        return (
            f"Noise is {schedule.noise_to_signal(schedule.start):,.0f} times the signal at this schedule's start, "
            f"{schedule.start:g}, too much to read clean data off one prediction, so the student starts at "
            f"{times[0]:g}, where it is {schedule.noise_to_signal(times[0]):.2g} times: sample it at timesteps "
            f"{listed}."
        )
    first = times[0] if times else schedule.start
    nothing = torch.zeros(1)
    weight = float(Prediction(nothing, nothing, first, schedule, student.prediction_type).gain())
    if weight <= LARGEST or not (method.chosen_start or method.reads_clean_data):
        return ""
    error = f"At {first:g} an error of the {student.prediction_type} prediction weighs {weight:,.0f} in clean data"
    if method.reads_clean_data:
        remedy = "if samples get worse, lower training.learning_rate or take pcm"
        return f"{error}, and is counted as {LARGEST:g} by the loss: {remedy}."
    left_out = student_times(schedule, 1) != ()
    remedy = f"leave method.{method.chosen_start} out" if left_out else f"lower method.{method.chosen_start}"
    return f"{error}, so that training may diverge: {remedy}, or lower training.learning_rate."
