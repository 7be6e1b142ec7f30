"""Exact students of one-dimensional teachers: what LCM and TCD converge to, as tables, without any training.

Replace the network by a function tabulated at every time of the training grid, and a consistency method's fixed
point follows by backward recursion, from clean to noisy, in a second. What a trained network differs from its
table by is optimisation; what the table differs from the flow map by is the method itself.

The student is any network read by one jump, ``f(x, t, s) = alpha_s x0 + sigma_s eps`` (TCD's TCF(1), LCM for s =
end). Trained on random end points s it cannot see, its squared loss is least at a weighted mean of secants (see
`tcd_table`); no step size removes that bias.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Array, Schedule, Time, host
from fewstep.models.denoiser import Denoiser

POINTS = 1001
REACH = 8.0  # standard deviations beyond the outermost components; tables are linear from there on


class Table:
    """A one-dimensional student known at the times of a training grid; a "sample" network for `Denoiser`.

    Attributes:
        schedule: the forward process.
        times: [N + 1], increasing, `schedule.end` first.
        points: the x of every time, [N + 1, M], increasing: one set of points carried by the teacher's exact
            flow, dense where the flow map is steep.
        values: clean data said there, [N + 1, M].
    """

    def __init__(self, schedule: Schedule, times: Tensor, points: Tensor, values: Tensor) -> None:
        self.schedule, self.times, self.points, self.values = schedule, times, points, values

    def __call__(self, x: Tensor, t: Time, cond: Any = None, **extras: Any) -> Tensor:
        """Clean data at x ([B] or [B, 1]) and a grid time ``t`` (number or [B]), at least float32.

        Raises:
            ValueError: for a time that is not on the grid.
        """
        rows = self._rows(t)
        flat = x.reshape(-1).to(torch.float64)
        if rows.numel() == 1:
            value = interpolate(self.points[rows[0]], self.values[rows[0]], flat)
        else:
            value = torch.empty_like(flat)
            for row in rows.unique():
                here = rows == row
                value[here] = interpolate(self.points[row], self.values[row], flat[here])
        return value.reshape(x.shape).to(torch.promote_types(x.dtype, torch.float32))

    def denoiser(self) -> Denoiser:
        """The table as a student: ``table.denoiser()(x, t).at(s)`` is f(x, t, s)."""
        return Denoiser(self, self.schedule, "sample")

    def _rows(self, t: Time) -> Tensor:
        times = torch.from_numpy(np.atleast_1d(host(t)))
        row = (torch.searchsorted(self.times, times)).clamp(max=len(self.times) - 1)
        row = torch.where((self.times[row] - times).abs() <= (self.times[row - 1] - times).abs(), row, row - 1)
        wrong = (self.times[row] - times).abs() > 1e-6 * self.times[-1]  # float32 times must find their row
        if wrong.any():
            raise ValueError(f"Time {times[wrong][0]:g} is not on this table's grid of {len(self.times)} times.")
        return row


def interpolate(points: Tensor, values: Tensor, x: Tensor) -> Tensor:
    """The cubic through the four nearest points (Lagrange's form), linear beyond the ends; x [B], points [M]."""
    inner = x.clamp(points[0], points[-1])
    first = (torch.searchsorted(points, inner) - 2).clamp(0, len(points) - 4)
    index = first[:, None] + torch.arange(4)
    p, v = points[index], values[index]
    result = torch.zeros_like(x)
    for j in range(4):
        others = [k for k in range(4) if k != j]
        result += v[:, j] * ((inner[:, None] - p[:, others]) / (p[:, j : j + 1] - p[:, others])).prod(dim=1)
    slope_low = (values[1] - values[0]) / (points[1] - points[0])
    slope_high = (values[-1] - values[-2]) / (points[-1] - points[-2])
    return result + (x - points[0]).clamp(max=0) * slope_low + (x - points[-1]).clamp(min=0) * slope_high


def lcm_table(mixture: GaussianMixture, schedule: Schedule, num_steps: int) -> Table:
    """LCM's fixed point: the teacher's DDIM composed down the N-step training grid, landing on `schedule.end`.

    It is stored as the clean data whose jump to the end is the composition's value (LCM proper hands out that
    clean data itself as its sample; the two differ by the noise left at the end).
    """
    return tcd_table(mixture, schedule, num_steps, ends="first")


def tcd_table(
    mixture: GaussianMixture,
    schedule: Schedule,
    num_steps: int,
    ends: Literal["all", "first"] | Iterable[int] = "all",
) -> Table:
    """TCD's fixed point, TCF(1) with squared error and end points the network is not told.

    At grid time t with next lower time u, the target for end s <= u is ``b = f(x_u, u, s)``, x_u one DDIM step of
    the teacher (b = x_u itself for s = u). The prediction's weight in the jump to s is b_s = sigma_s - sigma_t
    alpha_s / alpha_t, so the minimiser over uniformly drawn s is the mean of the secants x_t -> b with weights
    b_s^2. Every secant is a mix of the teacher's own prediction (x_t -> x_u) and of the table's at u, and so is
    the minimiser: ``A teacher + (1 - A) table`` with A = sum_s D_st D_ut (alpha_s/alpha_u) / sum_s D_st^2 and
    D_st = sigma_s alpha_t - sigma_t alpha_s.

    Args:
        ends: indices of the grid times that s is drawn from, those above u left out; "all" is every one of them
            from index 0 (`schedule.end`) on, "first" is index 0 alone (LCM).
    """
    grid = torch.from_numpy(np.unique(schedule.training_grid(num_steps)))
    count = len(grid)
    chosen = {"all": range(count), "first": range(1)}[ends] if isinstance(ends, str) else sorted(set(ends))
    points = _points(mixture, schedule, grid)
    teacher = Denoiser(mixture.network(schedule, "sample"), schedule, "sample")
    alpha, sigma = schedule.alpha_sigma(grid)
    values = torch.empty_like(points)
    values[0] = teacher(points[0], float(grid[0])).x0
    for n in range(1, count):
        said = teacher(points[n], float(grid[n]))
        usable = np.array([m for m in chosen if m < n])
        if not len(usable):
            values[n] = said.x0
            continue
        landing = said.at(float(grid[n - 1]))
        table = interpolate(points[n - 1], values[n - 1], landing)
        values[n] = _minimiser(alpha, sigma, n, usable, points[n], landing, table)
    return Table(schedule, grid, points, values)


def _minimiser(
    alpha: Array, sigma: Array, n: int, ends: npt.NDArray[np.int64], x: Tensor, landing: Tensor, table: Tensor
) -> Tensor:
    """Weighted mean over ``ends`` of the clean data whose jump from x (at index n) meets the target."""
    from_t, from_u = sigma[ends] / sigma[n], sigma[ends] / sigma[n - 1]
    of_said, of_table = alpha[ends] - alpha[n] * from_t, alpha[ends] - alpha[n - 1] * from_u
    # target = from_u landing + of_table table (for s = u: 1 and 0, the landing itself); jump = from_t x + of_said x0
    weight = of_said / (of_said**2).sum()
    return float(weight @ from_u) * landing + float(weight @ of_table) * table - float(weight @ from_t) * x


def _points(mixture: GaussianMixture, schedule: Schedule, grid: Tensor) -> Tensor:
    """[N + 1, M] states: even ones at the first time, carried to every other by the exact flow."""
    std = (mixture.components.variances[:, 0] + float(schedule.sigma(grid[0])) ** 2).sqrt()
    low = (mixture.means[:, 0] - REACH * std).min().item()
    high = (mixture.means[:, 0] + REACH * std).max().item()
    start = torch.linspace(low, high, POINTS, dtype=torch.float64)
    return torch.stack([mixture.flow_map(start, schedule, float(grid[0]), float(t)) for t in grid])


def compose(denoiser: Denoiser | GaussianMixture, schedule: Schedule, x: Tensor, times: Iterable[float]) -> Tensor:
    """Jumps one after the other: x at times[0] to times[-1], the network asked at every time but the last."""
    if isinstance(denoiser, GaussianMixture):
        denoiser = Denoiser(denoiser.network(schedule, "sample"), schedule, "sample")
    steps = [float(t) for t in times]
    for t, s in zip(steps[:-1], steps[1:], strict=True):
        x = denoiser(x, t).at(s)
    return x
