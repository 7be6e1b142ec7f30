"""Toy networks, and diffusers' schedulers as references: as shipped, or with their float32 replaced by float64."""

from __future__ import annotations

import importlib
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from fewstep.diffusion.schedule import Schedule
from fewstep.models.denoiser import Denoiser


def toy(x, t, cond=None, **extras):
    """A smooth, bounded network that depends on time, in the dtype it is given."""
    level = (torch.as_tensor(t).to(x.dtype).abs() + 1).log().reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(x * 0.8 + 0.1 * level) + 0.2 * torch.sin(3 * x) - 0.05 * level


class _Float64:
    """A module in which float32 means float64."""

    def __init__(self, module):
        self._module = module
        self.float32 = module.float64

    def __getattr__(self, name):
        return getattr(self._module, name)


@contextmanager
def in_float64(module):
    """A diffusers scheduler module with every float32 of its own replaced by float64."""
    before, default = (module.torch, module.np), torch.get_default_dtype()
    module.torch, module.np = _Float64(torch), _Float64(np)
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        module.torch, module.np = before
        torch.set_default_dtype(default)


class Reference:
    """A diffusers scheduler with injected noise.

    Args:
        file, name: of the scheduler class.
        config: its settings.
    """

    def __init__(self, file: str, name: str, **config):
        self.module = importlib.import_module(f"diffusers.schedulers.{file}")
        self.name, self.config = name, config

    def build(self):
        return getattr(self.module, self.name)(**self.config)

    def run(self, noise, noises, n=None, network=toy, per_step=None, times_are_flow=False, **set_timesteps):
        """The final sample and the network times, in the dtype of ``noise``."""
        if noise.dtype == torch.float64:
            with in_float64(self.module):
                return self._run(noise, noises, n, network, per_step or {}, times_are_flow, set_timesteps)
        return self._run(noise, noises, n, network, per_step or {}, times_are_flow, set_timesteps)

    def _run(self, noise, noises, n, network, per_step, times_are_flow, set_timesteps):
        scheduler = self.build()
        steps = {} if n is None else {"num_inference_steps": n}
        scheduler.set_timesteps(**steps, **set_timesteps)
        left, real = iter(noises), getattr(self.module, "randn_tensor", None)  # not every version of it adds noise
        self.module.randn_tensor = lambda *args, **kwargs: next(left).to(noise.dtype)
        try:
            x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
            for t in scheduler.timesteps:
                scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
                told = t / scheduler.config.num_train_timesteps if times_are_flow else t
                step = scheduler.step(network(scaled, told), t, x, **per_step)
                x = step.prev_sample
            return getattr(step, "denoised", x), scheduler.timesteps
        finally:
            self.module.randn_tensor = real

    def denoiser(self, prediction_type="epsilon", network=toy):
        """The same network on the schedule that fewstep reads from this scheduler's config."""
        return Denoiser(network, Schedule.from_diffusers(self.build()), prediction_type)


@pytest.fixture
def noise():
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@pytest.fixture
def noises():
    generator = torch.Generator().manual_seed(8)
    return [torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(9)]
