"""ComfyUI's settings for a student, found by laying ComfyUI's own noise levels beside the times of its sampler.

ComfyUI takes its levels from a table: sigma / alpha of the model's 1,000 indices, of every twentieth of them under the
node ModelSamplingDiscrete lcm, or a flow model's shifted k/1000 (ModelSamplingSD3, ModelSamplingAuraFlow) or k/10000
(ModelSamplingFlux). Its scheduler ``simple`` takes every (length / n)-th level from the top and then clean data. Where
these are not the student's levels, they are listed. `tests/export/test_comfyui.py` runs what is printed by ComfyUI's
formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fewstep.diffusion.schedule import Array, Schedule
from fewstep.export.header import only_for
from fewstep.models.families import Family, Teacher
from fewstep.sampling import Sampler
from fewstep.students.card import Card

_SAMPLING = {"epsilon": "", "v_prediction": "v_prediction", "sample": "x0"}  # of ModelSamplingDiscrete; eps is usual
_LCM = "ModelSamplingDiscrete lcm"
_STRIDE = 20  # indices between two levels of that node
_LATE = 100  # from this index up LCM's boundary scalings are 0 and 1, to 3e-7
_LEVELS = {"ModelSamplingSD3": 1000, "ModelSamplingAuraFlow": 1000, "ModelSamplingFlux": 10000}
_NEARLY_PURE = 4.8973451890853435e-08  # alpha^2 at the last index of ComfyUI's tables with zero terminal SNR


@dataclass(frozen=True)
class ComfyUI:
    """How a student is sampled in ComfyUI.

    Attributes:
        settings: sampler, scheduler or levels, nodes, a few words each; empty: nothing there samples so.
        remark: a sentence: why nothing samples so, or what differs nevertheless; empty: ComfyUI's states are ours.
    """

    settings: tuple[str, ...] = ()
    remark: str = ""


def usage_hint(card: Card, teacher: Teacher, sampler: Sampler, prediction: str) -> str:
    """ComfyUI's settings in one line, which programs show with the file.

    Args:
        prediction: prediction kind of the student's network.
    """
    pipeline, scale = teacher.pipeline, card.guidance_scale
    if card.target_times and not teacher.family.comfyui_time_lora:
        return "ComfyUI cannot run this student: it reads no weights of the layer that holds its target times."
    if teacher.guidance_embed is not None and not teacher.family.comfyui_embeds_guidance:
        return "ComfyUI cannot run this network: it has a guidance-scale embedding."
    found = comfyui(
        sampler, teacher.denoiser.schedule, prediction, type(teacher.family), dict(pipeline.scheduler.config),
        teacher.image_size,
    )  # fmt: skip
    if not found.settings:
        return found.remark
    nodes = []
    if scale > 1 and hasattr(teacher.denoiser.network, "guide"):
        own = "Not equal: ComfyUI guides by the plain rule, not by this model's own."
        found = ComfyUI(found.settings, f"{found.remark} {own}".strip())
    if scale > 1 and getattr(pipeline.config, "force_zeros_for_empty_prompt", False):
        nodes.append("ConditioningZeroOut for the negative prompt")
    if teacher.guidance_embed is not None:  # the network's own embedding, which ComfyUI sets at 3.5 without the node
        embedded = teacher.guidance_embed if card.guidance_embed is None else card.guidance_embed
        nodes.append(f"FluxGuidance {embedded:g}")
    nodes += [only_for(card).removeprefix(", ")] if card.target_times else []
    return hint(card.num_inference_steps, scale, found, nodes)


def forms_for_comfyui(to: str, card: Card, family: Family) -> str:
    """Which forms ComfyUI reads, where this one is none of them, as the end of a sentence."""
    if to == "heads" or (not family.comfyui_shift and not family.comfyui_betas):  # ComfyUI does not know its models
        return ""
    if card.target_times and not family.comfyui_time_lora:  # `usage_hint` says that it reads none
        return ""
    lora = ["--to kohya" if family.kohya_prefix else "--to lora"] if card.weights == "lora" else []
    if not family.comfyui_networks and to != "lora":
        return f" (ComfyUI reads {' and '.join(lora) or 'none of the exports of its full weights'}, not this one)"
    if to == "lora" and family.kohya_prefix:
        return " (ComfyUI reads --to kohya: of this file it finds a part of the layers)"
    if to == "diffusers":
        return f" (ComfyUI reads {' and '.join([*lora, '--to merged'])}, not this folder)"
    return ""


def hint(steps: int, guidance_scale: float, found: ComfyUI, nodes: Iterable[str] = ()) -> str:
    """The line of `usage_hint` from its parts; a guidance scale of 0 is off, as 1 is, which ComfyUI knows alone."""
    words = [f"{steps} step{'s' if steps != 1 else ''}", f"cfg {guidance_scale or 1:g}", *found.settings, *nodes]
    return ", ".join(words) + (f". {found.remark}" if found.remark else "")


def comfyui(
    sampler: Sampler, schedule: Schedule, prediction: str, family: type[Family], scheduler: Mapping[str, Any], size: int
) -> ComfyUI:
    """ComfyUI's settings for a sampler of ours.

    Args:
        prediction: prediction kind of the network. scheduler: config of the pipeline's scheduler.
        size: side of the images in pixels.
    """
    times = sampler.times(schedule)
    name = sampler.comfyui_sampler(schedule) or ("euler" if len(times) == 2 else "")  # one step draws no fresh noise
    if schedule.family == "flow" and family.comfyui_shift and schedule.num_train_timesteps == 1000:
        fixed = schedule.for_steps(len(times) - 1)
        return _flow(name, sampler, fixed, times, _shift_node(family, fixed, scheduler, size))
    if schedule.family == "vp" and family.comfyui_betas and _has_table(family.comfyui_betas, schedule):
        return _vp(name, sampler, schedule, times, prediction)
    if not family.comfyui_betas and not family.comfyui_shift:
        return ComfyUI(remark=f"No setting of ComfyUI is known here for {family.title}.")
    return ComfyUI(remark=f"ComfyUI has no setting for the noise schedule of this {family.title} model.")


def simple(length: int, n: int) -> list[int]:
    """The places in a table of ``length`` increasing levels that ComfyUI's scheduler ``simple`` takes."""
    return [length - 1 - int(i * (length / n)) for i in range(n)]


def _unlike(sampler: Sampler) -> str:
    """Why ComfyUI has no sampler like this one."""
    return "none of its samplers draws so much fresh noise" if sampler.fresh_noise else "none of its samplers steps so"


def _none(sampler: Sampler, why: str) -> ComfyUI:
    return ComfyUI(remark=f"No setting of ComfyUI samples like '{sampler.name}' here: {why}.")


def _listed(levels: Iterable[float]) -> str:
    return " ".join(["sigmas", *(f"{level:.8g}" for level in levels), "0"])


# ---------------------------------------------------------------- tables of betas


def _vp(name: str, sampler: Sampler, schedule: Schedule, times: Array, prediction: str) -> ComfyUI:
    called, last, zero_snr = times[:-1], times[-1], schedule.alphas_cumprod[-1] == 0
    if (called != called.round()).any():
        return _none(sampler, "ComfyUI rounds the times that a network is given")
    lcm_levels = [_STRIDE * (place + 1) - 1 for place in simple(schedule.num_train_timesteps // _STRIDE, len(called))]
    on_lcm = prediction == "epsilon" and called.tolist() == lcm_levels
    if sampler.comfyui_node and on_lcm and last == schedule.end:
        return ComfyUI((f"{sampler.comfyui_node} scheduler simple eta {sampler.fresh_noise:g}",))
    if not name:
        return _none(sampler, _unlike(sampler))
    if prediction not in _SAMPLING:
        return _none(sampler, f"it has no conversion of {prediction} with this table")
    kind = f"{_SAMPLING[prediction] or 'eps'} zsnr" if zero_snr else _SAMPLING[prediction]
    node = (f"ModelSamplingDiscrete {kind}",) if kind else ()
    late = called[-1] >= _LATE
    on_table = called.tolist() == simple(schedule.num_train_timesteps, len(called))
    of_lcm = sampler.boundary and prediction == "epsilon" and not ((called + 1) % _STRIDE).any()
    eta = (f"eta {sampler.fresh_noise:g}",) if name == "euler_ancestral" and sampler.fresh_noise != 1 else ()
    words = (f"sampler {name}", *eta)
    remark = _differences(schedule, times)
    if on_lcm and (sampler.boundary or (late and not on_table)):
        return ComfyUI((*words, "scheduler simple", _LCM), remark)
    if on_table and (late or not sampler.boundary):
        return ComfyUI((*words, "scheduler simple", *node), remark)
    if not of_lcm and sampler.boundary and not late:
        return _none(sampler, f"below index {_LATE} its boundary scalings need LCM's own levels")
    levels = [float(level) for level in schedule.noise_to_signal(called)]
    levels[0] = min(levels[0], math.sqrt(1 / _NEARLY_PURE - 1))
    return ComfyUI((*words, _listed(levels), *((_LCM,) if of_lcm else node)), remark)


def _differences(schedule: Schedule, times: Array) -> str:
    """A sentence for each way in which ComfyUI's run with these levels is not ours."""
    found, top = [], schedule.start
    if times[0] < top:
        share = float(schedule.alpha_sigma(times[0])[1])
        found.append(f"Not equal: ComfyUI multiplies the initial noise by {share:.4g} here, fewstep does not.")
    elif schedule.alphas_cumprod[-1] == 0:
        found.append("Not equal: ComfyUI begins at sigma 4519, this student at pure noise.")
    if times[-1] != schedule.clean:
        level = float(schedule.noise_to_signal(times[-1]))
        found.append(f"Not equal: ComfyUI ends at clean data, fewstep at sigma {level:.3g}.")
    return " ".join(found)


def _has_table(betas: tuple[str, float, float], schedule: Schedule) -> bool:
    """Whether a schedule is ComfyUI's table of these betas, as it stands or with zero terminal SNR."""
    kind, first, last = betas
    scaled = kind == "scaled_linear"
    table = Schedule.scaled_linear(first, last) if scaled else Schedule.from_betas(np.linspace(first, last, 1000))
    return schedule.num_train_timesteps == table.num_train_timesteps and any(
        np.allclose(schedule.alphas_cumprod, t.alphas_cumprod, rtol=1e-5, atol=0)
        for t in (table, table.zero_terminal_snr())
    )


# ---------------------------------------------------------------- flow


def _flow(name: str, sampler: Sampler, schedule: Schedule, times: Array, node: tuple[str, str]) -> ComfyUI:
    """Settings for a flow model; ``node`` sets its shift: its name and its words."""
    if not name:
        return _none(sampler, _unlike(sampler))
    called, length = times[:-1], _LEVELS[node[0]]
    laid = schedule.shifted((np.asarray(simple(length, len(called))) + 1) / length)
    even = np.allclose(called, laid, rtol=0, atol=1e-9)
    remark = ""
    if called[0] < 1:
        remark = f"Not equal: ComfyUI multiplies the initial noise by {called[0]:.4g} here, fewstep does not."
    return ComfyUI((f"sampler {name}", "scheduler simple" if even else _listed(called), " ".join(node)), remark)


def _shift_node(family: type[Family], schedule: Schedule, scheduler: Mapping[str, Any], size: int) -> tuple[str, str]:
    """The node that gives a model this schedule's shift: (name, what is set in it)."""
    if family.comfyui_shift != "ModelSamplingFlux":
        return family.comfyui_shift, f"shift {schedule.shift:.8g}"
    mu = math.log(schedule.shift)
    high, low = float(scheduler.get("max_shift", mu)), float(scheduler.get("base_shift", mu))
    if not math.isclose(_shift_in_comfyui(high, low, size), mu, rel_tol=1e-9, abs_tol=1e-12):
        high = low = mu
    return family.comfyui_shift, f"max_shift {high:.8g} base_shift {low:.8g} width {size} height {size}"


def _shift_in_comfyui(max_shift: float, base_shift: float, size: int) -> float:
    """mu of ComfyUI's node: linear in the image's tokens, base_shift at 256 of them and max_shift at 4096."""
    slope = (max_shift - base_shift) / (4096 - 256)
    return slope * (size * size / 256 - 256) + base_shift
