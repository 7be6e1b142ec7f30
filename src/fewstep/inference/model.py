"""A model to draw with, as `fewstep.load` gives it: pictures from prompts, from pictures, inside masks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor

from fewstep.checkpoints import explain
from fewstep.checkpoints.registry import Checkpoint
from fewstep.checkpoints.sampling import sampler_of as published_sampler
from fewstep.checkpoints.sampling import start_of
from fewstep.evaluation.grids import to_images
from fewstep.inference.images import Pictures, as_images, as_list, as_masks, cells
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.families import Teacher
from fewstep.sampling import Sampler, sample
from fewstep.students.card import Card, sampler_of


class Wishes(TypedDict, total=False):
    """What may be asked of every way of drawing; what is left out is as the model wants it.

    Attributes:
        guidance_scale: classifier-free guidance, 1 is off. guidance_embed: the scale that the network is told, where it
            is told one (FLUX, LCM's w).
        negative_prompt: what guidance leads away from, one for all or one for each prompt.
        seed: of the noise. latents: the noise itself, [B, C, h, w], unit normal.
        sampler: by its name. timesteps: where it asks, in native time. eta: its fresh noise, 0 to 1.
        output_type: "pil", "pt" (pictures [B, 3, H, W] from 0 to 1) or "latent".
    """

    guidance_scale: float | None
    guidance_embed: float | None
    negative_prompt: str | Sequence[str] | None
    seed: int
    latents: Tensor | None
    sampler: str | None
    timesteps: Sequence[float] | None
    eta: float | None
    output_type: Literal["pil", "pt", "latent"]


@dataclass(frozen=True)
class Drawing:
    """What was drawn.

    Attributes:
        latents: [B, C, h, w]. pictures: [B, 3, H, W] from 0 to 1. words: how it was drawn.
    """

    latents: Tensor
    pictures: Tensor
    words: str


@dataclass
class Model:
    """Something to draw with: a teacher, or a student on its teacher.

    Attributes:
        card: how to sample from it.
        guidance_scale: classifier-free guidance unless the user says otherwise.
        published: the entry of the registry, where it is one; it then says how to sample, not the card.
        base: the model it was made from, or is put on; empty for that model itself.
    """

    teacher: Teacher
    denoiser: Denoiser
    card: Card
    guidance_scale: float
    published: Checkpoint | None = None
    base: str = ""

    # ---------------------------------------------------------------- ways of drawing

    def sample(
        self, prompts: str | Sequence[str], num_inference_steps: int | None = None, **wishes: Unpack[Wishes]
    ) -> Any:
        """A picture for each prompt.

        Args:
            num_inference_steps: its own number if None. wishes: see `Wishes`.

        Returns:
            A list of PIL images, or a tensor, as ``output_type`` says.

        Raises:
            ValueError: one sentence for wishes that make no sense, or that this model cannot fulfil.
        """
        return self._drawn(prompts, num_inference_steps, wishes)

    def img2img(
        self,
        prompts: str | Sequence[str],
        image: Pictures,
        strength: float = 0.5,
        num_inference_steps: int | None = None,
        **wishes: Unpack[Wishes],
    ) -> Any:
        """Pictures drawn anew from ``image``: one picture or file for all prompts, or one for each.

        Args:
            strength: from 0, the picture as it is, to 1, nearly nothing of it. LCM and TCD students take all their
                steps below the strength, others the last part of theirs (`Sampler`).

        Returns, raises: as `sample`; also for pictures that cannot be read.
        """
        return self._drawn(prompts, num_inference_steps, wishes, image=image, strength=strength)

    def inpaint(
        self,
        prompts: str | Sequence[str],
        image: Pictures,
        mask: Pictures,
        strength: float = 1.0,
        num_inference_steps: int | None = None,
        **wishes: Unpack[Wishes],
    ) -> Any:
        """Pictures drawn anew where ``mask`` is white; all other pixels are those of ``image``.

        Args:
            mask: of the picture's size. strength: below 1 what was under the mask shows through.

        Returns, raises: as `img2img`; also for masks of another size, or without any white.
        """
        return self._drawn(prompts, num_inference_steps, wishes, image=image, mask=mask, strength=strength)

    def _drawn(self, prompts: str | Sequence[str], steps: int | None, wishes: Wishes, **more: Any) -> Any:
        kind = wishes.get("output_type", "pil")
        if kind not in ("pil", "pt", "latent"):
            raise ValueError(f"Unknown output_type '{kind}': use pil, pt or latent.")
        own = {key: value for key, value in wishes.items() if key != "output_type"}
        for line in self.advice(len(own.get("timesteps") or ()) or steps, own.get("guidance_scale")):  # type: ignore[arg-type]
            warnings.warn(line, stacklevel=3)
        drawing = self.draw(prompts, steps, **own, **more)  # type: ignore[arg-type]
        if kind == "pil":
            return to_images(drawing.pictures)
        return drawing.pictures if kind == "pt" else drawing.latents

    # ---------------------------------------------------------------- what all of them do

    def draw(
        self,
        prompts: str | Sequence[str],
        num_inference_steps: int | None = None,
        *,
        guidance_scale: float | None = None,
        guidance_embed: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        seed: int = 0,
        latents: Tensor | None = None,
        sampler: str | None = None,
        timesteps: Sequence[float] | None = None,
        eta: float | None = None,
        image: Pictures | None = None,
        mask: Pictures | None = None,
        strength: float | None = None,
    ) -> Drawing:
        """Pictures with the words that say how they were made; arguments and errors as in `sample` and `img2img`."""
        options = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "eta": eta}
        chosen = self.sampler(sampler, {**options, "strength": strength})
        scale, told = self.guidance(guidance_scale, guidance_embed)
        given = self._one_each(prompts, image)
        images, masks = self._pixels(given, image, mask)
        noise, generator = self._noise(len(given), seed, latents)
        cond = self.condition(given, negative_prompt, scale)
        start = "unit" if self.published is None or sampler is not None else start_of(self.published)
        run = sample(
            self.denoiser, chosen, noise, cond, scale, None, start, guidance_embed=told, generator=generator,
            image=None if images is None else self.teacher.encode_images(images)[0],
            mask=None if masks is None else cells(masks, self._down),
        )  # fmt: skip
        drawn = self.teacher.decode(run.x0)
        if images is not None and masks is not None:
            drawn = torch.where(masks.to(drawn.device) > 0, drawn, images.to(drawn) / 2 + 0.5)
        words = f"{chosen.name}, timesteps {', '.join(f'{t:g}' for t in run.timesteps[:8].tolist())}"
        words += ", ..." if len(run.timesteps) > 8 else ""
        words += "" if strength is None else f"; strength {strength:g}"
        words += f"; guidance {scale:g}" + ("" if told is None else f", told {told:g}")
        return Drawing(run.x0, drawn, f"{words}; seed {seed}")

    def sampler(self, name: str | None, options: Mapping[str, Any]) -> Sampler:
        """What this model wants, as far as the user has no wishes; None among ``options`` is no wish."""
        if self.published is None or name is not None:
            return sampler_of(self.card, name, **options)
        return published_sampler(self.published, dict(self.teacher.pipeline.scheduler.config), **options)

    def guidance(self, scale: float | None, embed: float | None = None) -> tuple[float, float | None]:
        """(classifier-free guidance, the scale that the network is told), by the user's wishes.

        Raises:
            ValueError: one sentence for a scale that is none, or one told to a network that takes none.
        """
        told = self.card.guidance_embed if embed is None else embed
        if self.published is not None and self.published.guidance == "embedded":
            told, scale = (told if scale is None or embed is not None else scale), 1.0
        elif self.published is not None:  # cards of published files write 0 for off
            scale = self.guidance_scale if scale is None else scale or 1.0
        else:
            scale = self.guidance_scale if scale is None else scale
        for name, value in (("guidance_scale", scale), ("guidance_embed", told)):
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite (1 is off), not {value:g}.")
        if embed is not None and "guidance_embed" not in self.denoiser.accepts:
            raise ValueError("This model is told no guidance scale: leave guidance_embed out.")
        return scale, told

    def condition(self, prompts: Sequence[str], negative: str | Sequence[str] | None, scale: float) -> Cond:
        """What the network is told, and what guidance leads away from.

        Raises:
            ValueError: one sentence for a negative prompt where there is no guidance, or one too many or few.
        """
        cond = self.teacher.encode_prompts(list(prompts), guided=scale != 1)
        if negative is None:
            return cond
        if scale == 1:
            raise ValueError(
                "A negative prompt does something only with guidance, and this model is sampled without: give a "
                "guidance_scale above 1 too, or leave it out."
            )
        away = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        if len(away) != len(prompts):
            raise ValueError(f"Give one negative prompt, or one for each of {len(prompts)} prompts, not {len(away)}.")
        return cond.with_negative(self.teacher.encode_prompts(away))

    def advice(self, steps: int | None = None, guidance_scale: float | None = None) -> list[str]:
        """What is unusual about the user's wishes for a published file, a sentence each."""
        if self.published is None:
            return []
        steps = steps or self.published.default_steps
        return explain.warnings(self.published, self.base, self.teacher.family.name, steps, guidance_scale)

    @property
    def licence(self) -> str:
        """Of a published file, in a sentence; empty for others."""
        return "" if self.published is None else explain.licence_notice(self.published)

    # ---------------------------------------------------------------- shapes

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of its pictures in pixels."""
        _, height, width = self.teacher.latent_shape
        return height * self._down, width * self._down

    @property
    def _down(self) -> int:
        return self.teacher.image_size // self.teacher.latent_shape[1]

    def _one_each(self, prompts: str | Sequence[str], image: Pictures | None) -> list[str]:
        """As many prompts as there will be pictures."""
        given = [prompts] if isinstance(prompts, str) else list(prompts)
        count = 1 if image is None else len(as_list(image))
        if not given or not count:
            raise ValueError("There is nothing to draw: give a prompt.")
        if len(given) == 1:
            return given * count
        if count not in (1, len(given)):
            raise ValueError(f"Give one picture, or one for each of {len(given)} prompts, not {count}.")
        return given

    def _pixels(
        self, prompts: Sequence[str], image: Pictures | None, mask: Pictures | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Pictures [B, 3, H, W] and masks [B, 1, H, W] of the model's size."""
        if image is None:
            if mask is not None:
                raise ValueError("A mask needs the picture that it is of.")
            return None, None
        images = as_images(image, self.image_size)
        images = images.expand(len(prompts), -1, -1, -1)
        if mask is None:
            return images, None
        masks = as_masks(mask, image, self.image_size)
        if len(masks) not in (1, len(prompts)):
            raise ValueError(f"Give one mask, or one for each of {len(prompts)} pictures, not {len(masks)}.")
        return images, masks.expand(len(prompts), -1, -1, -1)

    def _noise(self, count: int, seed: int, latents: Tensor | None) -> tuple[Tensor, torch.Generator]:
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be a whole number from 0 to 2^63 - 1, not {seed}.")
        shape, generator = (count, *self.teacher.latent_shape), torch.Generator().manual_seed(seed)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents must have the shape {shape}, not {tuple(latents.shape)}.")
        noise = torch.randn(*shape, generator=generator) if latents is None else latents
        return noise.to(next(self.teacher.family.base.parameters()).device), generator
