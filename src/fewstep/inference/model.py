"""A model to sample from, as `fewstep.load` returns it: images from prompts, from images, and inside masks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Unpack, get_args, overload

import torch
from PIL import Image
from torch import Tensor

from fewstep.checkpoints import explain
from fewstep.checkpoints.registry import Checkpoint
from fewstep.checkpoints.sampling import sampler_of as published_sampler
from fewstep.checkpoints.sampling import start_of
from fewstep.evaluation.grids import to_images
from fewstep.inference.arguments import (
    MOST_IMAGES,
    MOST_SIDE,
    OutputType,
    SampleOptions,
    as_texts,
    guidance,
    sampler_options,
    start,
    whole_number,
)
from fewstep.inference.images import AnyImages, as_images, as_masks, cells, opened
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.families import Teacher
from fewstep.sampling import Sampler, sample
from fewstep.sampling.sample import Generators
from fewstep.sampling.samplers import sampler_name
from fewstep.students.card import Card, refuse_other_times, sampler_of
from fewstep.training.progress import doing


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
        """One image for each prompt, or ``num_images_per_prompt``.

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
        """Images generated from ``image``: one for all prompts, or one for each, in any form of `AnyImage`.

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
        given, scale = sampler_options(steps, options.get("timesteps")), options.get("guidance_scale")
        count = given["num_inference_steps"] if given["timesteps"] is None else len(given["timesteps"])
        scale = None if scale is None else guidance(scale, "guidance_scale")
        for line in self.warnings(count, scale, options.get("sampler")):
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
        seed: int | None = None,
        latents: Tensor | None = None,
        generator: Generators | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        sampler: str | None = None,
        timesteps: Sequence[float] | None = None,
        eta: float | None = None,
        image: AnyImages | None = None,
        mask: AnyImages | None = None,
        strength: float | None = None,
    ) -> Generated:
        """Images with a description of how they were made; arguments and errors as in `sample` and `img2img`."""
        chosen = self.sampler(sampler, sampler_options(num_inference_steps, timesteps, eta, strength))
        scale, embed = self.guidance(guidance_scale, guidance_embed)
        each, this = (
            whole_number(num_images_per_prompt, "num_images_per_prompt", 1, MOST_IMAGES),
            self.at(height, width),
        )
        refuse_other_times(self.card, chosen, this.denoiser.schedule)
        begun = None if image is None else opened(image)
        given = this._one_each(prompts, 1 if begun is None else len(begun))
        images, masks = this._pixels(given, begun, mask)
        cond = this.condition(given, negative_prompt, scale)
        rows = torch.arange(len(given)).repeat_interleave(each)
        device = next(self.teacher.family.base.parameters()).device
        noise, draws = start((len(rows), *this.teacher.latent_shape), seed, generator, latents)
        begins = "unit" if self.published is None or sampler is not None else start_of(self.published)
        if images is not None:
            images, masks = images[rows], None if masks is None else masks[rows]
        with doing("sampling", len(chosen.times(this.denoiser.schedule)) - 1) as advance:
            run = sample(
                this.denoiser, chosen, noise.to(device), cond[rows] if each > 1 else cond, scale, None, begins,
                guidance_embed=embed, generator=draws,
                image=None if images is None else self.teacher.encode_images(images)[0],
                mask=None if masks is None else cells(masks, self._down),
                callback=lambda done, _: advance(done),
            )  # fmt: skip
        with doing("decoding the images"):
            pixels = self.teacher.decode(run.x0)
        if images is not None and masks is not None:
            pixels = torch.where(masks.to(pixels.device) > 0, pixels, images.to(pixels) / 2 + 0.5)
        words = f"{chosen.name}, timesteps {', '.join(f'{t:g}' for t in run.timesteps[:8].tolist())}"
        words += ", ..." if len(run.timesteps) > 8 else ""
        words += "" if strength is None else f"; strength {strength:g}"
        words += f"; guidance {scale:g}" + ("" if embed is None else f", embedded {embed:g}")
        words += f"; seed {seed or 0}" if generator is None else "; noise of the caller's generator"
        return Generated(run.x0, pixels, words)

    def sampler(self, name: str | None, options: Mapping[str, Any]) -> Sampler:
        """The model's own sampler, with the name and the options that are given; None among them is not given.

        Raises:
            ValueError: an option is invalid, or lacks where nothing says how the model is sampled.
        """
        counts = ("num_inference_steps", "timesteps")
        told = name is not None and any(options.get(option) is not None for option in counts)
        if self.published is None and not self.card.sampler and not told:
            raise ValueError(
                "No card says how this LoRA is sampled: give a sampler and the number of steps, such as --sampler lcm "
                "--steps 4."
            )
        if self.published is None or name is not None:
            return self._by_name(name, options)
        return published_sampler(self.published, dict(self.teacher.pipeline.scheduler.config), **options)

    def _by_name(self, name: str | None, options: Mapping[str, Any]) -> Sampler:
        """The card's sampler, or that of a name, which may be ComfyUI's where ComfyUI's steps so on this schedule."""
        ours = None if name is None else sampler_name(name)
        found, schedule = sampler_of(self.card, ours, **options), self.denoiser.schedule
        if ours != name and found.comfyui_sampler(schedule) != name:
            raise ValueError(f"ComfyUI's {name} steps otherwise than {ours} on this model: give {ours} for that one.")
        return found

    def guidance(self, scale: float | None, embed: float | None = None) -> tuple[float, float | None]:
        """(classifier-free guidance, scale for the guidance-scale embedding), the model's own where none is given.

        Raises:
            ValueError: a scale is negative or not finite, or the network has no guidance-scale embedding.
        """
        scale = None if scale is None else guidance(scale, "guidance_scale") or 1.0  # 0 is off, as in diffusers
        embedded = self.card.guidance_embed if embed is None else guidance(embed, "guidance_embed")
        lcm = not self.card.teacher and self.card.guidance_embed is not None  # somebody's pipeline, not a student here
        if lcm if self.published is None else self.published.guidance == "embedded":
            embedded, scale = (embedded if scale is None or embed is not None else scale), 1.0
        scale = self.guidance_scale if scale is None else scale
        if embed is not None and "guidance_embed" not in self.denoiser.accepts:
            raise ValueError("This model has no guidance-scale embedding: leave guidance_embed out.")
        return scale, embedded

    def condition(self, prompts: Sequence[str], negative: str | Sequence[str] | None, scale: float) -> Cond:
        """The condition of the prompts, and of the negative prompts for guidance.

        Raises:
            ValueError: a negative prompt without guidance, or a wrong number of them.
        """
        away = [] if negative is None else as_texts(negative, "negative_prompt")
        guided = negative is not None and scale != 1
        if scale == 1 and any(away):
            raise ValueError(
                "A negative prompt does something only with guidance, and this model is sampled without: give a "
                "guidance_scale above 1 too, or leave it out."
            )
        if guided and len(away) == 1:
            away = away * len(prompts)
        if guided and len(away) != len(prompts):
            raise ValueError(f"Give one negative prompt, or one for each of {len(prompts)} prompts, not {len(away)}.")
        cond = self.teacher.encode_prompts(list(prompts), guided=scale != 1)
        return cond.with_negative(self.teacher.encode_prompts(away, guided=False, negative=True)) if guided else cond

    def warnings(
        self, steps: int | None = None, guidance_scale: float | None = None, sampler: str | None = None
    ) -> list[str]:
        """A sentence for each option that does not suit a published file, and for a sampler that is not its own."""
        own, name = self.card.sampler, self.published.id if self.published else "This student"
        if self.published is not None:
            own = self.sampler(None, {}).name
        few = self.published is not None or bool(self.card.method)
        other = few and sampler is not None and sampler_name(sampler) != own
        found = [f"{name} was trained for the sampler {own}, not {sampler}: images may be worse."] if other else []
        if self.published is None:
            return found
        steps = steps or self.published.default_steps
        return found + explain.warnings(self.published, self.base, self.teacher.family.name, steps, guidance_scale)

    @property
    def licence(self) -> str:
        """The licence of a published file, in a sentence; empty for other models."""
        return "" if self.published is None else explain.licence_notice(self.published)

    # ---------------------------------------------------------------- shapes

    def at(self, height: int | None, width: int | None) -> Model:
        """The same model for images of that many pixels, its own size where None.

        Raises:
            ValueError: the network has no such size.
        """
        own, given = self.image_size, {"height": height, "width": width}
        sides = [
            old if side is None else whole_number(side, name, 1, MOST_SIDE)
            for (name, side), old in zip(given.items(), own, strict=True)
        ]
        if tuple(sides) == own:
            return self
        family, denoiser = self.teacher.family.at(*sides), self.denoiser
        if self.published is None and family.schedule().shift != self.teacher.family.schedule().shift:
            denoiser = denoiser.uncounted(family.schedule())  # FLUX: its shift depends on the size
        return replace(self, teacher=replace(self.teacher, family=family, _known={}), denoiser=denoiser)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of its images in pixels."""
        height, width = self.teacher.latent_shape[-2:]
        return height * self._down, width * self._down

    @property
    def _down(self) -> int:
        return self.teacher.image_size // self.teacher.latent_shape[-2]

    def _one_each(self, prompts: str | Sequence[str], count: int) -> list[str]:
        """As many prompts as there will be images, from ``count`` images or none."""
        given = as_texts(prompts)
        if not given or not count:
            raise ValueError("There is nothing to generate: give a prompt.")
        if len(given) == 1:
            return given * count
        if count not in (1, len(given)):
            raise ValueError(f"Give one image, or one for each of {len(given)} prompts, not {count}.")
        return given

    def _pixels(
        self, prompts: Sequence[str], image: Sequence[Image.Image] | None, mask: AnyImages | None
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
