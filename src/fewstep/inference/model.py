"""A model to sample from, as `fewstep.load` returns it: images from prompts, from images, and inside masks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack, get_args, overload

import torch
from PIL import Image
from torch import Tensor

from fewstep.checkpoints import explain
from fewstep.checkpoints.registry import Checkpoint
from fewstep.checkpoints.sampling import sampler_of as published_sampler
from fewstep.checkpoints.sampling import start_of
from fewstep.evaluation.grids import to_images
from fewstep.inference.images import AnyImages, as_images, as_list, as_masks, cells
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.families import Teacher
from fewstep.sampling import Sampler, sample
from fewstep.students.card import Card, sampler_of


class SampleOptions(TypedDict, total=False):
    """Options of `Model.sample`, `img2img` and `inpaint`; the model's own values hold where one is left out.

    Attributes:
        guidance_scale: classifier-free guidance, 1 is off. guidance_embed: the scale for a network with a
            guidance-scale embedding (FLUX, LCM's w).
        negative_prompt: the prompt to guide away from, one for all or one for each prompt.
        seed: of the initial noise (default 0). latents: the noise itself, [B, C, h, w], unit normal.
        sampler: by its name. timesteps: of the network calls, in native time. eta: the share of fresh noise, 0 to 1.
    """

    guidance_scale: float | None
    guidance_embed: float | None
    negative_prompt: str | Sequence[str] | None
    seed: int
    latents: Tensor | None
    sampler: str | None
    timesteps: Sequence[float] | None
    eta: float | None


OutputType = Literal["pil", "pt", "latent"]
"""PIL images, a tensor [B, 3, H, W] from 0 to 1, or latents [B, C, h, w]."""


@dataclass(frozen=True)
class Generated:
    """Generated images.

    Attributes:
        latents: [B, C, h, w]. images: [B, 3, H, W] from 0 to 1. description: how they were made, in words.
    """

    latents: Tensor
    images: Tensor
    description: str


@dataclass
class Model:
    """A model to sample from: a teacher, or a student on its teacher.

    Attributes:
        card: how to sample from it.
        guidance_scale: classifier-free guidance by default.
        published: its entry in the registry of published files, which then replaces the card.
        base: the model from which it was made, or on which it is put; empty for that model itself.
    """

    teacher: Teacher
    denoiser: Denoiser
    card: Card
    guidance_scale: float
    published: Checkpoint | None = None
    base: str = ""

    # ---------------------------------------------------------------- sampling

    @overload
    def sample(
        self, prompts: str | Sequence[str], num_inference_steps: int | None = None, *,
        output_type: Literal["pil"] = "pil", **options: Unpack[SampleOptions],
    ) -> list[Image.Image]: ...  # fmt: skip
    @overload
    def sample(
        self, prompts: str | Sequence[str], num_inference_steps: int | None = None, *,
        output_type: Literal["pt", "latent"], **options: Unpack[SampleOptions],
    ) -> Tensor: ...  # fmt: skip
    def sample(
        self, prompts: str | Sequence[str], num_inference_steps: int | None = None, *,
        output_type: OutputType = "pil", **options: Unpack[SampleOptions],
    ) -> list[Image.Image] | Tensor:  # fmt: skip
        """One image for each prompt.

        Args:
            num_inference_steps: the model's own number if None.
            output_type: see `OutputType`. options: see `SampleOptions`.

        Raises:
            ValueError: an option is invalid, or this model does not support it.
        """
        return self._sample(output_type, prompts, num_inference_steps, options)

    @overload
    def img2img(
        self, prompts: str | Sequence[str], image: AnyImages, strength: float = 0.5,
        num_inference_steps: int | None = None, *,
        output_type: Literal["pil"] = "pil", **options: Unpack[SampleOptions],
    ) -> list[Image.Image]: ...  # fmt: skip
    @overload
    def img2img(
        self, prompts: str | Sequence[str], image: AnyImages, strength: float = 0.5,
        num_inference_steps: int | None = None, *,
        output_type: Literal["pt", "latent"], **options: Unpack[SampleOptions],
    ) -> Tensor: ...  # fmt: skip
    def img2img(
        self, prompts: str | Sequence[str], image: AnyImages, strength: float = 0.5,
        num_inference_steps: int | None = None, *,
        output_type: OutputType = "pil", **options: Unpack[SampleOptions],
    ) -> list[Image.Image] | Tensor:  # fmt: skip
        """Images generated from ``image``: one image or file for all prompts, or one for each.

        Args:
            strength: from 0, the image as it is, to 1, nearly nothing of it. LCM and TCD students take all their
                steps below the strength, others the last part of theirs (`Sampler`).

        Further arguments and errors as in `sample`; also ValueError for images that cannot be read.
        """
        return self._sample(output_type, prompts, num_inference_steps, options, image=image, strength=strength)

    @overload
    def inpaint(
        self, prompts: str | Sequence[str], image: AnyImages, mask: AnyImages, strength: float = 1.0,
        num_inference_steps: int | None = None, *,
        output_type: Literal["pil"] = "pil", **options: Unpack[SampleOptions],
    ) -> list[Image.Image]: ...  # fmt: skip
    @overload
    def inpaint(
        self, prompts: str | Sequence[str], image: AnyImages, mask: AnyImages, strength: float = 1.0,
        num_inference_steps: int | None = None, *,
        output_type: Literal["pt", "latent"], **options: Unpack[SampleOptions],
    ) -> Tensor: ...  # fmt: skip
    def inpaint(
        self, prompts: str | Sequence[str], image: AnyImages, mask: AnyImages, strength: float = 1.0,
        num_inference_steps: int | None = None, *,
        output_type: OutputType = "pil", **options: Unpack[SampleOptions],
    ) -> list[Image.Image] | Tensor:  # fmt: skip
        """Images generated anew where ``mask`` is white; all other pixels are those of ``image``.

        Args:
            mask: of the image's size. strength: below 1 the image under the mask has an influence.

        Further arguments and errors as in `img2img`; also ValueError for masks of another size, or without any white.
        """
        more = {"image": image, "mask": mask, "strength": strength}
        return self._sample(output_type, prompts, num_inference_steps, options, **more)

    def _sample(
        self, output_type: str, prompts: str | Sequence[str], steps: int | None, options: SampleOptions, **more: Any
    ) -> list[Image.Image] | Tensor:
        if output_type not in get_args(OutputType):
            raise ValueError(f"Unknown output_type '{output_type}': use {', '.join(get_args(OutputType))}.")
        for line in self.warnings(len(options.get("timesteps") or ()) or steps, options.get("guidance_scale")):
            warnings.warn(line, stacklevel=3)
        found = self.generate(prompts, steps, **options, **more)
        if output_type == "pil":
            return to_images(found.images)
        return found.images if output_type == "pt" else found.latents

    def generate(
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
        image: AnyImages | None = None,
        mask: AnyImages | None = None,
        strength: float | None = None,
    ) -> Generated:
        """Images with a description of how they were made; arguments and errors as in `sample` and `img2img`."""
        options = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "eta": eta}
        chosen = self.sampler(sampler, {**options, "strength": strength})
        scale, embed = self.guidance(guidance_scale, guidance_embed)
        given = self._one_each(prompts, image)
        images, masks = self._pixels(given, image, mask)
        noise, generator = self._noise(len(given), seed, latents)
        cond = self.condition(given, negative_prompt, scale)
        start = "unit" if self.published is None or sampler is not None else start_of(self.published)
        run = sample(
            self.denoiser, chosen, noise, cond, scale, None, start, guidance_embed=embed, generator=generator,
            image=None if images is None else self.teacher.encode_images(images)[0],
            mask=None if masks is None else cells(masks, self._down),
        )  # fmt: skip
        pixels = self.teacher.decode(run.x0)
        if images is not None and masks is not None:
            pixels = torch.where(masks.to(pixels.device) > 0, pixels, images.to(pixels) / 2 + 0.5)
        words = f"{chosen.name}, timesteps {', '.join(f'{t:g}' for t in run.timesteps[:8].tolist())}"
        words += ", ..." if len(run.timesteps) > 8 else ""
        words += "" if strength is None else f"; strength {strength:g}"
        words += f"; guidance {scale:g}" + ("" if embed is None else f", embedded {embed:g}")
        return Generated(run.x0, pixels, f"{words}; seed {seed}")

    def sampler(self, name: str | None, options: Mapping[str, Any]) -> Sampler:
        """The model's own sampler, with the name and the options that are given; None among them is not given."""
        if self.published is None or name is not None:
            return sampler_of(self.card, name, **options)
        return published_sampler(self.published, dict(self.teacher.pipeline.scheduler.config), **options)

    def guidance(self, scale: float | None, embed: float | None = None) -> tuple[float, float | None]:
        """(classifier-free guidance, scale for the guidance-scale embedding), the model's own where none is given.

        Raises:
            ValueError: a scale is negative or not finite, or the network has no guidance-scale embedding.
        """
        embedded = self.card.guidance_embed if embed is None else embed
        if self.published is not None and self.published.guidance == "embedded":
            embedded, scale = (embedded if scale is None or embed is not None else scale), 1.0
        elif self.published is not None:  # cards of published files write 0 for off
            scale = self.guidance_scale if scale is None else scale or 1.0
        else:
            scale = self.guidance_scale if scale is None else scale
        for name, value in (("guidance_scale", scale), ("guidance_embed", embedded)):
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite (1 is off), not {value:g}.")
        if embed is not None and "guidance_embed" not in self.denoiser.accepts:
            raise ValueError("This model has no guidance-scale embedding: leave guidance_embed out.")
        return scale, embedded

    def condition(self, prompts: Sequence[str], negative: str | Sequence[str] | None, scale: float) -> Cond:
        """The condition of the prompts, and of the negative prompts for guidance.

        Raises:
            ValueError: a negative prompt without guidance, or a wrong number of them.
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

    def warnings(self, steps: int | None = None, guidance_scale: float | None = None) -> list[str]:
        """A sentence for each option that does not suit a published file."""
        if self.published is None:
            return []
        steps = steps or self.published.default_steps
        return explain.warnings(self.published, self.base, self.teacher.family.name, steps, guidance_scale)

    @property
    def licence(self) -> str:
        """The licence of a published file, in a sentence; empty for other models."""
        return "" if self.published is None else explain.licence_notice(self.published)

    # ---------------------------------------------------------------- shapes

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of its images in pixels."""
        _, height, width = self.teacher.latent_shape
        return height * self._down, width * self._down

    @property
    def _down(self) -> int:
        return self.teacher.image_size // self.teacher.latent_shape[1]

    def _one_each(self, prompts: str | Sequence[str], image: AnyImages | None) -> list[str]:
        """As many prompts as there will be images."""
        given = [prompts] if isinstance(prompts, str) else list(prompts)
        count = 1 if image is None else len(as_list(image))
        if not given or not count:
            raise ValueError("There is nothing to generate: give a prompt.")
        if len(given) == 1:
            return given * count
        if count not in (1, len(given)):
            raise ValueError(f"Give one image, or one for each of {len(given)} prompts, not {count}.")
        return given

    def _pixels(
        self, prompts: Sequence[str], image: AnyImages | None, mask: AnyImages | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Images [B, 3, H, W] and masks [B, 1, H, W] of the model's size."""
        if image is None:
            if mask is not None:
                raise ValueError("A mask needs an image: give one of the same size.")
            return None, None
        images = as_images(image, self.image_size)
        images = images.expand(len(prompts), -1, -1, -1)
        if mask is None:
            return images, None
        masks = as_masks(mask, image, self.image_size)
        if len(masks) not in (1, len(prompts)):
            raise ValueError(f"Give one mask, or one for each of {len(prompts)} images, not {len(masks)}.")
        return images, masks.expand(len(prompts), -1, -1, -1)

    def _noise(self, count: int, seed: int, latents: Tensor | None) -> tuple[Tensor, torch.Generator]:
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be a whole number from 0 to 2^63 - 1, not {seed}.")
        shape, generator = (count, *self.teacher.latent_shape), torch.Generator().manual_seed(seed)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents must have the shape {shape}, not {tuple(latents.shape)}.")
        # drawn even where noise is given, most often by this very seed: the sampler's own draws come after it
        noise = torch.randn(*shape, generator=generator)
        noise = noise if latents is None else latents
        return noise.to(next(self.teacher.family.base.parameters()).device), generator
