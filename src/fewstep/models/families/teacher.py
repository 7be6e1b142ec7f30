"""A teacher: a pipeline's network with its schedule, and what turns prompts and pictures into tensors and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fewstep.diffusion.schedule import working
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.encoders import open_encoder
from fewstep.models.families.family import Family
from fewstep.models.families.flux import Flux
from fewstep.models.families.pixart import PixArt
from fewstep.models.families.sd3 import StableDiffusion3
from fewstep.models.families.unet import StableDiffusion, StableDiffusionXL
from fewstep.models.helpers import Helpers, pooled_prompt
from fewstep.models.hub import quiet
from fewstep.models.rewards import open_reward

_MOST, _PIXELS = 32, 2**21
_TRANSFORMERS: dict[str, type[Family]] = {
    "SD3Transformer2DModel": StableDiffusion3,
    "FluxTransformer2DModel": Flux,
    "PixArtTransformer2DModel": PixArt,
}


@dataclass
class Teacher:
    """A text-to-image teacher.

    Attributes:
        denoiser: the network with its schedule and prediction kind; frozen.
        pipeline: the diffusers pipeline it came from.
        name: where it was loaded from.
        origin: the model whose VAE and text encoders these are; differs from ``name`` when it is somebody's student.
        family: what its kind of pipeline wants.
    """

    denoiser: Denoiser
    pipeline: Any
    name: str
    origin: str = ""
    family: Family | None = None
    _known: dict[tuple[str, ...], Cond] = field(default_factory=dict)
    _gone: bool = False

    @property
    def _family(self) -> Family:
        assert self.family is not None
        return self.family

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the latents."""
        return self._family.latent_shape

    @property
    def image_size(self) -> int:
        """Side of the pictures in pixels."""
        return self.latent_shape[1] * self._family.down

    @property
    def size(self) -> int | None:
        """The side that was asked for when it was loaded; None is the model's own."""
        return self._family.size

    @property
    def multiple(self) -> int:
        """Pixels of which the sides of its pictures are best multiples."""
        return self._family.multiple

    @property
    def guidance_embed(self) -> float | None:
        """The guidance scale that the network is told when nobody else tells it one; None: it takes none (FLUX)."""
        network: Any = self.denoiser.network
        return float(network.guidance_embed) if "guidance_embed" in self.denoiser.accepts else None

    @property
    def latent_scale(self) -> tuple[float, float]:
        """(factor, shift): latents = (encoded - shift) * factor."""
        config = self.pipeline.vae.config
        return float(config.scaling_factor), float(getattr(config, "shift_factor", None) or 0.0)

    @torch.no_grad()
    def encode_prompts(
        self, prompts: Sequence[str], batch_size: int = 64, size: tuple[int, int] | None = None, guided: bool = True
    ) -> Cond:
        """What the network is told: prompt_embeds [B, tokens, width] and what else its family wants, with the null.

        Args:
            size: (height, width) in pixels of the pictures, where that is told too; the teacher's own by default.
            guided: False saves encoding the null where nothing will ask for it.

        Raises:
            ValueError: the text encoders are freed (`free_text_encoders`), and these prompts were not among those kept.
        """
        if tuple(prompts) in self._known and size is None:
            return self._known[tuple(prompts)]
        if self._gone:
            raise ValueError("This teacher's text encoders were let go once its data were encoded: load it again.")
        with quiet():
            return self._family.conditions(prompts, batch_size, size, guided)

    def free_text_encoders(self, later: Iterable[Sequence[str]] = (), autoencoder: bool = False) -> None:
        """Give back the memory of the text encoders; only the lists of prompts in ``later`` can be encoded after that.

        Args:
            autoencoder: it waits on the host too, and comes back whenever it is asked.
        """
        for prompts in later:
            self._known[tuple(prompts)] = self.encode_prompts(prompts)
        parts = [name for name in self.pipeline.components if name.startswith("text_encoder")]
        for name in parts:
            setattr(self.pipeline, name, None)
        self._gone = True
        if autoencoder:
            self.pipeline.vae.to("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextmanager
    def _autoencoder(self) -> Iterator[Any]:
        """The autoencoder beside the network, wherever it waits."""
        vae = self.pipeline.vae
        before = vae.device
        base = before if self.family is None else self.family.base.device
        if before != base:
            vae.to(base)
        try:
            yield vae
        finally:
            if before != base:
                vae.to(before)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] in [-1, 1] -> posterior (mean, standard deviation) of the scaled latents."""
        with self._autoencoder() as vae:
            parts = [part.to(vae.device, vae.dtype) for part in images.split(vae_batch_size(images.shape[-1]))]
            posteriors = [vae.encode(part).latent_dist for part in parts]
        mean, std = torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])
        factor, shift = self.latent_scale
        return (mean - shift) * factor, std * factor

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int | None = None) -> Tensor:
        """Scaled latents [B, C, h, w] -> images [B, 3, H, W] in [0, 1], float32."""
        widths = self.pipeline.vae.config.block_out_channels
        batch_size = batch_size or vae_batch_size(latents.shape[-1] * 2 ** (len(widths) - 1))
        with self._autoencoder():
            pieces = [self.pictures(part) for part in latents.split(batch_size)]
        return (torch.cat(pieces).float() / 2 + 0.5).clamp(0, 1)

    def pictures(self, latents: Tensor) -> Tensor:
        """As `decode`, but with a graph to the latents, from -1 to 1 and not clamped: for losses."""
        vae = self.pipeline.vae
        factor, shift = self.latent_scale
        x = vae.decode(latents.to(vae.device, vae.dtype) / factor + shift, return_dict=False)[0]
        return cast(Tensor, x.to(working(latents).dtype))

    def helpers(
        self,
        encoder: str = "",
        gradient_checkpointing: bool = False,
        rewards: Sequence[str] = (),
        measures: Sequence[str] = (),
    ) -> Helpers:
        """What losses look through (`Helpers`), with the encoder of that name (`open_encoder`) if any.

        Args:
            gradient_checkpointing: decode picture by picture, and once more in the backward, for memory.
            rewards, measures: reward models by name, in losses and only looked at (`open_reward`).

        Raises:
            ValueError: there is no such encoder or reward model.
        """
        vae = self.pipeline.vae
        seen = open_encoder(encoder, str(vae.device)) if encoder else None
        liked = {name: open_reward(name, str(vae.device)) for name in rewards}
        liked |= {name: open_reward(name, str(vae.device), measures=True) for name in measures}
        behind = [vae, *([seen.network] if seen is not None else []), *(reward.network for reward in liked.values())]
        decode = self._one_by_one if gradient_checkpointing else self.pictures
        return Helpers(decode, seen, pooled_prompt, self._family.pooled_width(), tuple(behind), liked)

    def _one_by_one(self, latents: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and latents.requires_grad):
            return torch.cat([self.pictures(part) for part in latents.split(1)])
        return torch.cat([checkpoint(self.pictures, part, use_reentrant=False) for part in latents.split(1)])


def as_teacher(
    pipeline: Any, name: str = "pipeline", *, size: int | None = None, guidance_embed: float | None = None
) -> Teacher:
    """A `Teacher` around a loaded diffusers pipeline; its parts are frozen and set to eval.

    Args:
        size: side of its pictures in pixels; None takes the model's own.
        guidance_embed: the guidance scale that it is told, where it is told one (FLUX.1-dev; 3.5 by default).

    Raises:
        ValueError: for families that are not supported, sizes that do not fit, a scale that the network cannot hear.
    """
    family = find_family(pipeline, size)
    for part in (getattr(pipeline, "components", None) or vars(pipeline)).values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    denoiser = family.denoiser()
    if guidance_embed is not None:
        if "guidance_embed" not in denoiser.accepts:
            raise ValueError(f"teacher.guidance_embed: {type(family.base).__name__} is told no guidance scale.")
        denoiser.network.guidance_embed = guidance_embed  # type: ignore[attr-defined]
    return Teacher(denoiser, pipeline, name, name, family)


def find_family(pipeline: Any, size: int | None = None) -> Family:
    """The family of a pipeline, known by the network in it.

    Raises:
        ValueError: one sentence when it is none of those that can be distilled, or ``size`` does not fit.
    """
    unet, transformer = (getattr(pipeline, part, None) for part in ("unet", "transformer"))
    kind = getattr(getattr(unet, "config", None), "addition_embed_type", None)
    cls: type[Family] | None = _TRANSFORMERS.get(type(transformer).__name__)
    if unet is not None:
        cls = {None: StableDiffusion, "text_time": StableDiffusionXL}.get(kind)
    if cls is None:
        raise ValueError(
            f"{_kind(pipeline)} is not supported as a teacher: "
            "use Stable Diffusion 1.x, 2.x, XL or 3.x, FLUX.1 or PixArt."
        )
    return cls(pipeline, size)


def _kind(pipeline: Any) -> str:
    """A pipeline's class; an outline has its name."""
    return str(getattr(pipeline, "name", "")) or type(pipeline).__name__


def vae_batch_size(side: int) -> int:
    """How many pictures of ``side`` x ``side`` pixels an autoencoder is given together: 32 small ones, 2 of 1024."""
    return min(_MOST, max(1, _PIXELS // side**2))
