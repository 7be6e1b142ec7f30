"""Running a sampler: from noise to clean data, every state kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedule import Array, Schedule, expand, working
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.sampling.samplers import Sampler, Step

Generators: TypeAlias = "torch.Generator | Sequence[torch.Generator]"


@dataclass
class Trajectory:
    """A sampling run.

    Attributes:
        x0: the last state, [B, ...].
        states: all n + 1 in the schedule's own coordinates, the start first, x0 last; a VP state multiplied by
            sqrt(1 + (sigma/alpha)^2) is that of diffusers' Euler schedulers.
        timesteps: [n] float64, the native times of the network's calls.
    """

    x0: Tensor
    states: list[Tensor]
    timesteps: Tensor


@dataclass
class Kept:
    """Inpainting: outside the mask a state is the image, noised to the state's time by one noise.

    Attributes:
        image: clean data [B, ...]. mask: broadcasts over it; 1 is sampled anew, 0 is kept. noise: unit normal [B, ...].
    """

    image: Tensor
    mask: Tensor
    noise: Tensor

    def __call__(self, schedule: Schedule, x: Tensor, time: float, last: bool) -> Tensor:
        known = self.image if last else schedule.add_noise(self.image, self.noise, time)
        return (1 - self.mask) * known.to(x.dtype) + self.mask * x


class _Draws:
    """Unit normals: the caller's own, in order, or new ones."""

    def __init__(
        self, noises: Sequence[Tensor] | None, generator: Generators | None, like: Tensor,
        lay_out: Callable[[Tensor], Tensor],
    ) -> None:  # fmt: skip
        self.noises, self.generator, self.like, self.lay_out, self.used = noises, generator, like, lay_out, 0

    def __call__(self) -> Tensor:
        like = self.like
        if self.noises is None:
            return self.lay_out(unit_normal(like.shape, self.generator, like.dtype, like.device))
        if self.used == len(self.noises):
            raise ValueError(f"The sampler needs more than the {len(self.noises)} noises it was given.")
        noise = self.noises[self.used].to(device=like.device, dtype=like.dtype)
        if noise.shape != like.shape:
            raise ValueError(f"noises[{self.used}] has shape {tuple(noise.shape)}, the state {tuple(like.shape)}.")
        self.used += 1
        return noise


def unit_normal(
    shape: Sequence[int], generator: Generators | None, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """Unit normals [B, ...] on ``device``, each row by its own generator where there are several."""
    if generator is None or isinstance(generator, torch.Generator):
        here = device if generator is None else generator.device
        return torch.randn(*shape, generator=generator, dtype=dtype, device=here).to(device)
    return torch.cat([unit_normal((1, *shape[1:]), one, dtype, device) for one in generator])


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    sampler: Sampler,
    noise: Tensor,
    cond: Cond | None = None,
    guidance_scale: float | Tensor = 1.0,
    noises: Sequence[Tensor] | None = None,
    start: Literal["unit", "table"] = "unit",
    *,
    image: Tensor | None = None,
    mask: Tensor | None = None,
    guidance_embed: float | Tensor | None = None,
    generator: Generators | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Trajectory:
    """Sample from ``denoiser``.

    Args:
        noise: [B, ...] unit normal; float64 stays float64, anything lower becomes float32.
        guidance_scale: classifier-free guidance, number or [B]; 1 is off.
        noises: unit normals [B, ...] that replace the sampler's own draws, in order.
        start: "unit" starts from the noise itself, "table" from sigma times it, 0.9977 on Stable Diffusion's table, as
            diffusers' Euler schedulers do. On EDM schedules both are sigma times the noise.
        image: clean data [B, ...] to start from, noised to the sampler's first time (its ``strength``).
        mask: where the image is sampled anew (1); where it is 0 it is kept, at every step. Broadcasts over the image.
        guidance_embed: scale for the network's guidance-scale embedding, where it has one (1 is off).
        generator: of the sampler's draws, or one for each row of the batch; torch's global one when None.
        callback: called with the number of steps done and the state.

    Raises:
        ValueError: one sentence, for a grid, start or noise that does not fit.
    """
    schedule = denoiser.schedule
    times = sampler.times(schedule)
    if image is None and (sampler.strength < 1 or mask is not None):
        raise ValueError("A strength below 1 and a mask need an image to start from.")
    if image is None or (mask is not None and sampler.strength == 1):  # nothing of the image is left
        x = first_state(schedule, working(noise), float(times[0]), start)
    else:
        x = schedule.add_noise(image.to(noise), noise, float(times[0]))
    keep = None if mask is None or image is None else Kept(image.to(x), mask.to(x), noise.to(x))
    draw = _Draws(noises, generator, x, denoiser.lay_out)
    states = walk(denoiser, sampler, x, times, draw, cond, guidance_scale, guidance_embed, callback, keep)
    return Trajectory(states[-1], states, torch.from_numpy(times[:-1].copy()))


def walk(
    denoiser: Denoiser,
    sampler: Sampler,
    x: Tensor,
    times: Array,
    draw: Callable[[], Tensor],
    cond: Cond | None = None,
    guidance_scale: float | Tensor = 1.0,
    guidance_embed: float | Tensor | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
    keep: Kept | None = None,
    until: int | None = None,
) -> list[Tensor]:
    """Take a state x from times[0] down to times[-1], or the first ``until`` steps; returns all states, x first."""
    schedule, conditioned = denoiser.schedule, "end" in denoiser.accepts
    embed = guidance_embed if "guidance_embed" in denoiser.accepts else None
    states, before = [x], None
    for i, (time, next_time) in enumerate(list(pairwise(times.tolist()))[:until]):
        last = i == len(times) - 2
        # No training ends below this end: where a sampler goes on to clean data, the network is asked for the jump to
        # that end, and its prediction is carried further.
        end = max(sampler.end(schedule, time, next_time, last), denoiser.lowest_end) if conditioned else None

        def ask(x: Tensor, t: float, end: float | None = end) -> Prediction:
            return denoiser(x, t, cond, guidance_scale, end=end, guidance_embed=embed)

        prediction = ask(states[-1], time)
        x = sampler.step(Step(prediction, time, next_time, last, draw, ask, before))
        states.append(x if keep is None else keep(schedule, x, next_time, last))
        if sampler.multistep:
            before = (time, prediction.x0)
        if callback is not None:
            callback(i + 1, states[-1])
    return states


def first_state(schedule: Schedule, noise: Tensor, time: float, start: str = "unit") -> Tensor:
    """The state at ``time`` from which sampling starts, ``start`` as in `sample`."""
    if start not in ("unit", "table"):
        raise ValueError(f"Unknown start '{start}': use unit or table.")
    if start == "unit" and schedule.family != "edm":
        return noise
    return expand(schedule.alpha_sigma(time)[1], noise) * noise
