"""A teacher: a pipeline's network with its schedule, and the encoding of prompts and images into tensors and back."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fewstep.diffusion.schedule import Schedule, working
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.encoders import open_encoder
from fewstep.models.families.family import Family
from fewstep.models.families.registry import find_family
from fewstep.models.helpers import Helpers, pooled_prompt
from fewstep.models.hub import Remark, quiet
from fewstep.models.offload import offload
from fewstep.models.rewards import open_reward

PROMPTS_AT_ONCE = 64
"""Prompts that the text encoders are given together."""
_MOST, _PIXELS = 32, 2**21


@dataclass
class Teacher:
    """A text-to-image teacher.

    Attributes:
        denoiser: the network with its schedule and prediction kind; frozen.
        family: the rules of its kind of pipeline, around the pipeline.
        name: where it was loaded from.
        origin: the model whose VAE and text encoders these are; differs from ``name`` when it is somebody's student.
    """

    denoiser: Denoiser
    family: Family
    name: str
    origin: str = ""
    _known: dict[tuple[str, ...], Cond] = field(default_factory=dict)
    _freed: bool = False
    _told: bool = False

    @property
    def pipeline(self) -> Any:
        """The diffusers pipeline it came from."""
        return self.family.pipeline

    def with_denoiser(
        self, *, name: str = "", network: Any = None, schedule: Schedule | None = None, kind: str = ""
    ) -> Teacher:
        """The same teacher with another network, schedule or prediction ``kind``; what is left out stays."""
        mine = self.denoiser
        made = Denoiser(network or mine.network, schedule or mine.schedule, kind or mine.prediction_type)
        return replace(self, denoiser=made, name=name or self.name)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """As `Family.latent_shape`."""
        return self.family.latent_shape

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.latent_shape[-2] * self.family.down

    @property
    def size(self) -> int | None:
        """The side in pixels that was asked for when it was loaded; None is the model's own."""
        return self.family.size

    @property
    def multiple(self) -> int:
        """The sides of its images should be multiples of so many pixels."""
        return self.family.multiple

    @property
    def guidance_embed(self) -> float | None:
        """The network's embedded guidance scale when a caller gives none; None: it has no such embedding."""
        network: Any = self.denoiser.network
        return float(network.guidance_embed) if "guidance_embed" in self.denoiser.accepts else None

    @property
    def guidance_scale(self) -> float:
        """Classifier-free guidance unless the user gives one; 1 (off) of few-step models, and of an embedded scale."""
        guided = self.guidance_embed is None and self.family.few_steps is None
        return self.family.guidance_scale if guided else 1.0

    @torch.no_grad()
    def encode_prompts(
        self,
        prompts: Sequence[str],
        batch_size: int = PROMPTS_AT_ONCE,
        size: tuple[int, int] | None = None,
        guided: bool = True,
        negative: bool = False,
    ) -> Cond:
        """The condition: prompt_embeds [B, tokens, width] and the family's other tensors, with the null condition.

        Args:
            size: (height, width) in pixels of the images, for networks conditioned on it; the teacher's own by default.
            guided: False leaves out the null condition, where no guidance will need it.
            negative: the prompts are negative ones, which some pipelines encode otherwise.

        Warns:
            Remark: a prompt is longer than the text encoders read; once for a teacher.

        Raises:
            ValueError: the text encoders are freed (`make_room`), and these prompts were not among those kept.
        """
        if tuple(prompts) in self._known and size is None and not negative:
            return self._known[tuple(prompts)]
        if self._freed:
            raise ValueError("This teacher's text encoders were freed once its data were encoded: load it again.")
        self.remark_on_length(prompts)
        with quiet():
            return self.family.conditions(prompts, batch_size, size, guided, negative)

    def remark_on_length(self, prompts: Sequence[str]) -> None:
        """Warn where a prompt is longer than the text encoders read, as in `encode_prompts`."""
        with quiet():
            sentence = "" if self._told else self.family.cut_off(prompts)
        if sentence:
            self._told = True  # once: a data set is encoded in many parts
            warnings.warn(Remark(sentence), stacklevel=3)

    def make_room(self, later: Iterable[Sequence[str]] = (), texts: bool = False, autoencoder: bool = False) -> None:
        """Free the memory of what training does not need.

        Args:
            later: lists of prompts that will be encoded again, whose conditions are kept.
            texts: keep the text encoders; without them nothing but the lists in ``later`` can be encoded any more.
            autoencoder: keep the autoencoder on its device; in the host's memory it moves back for each use.
        """
        for prompts in later:
            self._known[tuple(prompts)] = self.encode_prompts(prompts)
        if not texts:
            for name in self.family.text_parts:
                setattr(self.pipeline, name, None)
            self._freed = True
        if not autoencoder:
            self.pipeline.vae.to("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def offload(self, device: str) -> None:
        """Move a teacher that is on the host to a device, but for its network's blocks (`fewstep.models.offload`)."""
        for part in self.pipeline.components.values():
            if isinstance(part, torch.nn.Module) and part is not self.family.base:
                part.to(device)
        network: Any = self.denoiser.network
        offload(network, device)

    @contextmanager
    def _autoencoder(self) -> Iterator[Any]:
        """Within this block the autoencoder is on the network's device."""
        vae = self.pipeline.vae
        before, base = vae.device, self.family.device()
        if before != base:
            vae.to(base)
        try:
            yield vae
        finally:
            if before != base:
                vae.to(before)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] in [-1, 1] -> posterior (mean, standard deviation) of the scaled latents.

        An autoencoder without a posterior (AutoencoderTiny) has the standard deviation 0.

        Raises:
            ValueError: the latents are not finite.
        """
        mean, std = self.posterior(images)
        self._check_finite(mean + std, "The autoencoder's latents of these images")
        return mean, std

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As `encode_images`, without a look at the values, for which the host would wait."""
        with self._autoencoder() as vae:
            parts = [part.to(vae.device, vae.dtype) for part in images.split(vae_batch_size(images.shape[-1]))]
            posteriors = [self.family.posterior(part) for part in parts]
        mean, std = (torch.cat(found) for found in zip(*posteriors, strict=True))
        return mean, std

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int | None = None) -> Tensor:
        """Scaled latents [B, C, h, w] -> images [B, 3, H, W] in [0, 1], float32.

        Raises:
            ValueError: the latents or the images are not finite.
        """
        self._check_finite(latents, "The latents")
        batch_size = batch_size or vae_batch_size(latents.shape[-1] * self.family.down)
        pieces = []
        with self._autoencoder():
            for part in latents.split(batch_size):
                pixels = self._decoded(part).float()  # clamped, an infinite pixel would look like a white one
                self._check_finite(pixels, "The autoencoder's images")
                pieces.append((pixels / 2 + 0.5).clamp(0, 1))
        return torch.cat(pieces)

    def _check_finite(self, values: Tensor, what: str) -> None:
        """Refuse NaN and infinity, which as pixels would be a black image without any error; ``what`` is plural.

        Raises:
            ValueError: one sentence with what helps: float16 ends at 65,504.
        """
        if not bool(values.isfinite().all()):
            half = torch.float16 in (getattr(net, "dtype", None) for net in (self.pipeline.vae, self.family.base))
            advice = "load the model in bf16 or fp32" if half else "lower the guidance scale, or get the weights again"
            raise ValueError(f"{what} are not finite (NaN or infinite): {advice}.")

    def _decoded(self, latents: Tensor) -> Tensor:
        """As `decode`, but with a graph to the latents, from -1 to 1 and not clamped: for losses."""
        vae = self.pipeline.vae
        return self.family.decode(latents.to(vae.device, vae.dtype)).to(working(latents).dtype)

    def helpers(
        self,
        encoder: str = "",
        gradient_checkpointing: bool = False,
        rewards: Sequence[str] = (),
        measures: Sequence[str] = (),
    ) -> Helpers:
        """The frozen networks that losses pass gradients through (`Helpers`).

        Args:
            encoder: name of an encoder of images (`open_encoder`), empty for none.
            gradient_checkpointing: decode image by image, and once more in the backward, to save memory.
            rewards, measures: names of reward models (`open_reward`), for losses and for measurement only.

        Raises:
            ValueError: there is no such encoder or reward model.
        """
        vae = self.pipeline.vae
        seen = open_encoder(encoder, str(vae.device)) if encoder else None
        liked = {name: open_reward(name, str(vae.device)) for name in rewards}
        liked |= {name: open_reward(name, str(vae.device), measures=True) for name in measures}
        behind = [vae, *([seen.network] if seen is not None else []), *(reward.network for reward in liked.values())]
        decode = self._one_by_one if gradient_checkpointing else self._decoded
        return Helpers(decode, seen, pooled_prompt, self.family.pooled_width(), tuple(behind), liked)

    def _one_by_one(self, latents: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and latents.requires_grad):
            return torch.cat([self._decoded(part) for part in latents.split(1)])
        return torch.cat([checkpoint(self._decoded, part, use_reentrant=False) for part in latents.split(1)])


def as_teacher(
    pipeline: Any, name: str = "pipeline", *, size: int | None = None, guidance_embed: float | None = None
) -> Teacher:
    """A `Teacher` around a loaded diffusers pipeline; its parts are frozen and set to eval.

    Args:
        size: side of its images in pixels; None takes the model's own.
        guidance_embed: scale for its guidance-scale embedding, where it has one (FLUX.1-dev; 3.5 by default).

    Raises:
        ValueError: for families that are not supported, sizes that do not fit, a scale without an embedding for it.
    """
    family = find_family(pipeline, size)
    upcast_autoencoder(getattr(pipeline, "vae", None))
    for part in (getattr(pipeline, "components", None) or vars(pipeline)).values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    denoiser = family.denoiser()
    if guidance_embed is not None:
        if "guidance_embed" not in denoiser.accepts:
            raise ValueError(f"teacher.guidance_embed: {type(family.base).__name__} has no guidance-scale embedding.")
        denoiser.network.guidance_embed = guidance_embed  # type: ignore[attr-defined]
    return Teacher(denoiser, family, name, name)


def upcast_autoencoder(vae: Any) -> None:
    """Put a float16 autoencoder whose config says ``force_upcast`` into float32, as diffusers' SDXL pipelines do.

    The activations of SDXL's exceed 65,504: in float16 its images are black. diffusers turns it back after each use;
    here it stays, for encoding and losses see it too.
    """
    if vae is not None and vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
        torch.nn.Module.to(vae, torch.float32)  # diffusers' own .to warns about layers that should stay in float32


def vae_batch_size(side: int) -> int:
    """How many images of ``side`` x ``side`` pixels an autoencoder is given together: 32 small ones, 2 of 1024."""
    return min(_MOST, max(1, _PIXELS // side**2))
