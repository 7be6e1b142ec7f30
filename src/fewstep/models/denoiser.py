"""Denoiser: a network, its schedule and its prediction type, called in one way.

``network(x, t, cond, *, end=None, guidance_embed=None) -> Tensor`` may be any callable: a closed form, a small
MLP, a diffusers UNet behind an adapter. Classifier-free guidance happens here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.diffusion.prediction import Prediction, check_prediction_type
from fewstep.diffusion.schedule import Array, Schedule, Time, expand, host, working
from fewstep.models.cond import Cond

Network = Callable[..., Tensor]


@dataclass
class Cost:
    """Calls of a network so far, and their compute cost.

    Attributes:
        calls: network calls.
        evaluations: images evaluated (a batch of 8 is 8; guidance's two branches are two; features are half an image).
        graph_evaluations: those of them that recorded a graph, and so cost a backward pass (2 forwards) too.
    """

    calls: int = 0
    evaluations: float = 0
    graph_evaluations: float = 0

    @property
    def forward_equivalents(self) -> float:
        """Compute cost in forward passes of one image: forward 1, backward 2."""
        return self.evaluations + 2 * self.graph_evaluations


class Denoiser:
    """Calls ``network`` at (x_t, t) and returns a `Prediction`.

    Args:
        network: any callable ``(x, t, cond) -> Tensor``; extra inputs it understands are declared in its
            attribute ``accepts``, a set of "end" and "guidance_embed".
        schedule: the forward process the network was trained on.
        prediction_type: "epsilon", "v_prediction", "sample" or "flow".
        batched_guidance: both guidance branches in one call (False: two calls, half the memory).

    Raises:
        ValueError: unknown prediction type; an epsilon network on a schedule that reaches alpha = 0.
    """

    def __init__(
        self,
        network: Network,
        schedule: Schedule,
        prediction_type: str = "epsilon",
        *,
        batched_guidance: bool = True,
    ) -> None:
        self.network = network
        self.prediction_type = check_prediction_type(prediction_type)
        self.schedule = schedule.for_network(self.prediction_type)
        self.batched_guidance = batched_guidance
        self.cost = Cost()
        if self.prediction_type == "epsilon" and float(schedule.alpha_sigma(schedule.start)[0]) == 0:
            raise ValueError(
                "An epsilon network cannot start from pure noise: this schedule has alpha = 0 at its start. "
                "Use a v_prediction, sample or flow network, or a schedule without zero terminal SNR."
            )

    @property
    def accepts(self) -> frozenset[str]:
        """Extra inputs that the network declares: "end", "guidance_embed"."""
        return frozenset(getattr(self.network, "accepts", ()))

    @property
    def lowest_end(self) -> float:
        """The lowest time that the input ``end`` has: the schedule's end, or the last of a bank's times."""
        bank = getattr(self.network, "bank", None)
        return float(self.schedule.end if bank is None else bank.times[-1])

    def lay_out(self, noise: Tensor) -> Tensor:
        """Unit noise [B, ...], as drawn, in the layout of states.

        Where a network's own program draws noise for packed latents (FLUX), the same generator thus gives the same
        images here and there.
        """
        return laid_out(self.network, noise)

    def __call__(
        self,
        x: Tensor,
        t: Time,
        cond: Cond | None = None,
        guidance_scale: float | Tensor = 1.0,
        end: Time | None = None,
        guidance_embed: float | Tensor | None = None,
    ) -> Prediction:
        """Predict at x [B, ...] and native time ``t`` (number or [B]).

        Args:
            guidance_scale: classifier-free guidance ``null + w (cond - null)``, or the network's own rule
                (`guidance_of`); number or [B], 1.0 is off.
            end: target time s that the network is conditioned on, number or [B] (CTM, TCD's TCF(S+)).
            guidance_embed: guidance scale that the network embeds, number or [B] (LCM's w, FLUX).

        Raises:
            ValueError: guidance without a null condition; an extra input the network does not declare; for a network
                with a bank of last layers, no end, or times that are not the bank's.
        """
        network: Any = self.network
        if getattr(network, "bank", None) is not None:
            return self._by(network.between(t, end))(x, t, cond, guidance_scale, None, guidance_embed)
        extras = self._extras(x, end, guidance_embed)
        if isinstance(guidance_scale, Tensor) or guidance_scale != 1.0:
            output = self._guided(x, t, cond, guidance_scale, extras)[0]
        else:
            output = self._ask(x, self._times(t, x), cond, extras)
        return Prediction(x, output, t, self.schedule, self.prediction_type)

    def mixtures(self, x: Tensor, t: Time, cond: Cond | None, rows: Array) -> list[Prediction]:
        """What mixtures of a bank of last layers predict at x [B, ...] and t: one call for all of them.

        Args:
            rows: [R, N] weights of the layers, one row a mixture, each of sum 1 (`fewstep.models.bank`).

        Raises:
            ValueError: the network has no bank, or reshapes by the batch of its input.
        """
        network: Any = self.network
        output = self._by(network.mixed(rows))._ask(x, self._times(t, x), cond, {})
        return [Prediction(x, part, t, self.schedule, self.prediction_type) for part in output.chunk(len(rows))]

    def _by(self, network: Network) -> Denoiser:
        """This denoiser, and its cost, with ``network`` in place of its own."""
        made = self.uncounted()
        made.network, made.cost = network, self.cost
        return made

    def with_and_without_guidance(
        self, x: Tensor, t: Time, cond: Cond | None, guidance_scale: float
    ) -> tuple[Prediction, Prediction]:
        """(the prediction with ``guidance_scale``, that of its conditional branch alone), by one guided call."""
        if guidance_scale == 1.0:
            prediction = self(x, t, cond)
            return prediction, prediction
        outputs = self._guided(x, t, cond, guidance_scale, {})
        guided, plain = (Prediction(x, o, t, self.schedule, self.prediction_type) for o in outputs)
        return guided, plain

    def uncounted(self, schedule: Schedule | None = None) -> Denoiser:
        """The same denoiser with a cost of its own, for evaluating a network while it is being trained.

        Args:
            schedule: another one in the place of its own.
        """
        own = schedule or self.schedule
        return Denoiser(self.network, own, self.prediction_type, batched_guidance=self.batched_guidance)

    def features(self, x: Tensor, t: Time, cond: Cond | None, taps: Iterable[str]) -> list[Tensor]:
        """Inner activations at the named taps, [B, C, ...] each, for discriminators; optional in a network.

        Taps lie in the first half of a network and the second is not run: half an evaluation is counted.

        Raises:
            ValueError: when the network offers none, or not these.
        """
        network: Any = self.network
        if not hasattr(network, "features"):
            raise ValueError(f"{type(network).__name__} offers no features(x, t, cond, taps) for a discriminator.")
        features: list[Tensor] = network.features(self._cast(x), self._times(t, x), cond, taps)
        self._count(x.shape[0] / 2, any(feature.requires_grad for feature in features))
        return features

    def _guided(
        self, x: Tensor, t: Time, cond: Cond | None, scale: float | Tensor, extras: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Outputs with guidance, and of the conditional branch."""
        if cond is None:
            raise ValueError("Guidance needs a condition: pass cond, or guidance_scale=1.0 to turn it off.")
        times, null = self._times(t, x), cond.null()
        if self.batched_guidance:
            twice = {name: torch.cat([value, value]) for name, value in extras.items()}
            both = self._ask(torch.cat([x, x]), torch.cat([times, times]), Cond.cat([null, cond]), twice)
            without, with_ = both.chunk(2)
        else:
            without, with_ = self._ask(x, times, null, extras), self._ask(x, times, cond, extras)
        dtype = torch.promote_types(working(x).dtype, without.dtype)
        if isinstance(scale, Tensor):
            scale = scale.to(device=x.device, dtype=dtype, non_blocking=True)
            scale = scale.reshape(-1, *[1] * (x.ndim - 1)) if scale.ndim else scale
        without, with_ = without.to(dtype), with_.to(dtype)
        guide = guidance_of(self.network)
        return guide(with_, without, scale), with_

    def _ask(self, x: Tensor, t: Tensor, cond: Cond | None, extras: dict[str, Tensor]) -> Tensor:
        output = self.network(self._cast(x), t, cond, **extras)
        self._count(x.shape[0], output.requires_grad)
        return output

    def _count(self, images: float, graph: bool) -> None:
        self.cost.calls += 1
        self.cost.evaluations += images
        self.cost.graph_evaluations += images if graph else 0

    def _cast(self, x: Tensor) -> Tensor:
        dtype = network_dtype(self.network)
        return x if dtype is None else x.to(dtype)

    def _times(self, t: Time, x: Tensor) -> Tensor:
        """Native times [B] on x's device: int64 where whole table indices were given, else float32 or float64."""
        times = _tensor(t)
        whole = self.schedule.family == "vp" and (not times.is_floating_point() or _is_whole(t))
        dtype = torch.int64 if whole else working(x).dtype
        return times.to(device=x.device, dtype=dtype, non_blocking=True).expand(x.shape[0])

    def _extras(self, x: Tensor, end: Time | None, guidance_embed: float | Tensor | None) -> dict[str, Tensor]:
        extras: dict[str, Tensor] = {}
        if end is not None:
            extras["end"] = self._times(end, x)
        if guidance_embed is not None:
            embed = _tensor(guidance_embed).to(x.device, working(x).dtype, non_blocking=True)
            extras["guidance_embed"] = embed.expand(x.shape[0])
        for name in extras.keys() - self.accepts:
            raise ValueError(
                f"This network has no input '{name}': it declares {sorted(self.accepts) or 'no extra inputs'}."
            )
        return extras


def _tensor(value: Time) -> Tensor:
    """A tensor as it is; host numbers in float64 (torch alone would round a Python float to float32)."""
    return value if isinstance(value, Tensor) else torch.from_numpy(host(value))


def _is_whole(t: Time) -> bool:
    """Whether host times are whole table indices; of a tensor on an accelerator the dtype decides."""
    if isinstance(t, Tensor) and t.device.type != "cpu":
        return False
    times = host(t)
    return bool((times == times.round()).all())


def check_taps(taps: Iterable[str], known: Iterable[str]) -> list[str]:
    """``taps`` as a list if a network has all of them, else one clear sentence."""
    wanted, there = list(taps), list(known)
    for tap in wanted:
        if tap not in there:
            raise ValueError(f"This network has no tap '{tap}': it has {', '.join(there)}.")
    return wanted


def network_dtype(network: Any) -> torch.dtype | None:
    """Dtype a network computes in: its ``dtype`` attribute (None: any), else its first floating parameter's."""
    dtype = getattr(network, "dtype", 0)
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if isinstance(network, nn.Module):
        return next((p.dtype for p in network.parameters() if p.is_floating_point()), None)
    return None


def guidance_of(network: Any) -> Callable[[Tensor, Tensor, float | Tensor], Tensor]:
    """``guide(with_, without, scale)`` of a network that has a rule of its own, else classifier-free guidance.

    All are raw outputs [B, ...], the scale a number or [B, 1, ...]; at scale 1 a rule returns ``with_``.
    """
    own: Callable[[Tensor, Tensor, float | Tensor], Tensor] | None = getattr(network, "guide", None)
    return _guide if own is None else own


def _guide(with_: Tensor, without: Tensor, scale: float | Tensor) -> Tensor:
    return without + scale * (with_ - without)


def laid_out(network: Any, noise: Tensor) -> Tensor:
    """`Denoiser.lay_out` for a network, or for one inside another."""
    own = getattr(network, "lay_out", None)
    found: Tensor = noise if own is None else own(noise)
    return found


def edm_precondition(network: Network, sigma_data: float = 0.5) -> EDMNetwork:
    """EDM's preconditioned denoiser D(x, sigma) as a "sample" network (Karras et al. 2022, eq. 7, table 1).

    ``network(c_in x, c_noise, cond)`` is the raw F with c_noise = log(sigma) / 4. Where it is an nn.Module, roles may
    copy it or give it adapters.
    """
    return EDMNetwork(network, sigma_data)


class EDMNetwork(nn.Module):
    """The network of `edm_precondition`; ``network`` is the raw F, whose capabilities it hands on."""

    dtype = None  # only the raw network computes in its own dtype: c_skip x keeps the digits of the state

    def __init__(self, network: Network, sigma_data: float) -> None:
        super().__init__()
        self.network, self.sigma_data = network, sigma_data
        self.accepts = frozenset(getattr(network, "accepts", ()))
        for name in ("lora_targets", "extra_width", "tap_channels"):
            if hasattr(network, name):
                setattr(self, name, getattr(network, name))
        if hasattr(network, "last_layer"):
            self.last_layer = f"network.{network.last_layer}"

    def _coefficients(self, sigma: Array) -> tuple[Array, Array, Array]:
        sigma_data = self.sigma_data
        root = (sigma**2 + sigma_data**2) ** 0.5
        return sigma_data**2 / root**2, sigma * sigma_data / root, 1 / root

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None, **extras: Tensor) -> Tensor:
        c_skip, c_out, c_in = self._coefficients(host(t))
        x = working(x)
        raw = self.network(*self._inputs(x, c_in, t), cond, **extras)
        if len(raw) > len(x):  # mixtures of a bank of last layers, each of all rows
            count = len(raw) // len(x)
            x, c_skip, c_out = torch.cat([x] * count), np.tile(c_skip, count), np.tile(c_out, count)
        return expand(c_skip, x) * x + expand(c_out, x) * raw.to(x.dtype)

    def features(self, x: Tensor, t: Tensor, cond: Cond | None, taps: Iterable[str]) -> list[Tensor]:
        """The raw network's, at its own inputs (see `Denoiser.features`)."""
        network: Any = self.network
        found: list[Tensor] = network.features(*self._inputs(working(x), self._coefficients(host(t))[2], t), cond, taps)
        return found

    def _inputs(self, x: Tensor, c_in: Array, t: Tensor) -> tuple[Tensor, Tensor]:
        dtype, scaled = network_dtype(self.network), expand(c_in, x) * x
        noise = t.clamp_min(math.exp(-100)).log() / 4
        return scaled if dtype is None else scaled.to(dtype), noise
