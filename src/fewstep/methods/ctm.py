"""Consistency trajectory models: CTM (Kim et al. 2024, arXiv 2310.02279).

The student jumps from any time to any earlier one: it is conditioned on the end s, and its jump G(x, t, s) has its
prediction g of clean data where the teacher's DDIM step has D(x, t). So G(x, t, t) = x, and g(x, t, t) = D(x, t) is the
ordinary denoiser. Each step, t, u and s lie on a grid of N solver steps, s <= u < t:

    x_u = h solver steps of the teacher from t to u       h ~ 1 ... H in proportion to h, one for the whole batch
    a = G_target( G_student(x_t, t, s), s, end )           the gradient goes through the outer map, not into its weights
    b = stop_gradient G_target( G_student(x_u, u, s), s, end )
    loss = d(a, b) + weight |g_student(x', t', t') - x0|^2           x' is x0 noised to t', training the diagonal

This is soft consistency (eq. 9): both jumps are carried to the grid's end and compared there, in data space. The
weight is adaptive (sec. 3.3): both terms have gradients of one norm at the student's last weight. A GAN on a
against data (sec. 3.4) is weighted the same way.

On other schedules than the paper's, G(x, t, s) = (sigma_s/sigma_t) x + (alpha_s - alpha_t sigma_s/sigma_t) g: the jump
of `Prediction`, in any prediction kind. TCD learns the same map, and tells its student no s.

Choices where paper and released code differ, or do not go: b's inner jump is the live student's, as in the code. New
inputs start at zero (there: at random), so the student starts as the teacher. Behind a guided teacher the diagonal
learns the guided x0: data would teach the unguided one, which contradicts the first term. The discriminator is heads
on the teacher's features of noised images (there: image encoders on clean ones). LPIPS is not offered.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fewstep.diffusion.schedule import Array, Schedule
from fewstep.methods import Balanced, Batch, Loss, Method, Player, Progress, Rng, RoleSpec
from fewstep.methods.guidance import OFF, Guidance
from fewstep.methods.parts.discriminators import Discriminator, generator_loss
from fewstep.methods.parts.distances import Distance, distance, with_gradient
from fewstep.methods.parts.solver_step import Solver, SolverStep, choose_solver, solve_along
from fewstep.methods.parts.statistics import student_statistics
from fewstep.methods.settings import Count, GuidanceScale, Weight, checked
from fewstep.models.cond import Cond
from fewstep.models.roles import Roles
from fewstep.sampling.samplers import renoise

LOG_MEAN, LOG_STD, TOP = -1.2, 1.2, 0.7  # where the diagonal is trained: EDM's levels, and the grid's upper 70 %


@dataclass
class Draws:
    """Random numbers of one CTM step.

    Attributes:
        num_steps: h, the teacher's solver steps; the same in every row, micro-batch and process.
        index: [B] int64: t = grid[index], u = grid[index - h].
        end_index: [B] int64, s = grid[end_index], uniform over 0 ... index - h (s = u included).
        noise: [B, ...] unit normal.
        guidance_scale: [B] float64, the teacher's scale w (1 = off).
        diagonal: [B] float64 on the host, the times t' at which the diagonal is trained.
        diagonal_noise: [B, ...] unit normal.
        judged: [B] int64, at which grid time a and data are judged; None without adversarial loss, like
        fake_noise, real_noise: [B, ...] unit normals that noise a and data.
        playing: whether the student plays already (adversarial_start).
    """

    num_steps: int
    index: Tensor
    end_index: Tensor
    noise: Tensor
    guidance_scale: Tensor
    diagonal: Tensor
    diagonal_noise: Tensor
    judged: Tensor | None
    fake_noise: Tensor | None
    real_noise: Tensor | None
    playing: bool


@dataclass
class Shared(SolverStep):
    """The teacher's solver trajectory from t to u; s [B] (host); x_s, and both estimates at the grid's end.

    ``x_s`` has the student's graph, ``x_s_leaf`` is the same state as a leaf, from which ``x_est`` (a) has a graph;
    ``target`` (b) has none. ``fake`` and ``real`` are the teacher's features of a and data, noised; None without GAN.
    """

    s: Tensor
    x_s: Tensor
    x_s_leaf: Tensor
    x_est: Tensor
    target: Tensor
    fake: list[Tensor] | None = None
    real: list[Tensor] | None = None


class CTM(Method):
    """CTM without its GAN (the default) or with it (adversarial_weight)."""

    name = "ctm"
    summary = "Consistency trajectories: jumps from any time to any earlier one, which is an input; a GAN on request."
    players: tuple[Player, ...] = (Player("student"), Player("discriminator"))
    sampler = "ctm"
    truth_settings: ClassVar[dict[str, Any]] = {"num_grid_steps": 8, "max_hops": 4}

    @checked
    class Settings:
        """Settings of CTM.

        Attributes:
            num_grid_steps: N, solver steps of the training grid; the paper's 18 points (CIFAR-10) are 17 steps.
            max_hops: H, the teacher's most solver steps; (2 H + 1) / 3 in the mean, one or two calls each.
                The paper: all of the grid (CIFAR-10), 10 to 39 in the scripts for ImageNet-64.
            solver: "heun", two calls a solver step, "ddim", one. None: heun on EDM schedules, ddim elsewhere.
            guidance_scale: of the teacher (1 = off: the paper), one number or [low, high], as in LCM.
            loss: "l2", "huber" or "sample-huber", with huber_c, of a and b.
            denoising_weight: times the adaptive weight of the diagonal; 0 leaves it untrained: it drifts.
            adversarial_weight: times the adaptive weight of the GAN; 0 leaves the discriminator out.
            adversarial_start: the step from which the student plays; the discriminator learns from the first.
            target_decay: EMA decay of the target; 0 uses the student's own weights (the paper: 0.999).
        """

        num_grid_steps: Count = 40
        max_hops: Count = 10
        solver: Solver | None = None
        guidance_scale: GuidanceScale = 1.0
        loss: Distance = "l2"
        huber_c: float = 1e-3
        denoising_weight: Weight = 1.0
        adversarial_weight: Weight = 0.0
        adversarial_start: int = 0
        target_decay: float = 0.0

    settings: Settings

    def __init__(self, schedule: Schedule, settings: Settings | None = None, **overrides: Any) -> None:
        super().__init__(schedule, settings, **overrides)
        settings = self.settings
        self.grid = torch.from_numpy(np.unique(schedule.training_grid(settings.num_grid_steps)))
        self.end = float(self.grid[0])
        self.guidance = Guidance.of(settings.guidance_scale)
        self.guided = self.guidance != OFF
        self.solver = choose_solver(settings.solver, schedule)
        if settings.max_hops >= len(self.grid):
            raise ValueError(
                f"max_hops must lie in 1 ... {len(self.grid) - 1}, the grid's solver steps, not {settings.max_hops}."
            )
        self.gan: Discriminator | None = Discriminator("hinge") if settings.adversarial_weight else None
        if self.gan is None:
            self.players = (Player("student"),)

    def roles(self) -> tuple[RoleSpec, ...]:
        decay = self.settings.target_decay
        return RoleSpec("student", ("end",)), RoleSpec("target", follows="student", decay=decay)

    def draw(self, batch: Batch, rng: Rng, progress: Progress) -> Draws:
        shape, last = batch.x0.shape[1:], len(self.grid) - 1
        num_steps = 1 + rng.shared.choice("hops", range(1, self.settings.max_hops + 1))
        index = rng.sample.integers("index", num_steps, last + 1)
        return Draws(
            num_steps=num_steps,
            index=index,
            end_index=(rng.sample.uniform("end") * (index - num_steps + 1)).to(torch.int64),
            noise=rng.sample.normal("noise", shape),
            guidance_scale=self.guidance.draw(rng),
            diagonal=self._diagonal_times(rng),
            diagonal_noise=rng.sample.normal("diagonal_noise", shape),
            judged=rng.sample.integers("judged", 1, last + 1) if self.gan else None,
            fake_noise=rng.sample.normal("fake_noise", shape) if self.gan else None,
            real_noise=rng.sample.normal("real_noise", shape) if self.gan else None,
            playing=progress.step >= self.settings.adversarial_start,
        )

    def prepare(self, roles: Roles, batch: Batch, draws: Draws, due: Collection[str]) -> Shared:
        times = [self.grid[draws.index - k] for k in range(draws.num_steps + 1)]
        scale = self.guidance.scale(draws.guidance_scale)
        step = solve_along(roles, self.schedule, batch, draws.noise, times, scale, self.solver)
        s = self.grid[draws.end_index]
        x_s = roles.student(step.x_t, step.t, batch.cond, end=s).at(s)
        x_s_leaf = x_s.detach().requires_grad_()
        x_est = self._to_end(roles, x_s_leaf, s, batch.cond)
        with torch.no_grad():
            below = roles.student(step.x_u, step.u, batch.cond, end=s).at(s)
            target = self._to_end(roles, below, s, batch.cond)
        shared = Shared(**vars(step), s=s, x_s=x_s, x_s_leaf=x_s_leaf, x_est=x_est, target=target)
        if self.gan and draws.judged is not None:
            assert draws.fake_noise is not None and draws.real_noise is not None
            tau = self.grid[draws.judged]
            fake = renoise(self.schedule, x_est, self.end, tau, draws.fake_noise)
            shared.fake = self.gan.features(roles, fake, tau, batch.cond)
            with torch.no_grad():
                real = self.schedule.add_noise(batch.x0, draws.real_noise, tau)
                shared.real = self.gan.features(roles, real, tau, batch.cond)
        return shared

    def student(self, roles: Roles, batch: Batch, draws: Draws, shared: Shared) -> Loss:
        settings = self.settings
        loss = distance(shared.x_est, shared.target, settings.loss, settings.huber_c)
        parts, balanced = {"consistency": loss.detach()}, {}
        if settings.denoising_weight:
            denoising = self._denoising(roles, batch, draws)
            parts["denoising"] = denoising.detach()
            balanced["denoising"] = Balanced(denoising, settings.denoising_weight)
        if self.gan and shared.fake is not None and draws.playing:
            adversarial = generator_loss(self.gan.logits(roles, shared.fake), self.gan.loss)
            parts["adversarial"] = adversarial.detach()
            grad = self._through_x_s(adversarial, shared)
            balanced["adversarial"] = Balanced(grad, settings.adversarial_weight, low=0.01, high=10.0)
        total = self._through_x_s(loss, shared)
        stats = student_statistics(shared.x_est.detach(), batch.x0, shared.teacher_x0)
        return Loss(total, parts, stats, balanced)

    def discriminator(self, roles: Roles, batch: Batch, draws: Draws, shared: Shared) -> Loss:
        assert self.gan is not None
        return self.gan.player_loss(roles, shared.real, shared.fake)

    def calls(self, draws: Draws) -> dict[str, float]:
        return self._calls(draws.num_steps)

    def calls_per_step(self) -> dict[str, float]:
        return self._calls((2 * self.settings.max_hops + 1) / 3)  # the mean of h ~ 1 ... H in proportion to h

    def _calls(self, num_steps: float) -> dict[str, float]:
        diagonal = self.settings.denoising_weight > 0
        teacher = num_steps * (2 if self.solver == "heun" else 1)
        teacher += (2 if self.gan else 0) + (1 if diagonal and self.guided else 0)
        return {"student": 3 if diagonal else 2, "teacher": teacher, "target": 2}

    def _to_end(self, roles: Roles, x: Tensor, s: Tensor, cond: Cond | None) -> Tensor:
        """The target's jump from s on to the grid's end, where both sides are compared; x itself where s is the end."""
        return roles.target(x, s, cond, end=self.end).at(self.end)

    def _through_x_s(self, loss: Tensor, shared: Shared) -> Tensor:
        """``loss``, a function of x_s, with a graph that leads to the student's jump there and nowhere else.

        The outer map's weights may be the student's own: the gradient passes through it to its input only.
        """
        (grad,) = torch.autograd.grad(loss, shared.x_s_leaf, retain_graph=self.gan is not None)
        return with_gradient(loss, shared.x_s, grad)

    def _denoising(self, roles: Roles, batch: Batch, draws: Draws) -> Tensor:
        """Denoising score matching at s = t, EDM's weight: data of standard deviation 0.5 there, 1 elsewhere."""
        t = draws.diagonal
        with torch.no_grad():
            x, wanted = self.schedule.add_noise(batch.x0, draws.diagonal_noise, t), batch.x0
            if self.guided:
                scale = self.guidance.scale(draws.guidance_scale)
                wanted = roles.teacher(x, t, batch.cond, guidance_scale=scale).x0
        pred = roles.student(x, t, batch.cond, end=t).x0
        return distance(pred, wanted, "l2", weight=self._denoising_weight(t))

    def _denoising_weight(self, t: Tensor) -> Array:
        (alpha, sigma), data = self.schedule.alpha_sigma(t), 0.5 if self.schedule.family == "edm" else 1.0
        return np.asarray(((alpha * data) ** 2 + sigma**2) / (sigma * data) ** 2)

    def _diagonal_times(self, rng: Rng) -> Tensor:
        """Half of them by EDM's levels (elsewhere: even over the grid), half even over the upper 70 % of the grid.

        VP times are whole. Flow times keep one table step from clean data, where the weight has no bound.
        """
        height, half = rng.sample.uniform("diagonal"), rng.sample.uniform("half") < 0.5
        upper = self._time_at(1 - TOP * height)
        if self.schedule.family != "edm":
            return torch.where(half, self._time_at(height), upper)
        level = torch.exp(LOG_MEAN + LOG_STD * torch.special.ndtri(height))
        return torch.where(half, level.clamp(self.grid[0], self.grid[-1]), upper)

    def _time_at(self, height: Tensor) -> Tensor:
        """Times [B] at ``height`` of the grid, 0 its end and 1 its start."""
        num_steps = len(self.grid) - 1
        times = torch.from_numpy(np.interp(height.numpy() * num_steps, np.arange(num_steps + 1), self.grid.numpy()))
        if self.schedule.family == "vp":
            return times.floor()
        return times.clamp_min(1 / self.schedule.num_train_timesteps) if self.schedule.family == "flow" else times
