"""Noise schedules: one object from which every coefficient of the library follows.

A schedule names the forward process ``x_t = alpha(t) x0 + sigma(t) eps`` in its own, native time:

======  =========================  ==================  =============
family  native time                start (noisiest)    clean data
======  =========================  ==================  =============
vp      table index 0 ... T-1      T-1                 -1
edm     the noise level sigma      sigma_max           0.0
flow    [0, 1]                     1.0                 0.0
======  =========================  ==================  =============

Coefficients are formed in float64 on the host (numpy) and cast by whoever applies them, so no step of a
training loop waits for an accelerator. VP index 0 is *not* clean data (sigma = 0.029 for Stable Diffusion).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array: TypeAlias = npt.NDArray[np.float64]
Time: TypeAlias = "float | int | Tensor | Array"
Spacing: TypeAlias = Literal["trailing", "leading", "linspace"]
LCMGrid: TypeAlias = Literal["lcm", "lcm-v1"]
Family: TypeAlias = Literal["vp", "edm", "flow"]
Shift: TypeAlias = "float | Callable[[int], float]"
"""Of a flow schedule's grids: a number, or one that depends on the number of steps (FLUX.2)."""

_UNKNOWN_SCHEDULERS = (  # diffusers' classes whose noise levels do not follow from betas alone
    "Amused", "CMStochasticIterative", "CogVideoX", "CosineDPM", "DDPMWuerstchen", "IPNDM", "KarrasVe", "ScoreSde",
    "VQDiffusion",
)  # fmt: skip
SPACINGS = ("trailing", "leading", "linspace")
USUAL_STEPS = 50
"""For which a shift holds that depends on the number of steps, where there is no such number."""


def host(t: Time | Sequence[float]) -> Array:
    """Any time-like value as a float64 array on the host (a tensor on an accelerator is copied over)."""
    if isinstance(t, Tensor):
        t = t.detach().cpu().numpy()
    return np.asarray(t, dtype=np.float64)


def expand(coefficient: Array, like: Tensor) -> Tensor:
    """Coefficients [] or [B] as a tensor that broadcasts over ``like`` [B, ...] in its dtype and device."""
    tensor = torch.from_numpy(np.ascontiguousarray(coefficient, dtype=np.float64))
    if coefficient.ndim:
        tensor = tensor.reshape(-1, *[1] * (like.ndim - 1))
    return tensor.to(device=like.device, dtype=like.dtype, non_blocking=True)


def working(x: Tensor) -> Tensor:
    """``x`` in the dtype that states and losses live in: max(x.dtype, float32)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Schedule:
    """Forward process of one of the three families; build it with a class method.

    Attributes:
        family: ``"vp"``, ``"edm"`` or ``"flow"``.
        clean: the native time that means clean data (alpha = 1, sigma = 0).
        start: the noisiest native time, where sampling starts.
        end: where a consistency function is the identity: VP index 0, EDM sigma_min, flow 0.0.
        num_train_timesteps: table length (VP), or how many network timesteps [0, 1] spans (flow).
        shift: how far a flow schedule's grids are bent towards noise; of `USUAL_STEPS` where it depends on the number.
        terminal: lowest level of a flow schedule's trailing grids, to which they are stretched; 0: they are not.
        prediction_type: what the networks on it predict, where that is known (`for_network`); noise otherwise. No
            coefficient or grid depends on it; where few-step students start does (`diffusion.well_posed`).
    """

    def __init__(
        self,
        family: Family,
        *,
        alphas_cumprod: npt.ArrayLike | None = None,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        shift: Shift = 1.0,
        terminal: float = 0.0,
        num_train_timesteps: int = 1000,
        interpolation: Literal["log_sigma", "sigma"] = "log_sigma",
    ) -> None:
        self.family: Family = family
        self._shift_of = shift if callable(shift) else None
        self.shift, self.rho = float(shift(USUAL_STEPS) if callable(shift) else shift), float(rho)
        self.terminal = float(terminal)
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)
        self.interpolation = interpolation
        self.num_train_timesteps = num_train_timesteps
        self.prediction_type = "epsilon"
        self.clean: float = 0.0
        if family == "vp":
            self.alphas_cumprod = np.asarray(alphas_cumprod, dtype=np.float64)
            self._check_table()
            self.num_train_timesteps = len(self.alphas_cumprod)
            with np.errstate(divide="ignore"):
                self._ratio_table = np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)
            self.clean, self.end, self.start = -1, 0.0, float(self.num_train_timesteps - 1)
        elif family == "edm":
            if not 0 < self.sigma_min < self.sigma_max:
                raise ValueError(f"sigma_min {sigma_min} and sigma_max {sigma_max} need 0 < sigma_min < sigma_max.")
            self.end, self.start = self.sigma_min, self.sigma_max
        elif family == "flow":
            if not self.shift > 0:
                raise ValueError(f"shift must be positive, not {shift}.")
            if not 0 <= self.terminal < 1:
                raise ValueError(f"terminal must be at least 0 and below 1, not {terminal}.")
            self.end, self.start = 0.0, 1.0
        else:
            raise ValueError(f"Unknown schedule family '{family}': use vp, edm or flow.")

    # ---------------------------------------------------------------- construction

    @classmethod
    def scaled_linear(
        cls, beta_start: float = 0.00085, beta_end: float = 0.012, num_train_timesteps: int = 1000
    ) -> Schedule:
        """Stable Diffusion's table (SD1.5, SDXL): sqrt(beta) is linear in the index."""
        root = np.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_train_timesteps)
        return cls.from_betas(root**2)

    @classmethod
    def from_betas(cls, betas: npt.ArrayLike | Tensor) -> Schedule:
        """VP table from the per-step variances beta_0 ... beta_{T-1}."""
        betas = host(betas)  # type: ignore[arg-type]
        if betas.ndim != 1 or len(betas) < 2 or not ((betas >= 0) & (betas <= 1)).all():
            raise ValueError("betas must be a list of at least two numbers in [0, 1].")
        return cls("vp", alphas_cumprod=np.cumprod(1 - betas))

    @classmethod
    def cosine(cls, num_train_timesteps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> Schedule:
        """Improved DDPM's cosine table (Nichol and Dhariwal 2021, eq. 17), betas clipped at ``max_beta``."""
        i = np.arange(num_train_timesteps + 1) / num_train_timesteps
        bar = np.cos((i + offset) / (1 + offset) * np.pi / 2) ** 2
        return cls.from_betas(np.minimum(1 - bar[1:] / bar[:-1], max_beta))

    @classmethod
    def edm(cls, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7) -> Schedule:
        """Variance exploding: alpha = 1, sigma = t (Karras et al. 2022)."""
        return cls("edm", sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)

    @classmethod
    def flow(cls, shift: Shift = 1.0, num_train_timesteps: int = 1000, terminal: float = 0.0) -> Schedule:
        """Rectified flow: alpha = 1 - t, sigma = t; ``shift`` bends the grids only (SD3, sec. 5.3.2).

        Args:
            shift: a number, or a function of the number of steps of a grid.
            terminal: the lowest level of a trailing grid, which is stretched to it after the shift (Qwen-Image's 0.02).
        """
        return cls("flow", shift=shift, num_train_timesteps=num_train_timesteps, terminal=terminal)

    def shift_at(self, num_steps: int) -> float:
        """The shift of a grid of ``num_steps`` steps."""
        return self.shift if self._shift_of is None else float(self._shift_of(num_steps))

    def for_steps(self, num_steps: int) -> Schedule:
        """The same schedule with the shift of ``num_steps`` steps in every grid."""
        if self._shift_of is None:
            return self
        return Schedule.flow(self.shift_at(num_steps), self.num_train_timesteps, self.terminal)

    def for_network(self, prediction_type: str) -> Schedule:
        """The same schedule, as that of a network that predicts ``prediction_type``."""
        if prediction_type == self.prediction_type:
            return self
        own = copy.copy(self)
        own.prediction_type = prediction_type
        return own

    @classmethod
    def from_diffusers(cls, config: Any) -> Schedule:
        """The schedule of a diffusers scheduler, given the scheduler or its config.

        Raises:
            ValueError: for a beta schedule or scheduler that this library does not know.
        """
        name = "" if isinstance(config, Mapping) else type(config).__name__  # a scheduler's own config has no name yet
        config = dict(getattr(config, "config", config))
        name = str(config.get("_class_name") or name)
        steps = int(config.get("num_train_timesteps", 1000))
        flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
        if flow or "FlowMatch" in name or "shift" in config:
            shift = config.get("shift") or config.get("flow_shift")  # DPM-Solver++ and UniPC call it flow_shift
            shift = 1.0 if config.get("use_dynamic_shifting") else float(shift or 1.0)
            return cls.flow(shift=shift, num_train_timesteps=steps)
        if name == "SCMScheduler":  # its networks take flow's time and state: only the scheduler turns them to angles
            return cls.flow(num_train_timesteps=steps)
        if name.startswith("EDM"):
            return cls.edm(config.get("sigma_min", 0.002), config.get("sigma_max", 80.0), config.get("rho", 7.0))
        if name.startswith(_UNKNOWN_SCHEDULERS) or config.get("timestep_type") == "continuous":
            raise ValueError(f"The noise schedule of this {name} is not known here: use one with betas, EDM or flow.")
        schedule = cls._vp_from_config(config, steps)
        if config.get("rescale_betas_zero_snr"):
            schedule = schedule.zero_terminal_snr()
        if config.get("interpolation_type") == "linear":  # EulerDiscrete: sigma, not its logarithm
            schedule.interpolation = "sigma"
        return schedule

    @classmethod
    def _vp_from_config(cls, config: Mapping[str, Any], steps: int) -> Schedule:
        if config.get("trained_betas") is not None:
            return cls.from_betas(config["trained_betas"])
        kind = config.get("beta_schedule", "linear")
        first, last = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
        if kind == "scaled_linear":
            return cls.scaled_linear(first, last, steps)
        if kind == "linear":
            return cls.from_betas(np.linspace(first, last, steps))
        if kind == "squaredcos_cap_v2":
            return cls.cosine(steps)
        raise ValueError(f"Unknown beta_schedule '{kind}': use linear, scaled_linear or squaredcos_cap_v2.")

    def zero_terminal_snr(self) -> Schedule:
        """The same table, shifted and scaled so that alpha is 0 at the last index (Lin et al. 2023, alg. 1)."""
        root = np.sqrt(self.alphas_cumprod)
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        return Schedule("vp", alphas_cumprod=root**2, interpolation=self.interpolation)

    def _check_table(self) -> None:
        table = self.alphas_cumprod
        ok = table.ndim == 1 and len(table) >= 2 and np.isfinite(table).all()
        if not ok or table[-1] < 0 or table[0] > 1 or (np.diff(table) >= 0).any():
            raise ValueError("alphas_cumprod must be a decreasing table within [0, 1].")

    # ---------------------------------------------------------------- coefficients

    def alpha(self, t: Time) -> Tensor:
        """Signal coefficient at native time ``t`` (number or [B]) as a float64 host tensor of the same shape."""
        return torch.from_numpy(np.asarray(self.alpha_sigma(t)[0]))

    def sigma(self, t: Time) -> Tensor:
        """Noise coefficient at native time ``t`` (number or [B]) as a float64 host tensor of the same shape."""
        return torch.from_numpy(np.asarray(self.alpha_sigma(t)[1]))

    def noise_to_signal(self, t: Time) -> Array:
        """Noise-to-signal ratio sigma/alpha, the VE noise level, as a host array; infinite where alpha = 0."""
        alpha, sigma = self.alpha_sigma(t)
        with np.errstate(divide="ignore"):
            return np.asarray(sigma / alpha)

    def alpha_sigma(self, t: Time) -> tuple[Array, Array]:
        """Both coefficients at native time ``t`` as float64 host arrays of its shape.

        VP times between two indices are linear in log(sigma/alpha), as k-diffusion has it (or linear in
        sigma/alpha for schedules read from an EulerDiscrete config, which interpolates that way).

        Raises:
            ValueError: for times outside the schedule.
        """
        time = host(t)
        self._check_time(time)
        if self.family == "edm":
            return np.ones_like(time), time
        if self.family == "flow":
            return 1 - time, time
        index = np.maximum(time, 0)
        low = np.minimum(index.astype(np.int64), self.num_train_timesteps - 2)
        fraction = index - low  # 1 at the last index, which has no right neighbour
        bar = self.alphas_cumprod[np.where(fraction == 1, low + 1, low)]
        alpha, sigma = np.sqrt(bar), np.sqrt(1 - bar)
        between = (fraction > 0) & (fraction < 1)
        if between.any():
            # The ratio sigma/alpha is interpolated; alpha = 1 / sqrt(1 + ratio^2) and sigma = ratio alpha follow. Just
            # before a last index of pure noise (zero terminal SNR) it is infinite, and inf * 0 must not become NaN.
            ratio = self._ratio_between(low, fraction)
            mixed = 1 / np.sqrt(1 + ratio**2)
            alpha = np.where(between, mixed, alpha)
            sigma = np.where(
                between, np.where(np.isinf(ratio), 1.0, np.where(np.isinf(ratio), 0, ratio) * mixed), sigma
            )
        clean = time == self.clean
        return np.where(clean, 1.0, alpha), np.where(clean, 0.0, sigma)

    def _ratio_between(self, low: npt.NDArray[np.int64], fraction: Array) -> Array:
        below, above = self._ratio_table[low], self._ratio_table[low + 1]
        if self.interpolation == "sigma":
            return np.asarray(below * (1 - fraction) + above * fraction)
        with np.errstate(invalid="ignore"):
            return np.asarray(np.exp(np.log(below) * (1 - fraction) + np.log(above) * fraction))

    def _check_time(self, time: Array) -> None:
        if self.family == "vp":
            inside = ((time >= 0) & (time <= self.start)) | (time == self.clean)
            span = f"-1 (clean) or in 0 ... {int(self.start)}"
        elif self.family == "flow":
            inside, span = (time >= 0) & (time <= 1), "in [0, 1]"
        else:
            inside, span = time >= 0, "at least 0"
        if not inside.all():
            bad = np.atleast_1d(time)[~np.atleast_1d(inside)][0]
            raise ValueError(f"Time {bad:g} is outside this {self.family} schedule: times must be {span}.")

    def time_at(self, ratio: npt.ArrayLike) -> Array:
        """Native time whose sigma/alpha is ``ratio``: the inverse of `noise_to_signal`, clamped to the table (VP)."""
        ratio = np.asarray(ratio, dtype=np.float64)
        if self.family == "edm":
            return ratio
        if self.family == "flow":
            return np.asarray(np.where(np.isinf(ratio), 1.0, ratio / (1 + np.where(np.isinf(ratio), 0, ratio))))
        index = np.arange(self.num_train_timesteps, dtype=np.float64)
        if self.interpolation == "sigma":
            time = np.interp(ratio, self._ratio_table, index)
        else:
            with np.errstate(divide="ignore"):
                time = np.interp(np.log(ratio), np.log(self._ratio_table), index)
        return np.asarray(np.where(ratio == 0, self.clean, time))

    def add_noise(self, x0: Tensor, eps: Tensor, t: Time) -> Tensor:
        """``alpha(t) x0 + sigma(t) eps`` for x0, eps [B, ...] and t a number or [B]; at least float32."""
        x0, eps = working(x0), working(eps)
        alpha, sigma = self.alpha_sigma(t)
        return expand(alpha, x0) * x0 + expand(sigma, x0) * eps

    # ---------------------------------------------------------------- solver steps

    @property
    def slope_mix(self) -> tuple[float, float]:
        """(a, s) of the slope a x0 + s eps along which a step of the probability flow's solvers is straight.

        It is the flow eps - x0 on flow schedules and the noise elsewhere: d(x / `solver_scale`) / d(`solver_level`).
        """
        return (-1.0, 1.0) if self.family == "flow" else (0.0, 1.0)

    def solver_level(self, t: Time) -> Array:
        """The variable of these steps on the host: t on flow schedules, sigma/alpha elsewhere (infinite at alpha 0)."""
        return host(t) if self.family == "flow" else self.noise_to_signal(t)

    def solver_scale(self, t: Time) -> Array:
        """What states are divided by there, a host array: 1 on flow schedules, alpha elsewhere."""
        return np.ones_like(host(t)) if self.family == "flow" else self.alpha_sigma(t)[0]

    def mean_slope(self, x: Tensor, t: Time, x_u: Tensor, u: Time) -> Tensor:
        """The mean slope over any steps that lead from x [B, ...] at ``t`` to x_u at ``u`` (numbers or [B])."""
        way = self.solver_level(u) - self.solver_level(t)
        scaled = [expand(np.asarray(1 / (way * self.solver_scale(time))), y) * y for y, time in ((x, t), (x_u, u))]
        return scaled[1] - scaled[0]

    # ---------------------------------------------------------------- grids

    def timesteps(
        self, num_inference_steps: int, timestep_spacing: Spacing = "trailing", steps_offset: int = 0
    ) -> Tensor:
        """The decreasing times at which the network is called, [num_inference_steps], without the end point.

        VP (int64): trailing ``round(k T/n) - 1``, leading ``k (T // n) + steps_offset``, linspace rounded, as
        diffusers' DDIM has them. Flow (float64): trailing ``k/n`` then shifted (FLUX's rule) and stretched to
        `terminal`, if any; linspace as FlowMatchEulerDiscrete builds it by default (shift applied twice at the low
        end). EDM: the Karras grid.
        """
        n = check_steps(num_inference_steps)
        if timestep_spacing not in SPACINGS:
            raise ValueError(f"Unknown timestep_spacing '{timestep_spacing}': use {', '.join(SPACINGS)}.")
        if self.family == "vp":
            return torch.from_numpy(self._vp_timesteps(n, timestep_spacing, steps_offset))
        if self.family == "edm":
            return torch.from_numpy(self.karras(n))
        if timestep_spacing == "leading":
            raise ValueError("Leading timestep_spacing has no flow form: use trailing or linspace.")
        if timestep_spacing == "linspace":
            lowest = float(self.shifted(1 / self.num_train_timesteps, n))
            return torch.from_numpy(self.shifted(np.linspace(1.0, lowest, n), n))
        return torch.from_numpy(self.stretched(self.shifted(np.arange(n, 0, -1) / n, n)))

    def stretched(self, grid: Array) -> Array:
        """A decreasing grid from 1, stretched linearly so that it ends at `terminal`."""
        if not self.terminal or len(grid) == 1:
            return grid
        return np.asarray(1 - (1 - grid) * (1 - self.terminal) / (1 - grid[-1]))

    def _vp_timesteps(self, n: int, spacing: Spacing, offset: int) -> npt.NDArray[np.int64]:
        total = self.num_train_timesteps
        if n > total:
            raise ValueError(f"num_inference_steps {n} exceeds the {total} training timesteps.")
        if spacing == "trailing":
            return np.round(np.arange(total, 0, -total / n))[:n].astype(np.int64) - 1
        if spacing == "leading":
            grid = np.arange(n)[::-1] * (total // n) + offset
            if grid[0] >= total:
                raise ValueError(f"steps_offset {offset} leads past the last timestep {total - 1}.")
            return np.ascontiguousarray(grid.astype(np.int64))
        return np.ascontiguousarray(np.linspace(0, total - 1, n).round()[::-1].astype(np.int64))

    def lcm_timesteps(
        self,
        num_inference_steps: int,
        original_inference_steps: int = 50,
        variant: LCMGrid = "lcm",
        strength: float = 1.0,
    ) -> Tensor:
        """LCM's and TCD's sampling times: a subset of the training grid, decreasing, [num_inference_steps].

        ``"lcm"`` is diffusers' present formula (4 of 50: 999, 759, 499, 259), ``"lcm-v1"`` the stride of the
        first release (999, 759, 519, 279). For flow and EDM schedules the same indices pick from their own
        training grids. ``strength`` below 1 picks from the lowest part of the training grid, so many steps all
        the same (LCM's own image-to-image).
        """
        n = check_steps(num_inference_steps)
        origin = self.training_grid(original_inference_steps)[:0:-1]
        if n > len(origin):
            raise ValueError(f"num_inference_steps {n} exceeds original_inference_steps {len(origin)}.")
        total, origin = len(origin), origin[len(origin) - math.floor(len(origin) * strength + 1e-9) :]
        if n > len(origin):
            raise ValueError(
                f"num_inference_steps {n} exceeds the {len(origin)} of {total} training times that strength "
                f"{strength:g} leaves: use at least {n / total:.2g}, or fewer steps."
            )
        if variant == "lcm":
            picked = np.floor(np.linspace(0, len(origin), n, endpoint=False)).astype(np.int64)
        elif variant == "lcm-v1":
            picked = np.arange(n) * (len(origin) // n)
        else:
            raise ValueError(f"Unknown LCM grid '{variant}': use lcm or lcm-v1.")
        chosen = np.ascontiguousarray(origin[picked])
        return torch.from_numpy(chosen.astype(np.int64) if self.family == "vp" else chosen)

    def training_grid(self, num_steps: int) -> Array:
        """The N + 1 increasing times of a discrete training grid, `end` first, `start` last.

        VP: 0, T/N - 1, 2T/N - 1, ... (LCM's 0, 19, 39, ... for N = 50); EDM: Karras points; flow: shifted k/N.
        """
        n = check_steps(num_steps)
        if self.family == "vp":
            if n > self.num_train_timesteps:
                raise ValueError(f"A grid of {n} steps exceeds the {self.num_train_timesteps} training timesteps.")
            return np.concatenate([[0.0], self.timesteps(n).numpy()[::-1].astype(np.float64)])
        if self.family == "edm":
            return np.ascontiguousarray(self.karras(n + 1)[::-1])
        return np.concatenate([[0.0], self.timesteps(n).numpy()[::-1]])

    def karras(self, n: int, rho: float | None = None) -> Array:
        """``n`` decreasing noise-to-signal ratios from the noisiest to the cleanest (Karras et al. 2022, eq. 5).

        Both ends are exact. For VP and flow these are sigma/alpha ratios; `time_at` turns them into times.
        """
        rho = self.rho if rho is None else rho
        if self.family == "vp":
            low, high = float(self._ratio_table[0]), float(self._ratio_table[-1])
        elif self.family == "edm":
            low, high = self.sigma_min, self.sigma_max
        else:
            raise ValueError("Karras grids need a finite noise ratio at the start: use them with vp or edm.")
        if not (math.isfinite(high) and low > 0):
            raise ValueError("Karras grids need a finite noise ratio at the start and one above 0 at the end.")
        ramp = np.linspace(0, 1, n)
        grid = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        grid[0] = high
        if n > 1:
            grid[-1] = low
        return np.asarray(grid)

    @staticmethod
    def shift_of_size(config: Mapping[str, Any], tokens: int) -> float:
        """The flow shift for an image of so many tokens, by a FlowMatchEulerDiscreteScheduler's config (FLUX).

        It is exp(mu), or mu itself where ``time_shift_type`` is linear; mu is linear in the number of tokens.
        """
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = float(config.get("base_shift", 0.5)), float(config.get("max_shift", 1.15))
        mu = low + (high - low) * (tokens - few) / (many - few)
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)

    def shifted(self, t: npt.ArrayLike, num_steps: int = USUAL_STEPS) -> Array:
        """Flow time bent towards noise: shift t / (1 + (shift - 1) t), with the shift of ``num_steps`` steps."""
        t, shift = np.asarray(t, dtype=np.float64), self.shift_at(num_steps)
        return np.asarray(shift * t / (1 + (shift - 1) * t))

    def phase_edges(self, num_phases: int, num_steps: int = 50) -> Array:
        """PCM's edges: the lower ends of ``num_phases`` phases of an N-step grid, increasing, then `start`.

        [num_phases + 1]; N = 50 and 4 phases give 0, 239, 499, 739, 999 (Wang et al. 2024, official code's
        ``floor(linspace(0, N, M))`` of grid indices).
        """
        grid = self.training_grid(num_steps)
        if not 1 <= num_phases <= num_steps:
            raise ValueError(f"num_phases must be between 1 and the {num_steps} steps of the grid, not {num_phases}.")
        first = np.floor(np.linspace(0, num_steps, num_phases, endpoint=False)).astype(np.int64)
        return np.concatenate([grid[first], [self.start]])

    def __repr__(self) -> str:
        detail = {
            "vp": f"T={self.num_train_timesteps}",
            "edm": f"sigma_min={self.sigma_min}, sigma_max={self.sigma_max}, rho={self.rho:g}",
            "flow": f"shift={self.shift:g}" + (f", terminal={self.terminal:g}" if self.terminal else ""),
        }[self.family]
        return f"Schedule({self.family}, {detail})"


def check_steps(n: int) -> int:
    """``n`` as an int. Raises ValueError unless it is a whole number of at least 1."""
    if isinstance(n, bool) or int(n) != n or n < 1:
        raise ValueError(f"The number of steps must be a whole number of at least 1, not {n}.")
    return int(n)
