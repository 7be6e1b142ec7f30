"""The exact fixed points of the losses of CM, LCM, CTM, TCD, PCM and Hyper-SD, for closed-form teachers.

A consistency loss ties the student at grid time t to itself at the state that one step of the teacher's solver
reaches, one grid time below.
Followed down the grid, that is a recursion along the teacher's solver trajectory. So the fixed point at a state costs
one walk down the grid, without table or interpolation, in any dimension, guided or not. A trained network differs from
it by optimisation; it differs from the exact flow map by the method itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.diffusion.consistency import coefficients
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Array, Schedule, Time, expand, host
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.sampling.solvers import Solver, solve

# CT's tables: half width in standard deviations, points; nodes of the Gauss-Hermite rule.
REACH, POINTS, NODES = 10.0, 2001, 24


class FixedPoint:
    """A "sample" network known at the times of a training grid; the base of those below.

    Args:
        teacher: exact or not.
        grid: [N + 1] increasing native times, the schedule's end first (`Schedule.training_grid`).
        guidance_scale: of the teacher, 1.0 is off.
        solver: of its step from one grid time to the next below.
    """

    def __init__(
        self, teacher: Denoiser, grid: Sequence[float] | Array, guidance_scale: float = 1.0, solver: Solver = "ddim"
    ) -> None:
        self.teacher, self.guidance_scale, self.solver = teacher, guidance_scale, solver
        self.grid = np.unique(host(grid))  # type: ignore[arg-type]  # one step per table index gives index 0 twice

    def denoiser(self) -> Denoiser:
        """The fixed point as a student: ``.denoiser()(x, t).at(s)`` jumps to s."""
        return Denoiser(self, self.teacher.schedule, "sample")

    def __call__(self, x: Tensor, t: Time, cond: Cond | None = None, **extras: Any) -> Tensor:
        """The predicted clean data [B, ...] at x [B, ...] and grid times ``t`` (number or [B]).

        Raises:
            ValueError: for a time that is not on the grid.
        """
        rows = np.broadcast_to(self._rows(t), (x.shape[0],))
        x0 = torch.empty_like(x)
        for row in np.unique(rows):
            here = torch.from_numpy(rows == row)
            x0[here] = self._at(int(row), x[here], None if cond is None else cond[here])
        return x0

    def _at(self, n: int, x: Tensor, cond: Cond | None) -> Tensor:
        raise NotImplementedError

    def _down(self, n: int, end: int, x: Tensor, cond: Cond | None) -> list[Tensor]:
        """The teacher's states at the grid's times n, n - 1, ..., ``end`` from x at n."""
        states = [x]
        for m in range(n, end, -1):
            times = self.grid[[m, m - 1]]
            states.append(solve(self.teacher, states[-1], times, cond, self.guidance_scale, self.solver))
        return states

    def _teacher_x0(self, n: int, x: Tensor, cond: Cond | None) -> Tensor:
        return self.teacher(x, float(self.grid[n]), cond, self.guidance_scale).x0

    def _x0_of_jump(self, n: int, end: int, x: Tensor, x_s: Tensor) -> Tensor:
        """The x0 at x, grid time n, whose jump to grid time ``end`` is x_s."""
        (alpha_t, alpha), (sigma_t, sigma) = (c[[n, end]] for c in self.teacher.schedule.alpha_sigma(self.grid))
        of_x = sigma / sigma_t  # the jump is of_x x + (alpha - alpha_t of_x) x0
        return (x_s - float(of_x) * x) / float(alpha - alpha_t * of_x)

    def _rows(self, t: Time) -> np.ndarray[Any, np.dtype[np.int64]]:
        times = np.atleast_1d(host(t))
        row = np.abs(self.grid[None] - times[:, None]).argmin(axis=1)
        wrong = np.abs(self.grid[row] - times) > 1e-6 * np.abs(self.grid).max()  # float32 times must find their row
        if wrong.any():
            raise ValueError(f"Time {times[wrong][0]:g} is not on the grid of {len(self.grid)} times.")
        return row


class LCMFixedPoint(FixedPoint):
    """LCM's and, by Heun's solver, CD's: the consistency function equals the teacher composed down to the grid's end.

    For CD see Song et al. 2023, theorem 1.
    """

    def _at(self, n: int, x: Tensor, cond: Cond | None) -> Tensor:
        if n == 0:
            return self._teacher_x0(0, x, cond)  # the consistency function ignores it: f(x, end) = x
        return self._clean(n, x, self._down(n, 0, x, cond)[-1])

    def _clean(self, n: int, x: Tensor, value: Tensor) -> Tensor:
        """The x0 at x, grid time n, with which the consistency function equals ``value`` there."""
        skip, out = coefficients(self.teacher.schedule, self.grid[n])
        return (value - expand(skip, x) * x) / expand(out, x)


class CTFixedPoint(LCMFixedPoint):
    """CT's under squared error, on an unconditional mixture in one dimension.

    x_t and x_u share data and noise, so x_u = (sigma_u / sigma_t) x_t + (alpha_u - alpha_t sigma_u / sigma_t) x0, and

        f(x, t) = E[f(x_u, u) | x_t = x]

    is a sum over the components, whose x0 given x is Gaussian: a Gauss-Hermite rule through a table of f at u, from one
    grid time to the next above. It is exact to 1e-7 of the data's spread. It differs from the teacher's solver: CT
    takes the mean of f over x0, the solver f at the mean of x0, and the two differ by half f'' times the variance.

    Raises:
        ValueError: for a mixture of more dimensions, or with classes.
    """

    def __init__(self, mixture: GaussianMixture, schedule: Schedule, grid: Sequence[float] | Array) -> None:
        if mixture.dim != 1 or mixture.num_classes:
            raise ValueError("CT's fixed point is known for mixtures in one dimension without classes.")
        super().__init__(Denoiser(mixture.network(schedule, "sample"), schedule, "sample"), grid)
        self.mixture = mixture
        self.alpha, self.sigma = schedule.alpha_sigma(self.grid)
        self.mean = float(mixture.weights @ mixture.means[:, 0])
        spread = mixture.components.variances[:, 0] + (mixture.means[:, 0] - self.mean) ** 2
        self.variance = float(mixture.weights @ spread)
        self.points = torch.linspace(-REACH, REACH, POINTS, dtype=torch.float64)
        nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
        self.nodes, self.node_weights = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
        self.tables = [self._states(0)]
        for n in range(1, len(self.grid)):
            self.tables.append(self._mean(n, self._states(n)))

    def _at(self, n: int, x: Tensor, cond: Cond | None) -> Tensor:
        if n == 0:
            return self._teacher_x0(0, x, cond)
        return self._clean(n, x, self._look_up(n, x.double()).to(x.dtype))

    def _states(self, n: int) -> Tensor:
        return self.alpha[n] * self.mean + self._scale(n) * self.points

    def _scale(self, n: int) -> float:
        return float(np.sqrt(self.alpha[n] ** 2 * self.variance + self.sigma[n] ** 2))

    def _mean(self, n: int, x: Tensor) -> Tensor:
        """E[f(x_u) | x_t = x] for x [B] at grid time n, u the time below."""
        alpha, sigma = float(self.alpha[n]), float(self.sigma[n])
        of_x = float(self.sigma[n - 1]) / sigma
        of_x0 = float(self.alpha[n - 1]) - alpha * of_x
        means, variances = self.mixture.means[:, 0], self.mixture.components.variances[:, 0]
        noised = alpha**2 * variances + sigma**2
        centre = means + alpha * variances / noised * (x[:, None] - alpha * means)
        x0 = centre[..., None] + (variances / noised).sqrt()[:, None] * sigma * self.nodes
        below = self._look_up(n - 1, of_x * x[:, None, None] + of_x0 * x0)
        chance = self.mixture.responsibilities(x, alpha, sigma)
        return torch.einsum("bk,bkj,j->b", chance, below, self.node_weights)

    def _look_up(self, n: int, x: Tensor) -> Tensor:
        """f(x) at grid time n by a cubic through the four nearest points of its table."""
        place = ((x - self.alpha[n] * self.mean) / self._scale(n) + REACH) * ((POINTS - 1) / (2 * REACH))
        first = (place.floor().long() - 1).clamp(0, POINTS - 4)
        p = place - first
        a, b, c, d = (self.tables[n][first + i] for i in range(4))
        outer = p * (p - 3) / 2
        return (p - 1) * (p - 2) * ((3 - p) * a + p * d) / 6 + outer * ((p - 2) * b - (p - 1) * c)


class TCDFixedPoint(FixedPoint):
    """TCD's TCF(1) under squared error, for end points s on which it is not conditioned, uniform on the grid below t.

    The target for s <= u is b = f(x_u, u, s), with x_u the state after the solver step (b = x_u for s = u). The
    student's x0 enters the jump to s with weight b_s = alpha_s - alpha_t sigma_s / sigma_t, so the minimiser is the
    mean of the secants x_t -> b with weights b_s^2.

    Args:
        ends: indices of the grid times that s may take, without those above u; None is all of them, (0,) is LCM's end.
        segments: number of Hyper-SD's segments (TSCD); s never lies below the segment of the solver step.

    With all of them, index 0 included and equally likely, the recursion gives the published-table figures of the
    1-D check: rms errors .312, .0866, .166, .0902, .0289 at s = 0, 239, 499, 739, 899 from t = 999 (50 steps).
    The paper's s = t_m with m >= 1 leaves index 0 out and would give .340 at s = 0 and .065 at s = 239.
    """

    def __init__(
        self,
        teacher: Denoiser,
        grid: Sequence[float] | Array,
        guidance_scale: float = 1.0,
        ends: Iterable[int] | None = None,
        segments: int = 1,
    ) -> None:
        super().__init__(teacher, grid, guidance_scale)
        self.stride = (len(self.grid) - 1) // segments
        self.ends = range(len(self.grid)) if ends is None else sorted(set(ends))

    def _at(self, n: int, x: Tensor, cond: Cond | None) -> Tensor:
        states = self._down(n, 0, x, cond)
        x0 = self._teacher_x0(0, states[-1], cond)
        alpha, sigma = self.teacher.schedule.alpha_sigma(self.grid)
        for m in range(1, n + 1):
            x_t, x_u = states[n - m], states[n - m + 1]
            floor = (m - 1) // self.stride * self.stride
            ends = np.array([s for s in self.ends if floor <= s < m], dtype=np.int64)
            if not len(ends):  # never trained on: still the teacher
                x0 = self._teacher_x0(m, x_t, cond)
                continue
            from_x_t = sigma[ends] / sigma[m]
            from_x_u = np.where(ends == m - 1, 1.0, sigma[ends] / (sigma[m - 1] or 1.0))  # sigma may be 0 at s = u
            of_mine, of_below = alpha[ends] - alpha[m] * from_x_t, alpha[ends] - alpha[m - 1] * from_x_u
            # target = from_x_u x_u + of_below x0_below (for s = u: 1 and 0); jump = from_x_t x_t + of_mine x0
            weight = of_mine / (of_mine**2).sum()
            x0 = float(weight @ of_below) * x0 + float(weight @ from_x_u) * x_u
            x0 = x0 - float(weight @ from_x_t) * x_t
        return x0


class PCMFixedPoint(FixedPoint):
    """PCM's: one jump from every grid time to the phase's lower edge, as the teacher composed down the grid.

    Args:
        edges: [M + 1] increasing times of the grid: the lower ends of M phases, then its last (`Schedule.phase_edges`).
    """

    def __init__(
        self,
        teacher: Denoiser,
        grid: Sequence[float] | Array,
        edges: Sequence[float] | Array,
        guidance_scale: float = 1.0,
    ) -> None:
        super().__init__(teacher, grid, guidance_scale)
        self.lower = self._rows(np.asarray(edges, dtype=np.float64)[:-1])

    def _at(self, n: int, x: Tensor, cond: Cond | None) -> Tensor:
        if n == 0:
            return self._teacher_x0(0, x, cond)  # no jump starts here
        edge = int(self.lower[self.lower < n].max())  # a time on an edge belongs to the phase below it
        return self._x0_of_jump(n, edge, x, self._down(n, edge, x, cond)[-1])


class CTMFixedPoint(FixedPoint):
    """CTM's: the teacher's solver composed from t down to the end s on which the student is conditioned; at s = t the
    teacher's own prediction.

    Soft consistency ties a jump to itself from any lower u of the same path: the fixed point is the same for every h.
    """

    accepts = frozenset({"end"})

    def __call__(self, x: Tensor, t: Time, cond: Cond | None = None, **extras: Any) -> Tensor:
        """Clean data [B, ...] whose jump from x [B, ...] leads to the composed teacher's state at ``end``.

        Raises:
            ValueError: for a time off the diagonal that is not on the grid, or an end above its time.
        """
        times, ends = (np.broadcast_to(np.atleast_1d(host(a)), len(x)) for a in (t, extras["end"]))
        x0 = torch.empty_like(x)
        for time, end in np.unique(np.stack([times, ends], axis=1), axis=0).tolist():
            here = torch.from_numpy((times == time) & (ends == end))
            x0[here] = self._to_end(time, end, x[here], None if cond is None else cond[here])
        return x0

    def _to_end(self, time: float, end: float, x: Tensor, cond: Cond | None) -> Tensor:
        if time == end:
            return self.teacher(x, time, cond, self.guidance_scale).x0
        start, last = int(self._rows(time)[0]), int(self._rows(end)[0])
        if start <= last:
            raise ValueError(f"A trajectory leads down: from {time:g} none leads to {end:g}.")
        return self._x0_of_jump(start, last, x, self._down(start, last, x, cond)[-1])


def compose(
    teacher: Denoiser, x: Tensor, times: Iterable[float], cond: Cond | None = None, guidance_scale: float = 1.0
) -> Tensor:
    """Jumps one after the other, from x at times[0] to times[-1]; one network call at every time but the last."""
    steps = [float(t) for t in times]
    for t, s in pairwise(steps):
        x = teacher(x, t, cond, guidance_scale).at(s)
    return x
