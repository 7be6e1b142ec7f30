"""The arguments of `Model.sample` as people give them, checked: what cannot be used is one sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from fewstep.sampling.sample import Generators, unit_normal

MOST_STEPS, MOST_IMAGES, MOST_SIDE = 10_000, 1024, 2**14  # beyond these a mistake is more likely than patience


class SampleOptions(TypedDict, total=False):
    """Options of `Model.sample`, `img2img` and `inpaint`; the model's own values hold where one is left out.

    Attributes:
        guidance_scale: classifier-free guidance, 1 is off. guidance_embed: the scale for a network with a
            guidance-scale embedding (FLUX, LCM's w).
        negative_prompt: the prompt to guide away from, one for all or one for each prompt.
        seed: of the initial noise (default 0). latents: the noise itself, [B, C, h, w], unit normal.
        generator: draws the noise instead of a seed; a list has one for each image, whose noise is then its own.
        num_images_per_prompt: images of each prompt, one after the other (default 1).
        height, width: of the images in pixels.
        sampler: by its name. timesteps: of the network calls, in native time. eta: the share of fresh noise, 0 to 1.
    """

    guidance_scale: float | None
    guidance_embed: float | None
    negative_prompt: str | Sequence[str] | None
    seed: int | None
    latents: Tensor | None
    generator: Generators | None
    num_images_per_prompt: int
    height: int | None
    width: int | None
    sampler: str | None
    timesteps: Sequence[float] | None
    eta: float | None


OutputType = Literal["pil", "pt", "latent"]
"""PIL images, a tensor [B, 3, H, W] from 0 to 1, or latents [B, C, h, w]."""


def as_texts(given: Any, name: str = "prompts") -> list[str]:
    """One text, or several, as a list.

    Raises:
        ValueError: they are no texts, or hold half a character (a lone surrogate, as a wrongly decoded file has it).
    """
    try:
        texts: list[Any] = [given] if isinstance(given, str | bytes) else list(given)
    except TypeError:
        texts = [given]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{name} must be a text or a list of texts, not {_kind(text)}.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name}: {text[error.start]!a} at position {error.start + 1} is no character by itself: give the text "
                "in UTF-8."
            ) from None
    return texts


def whole_number(given: Any, name: str, least: int, most: int) -> int:
    """``given`` as an int; 4.0 and NumPy's numbers are whole too.

    Raises:
        ValueError: it is no whole number from ``least`` to ``most``.
    """
    try:
        whole = None if isinstance(given, bool | str | bytes) or given != int(given) else int(given)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        whole = None
    if whole is None or not least <= whole <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, not {_kind(given)}.")
    return whole


def sampler_options(steps: Any, timesteps: Any, eta: Any = None, strength: Any = None) -> dict[str, Any]:
    """Options of a sampler. ``steps`` beside as many timesteps says the same, as in diffusers' calls.

    Raises:
        ValueError: one of them is no number; their ranges are checked by the sampler.
    """
    if timesteps is not None:
        try:
            timesteps = [real_number(time, "timesteps") for time in timesteps]
        except TypeError:
            raise ValueError(f"timesteps must be a list of numbers, not {_kind(timesteps)}.") from None
    if steps is not None:
        steps = whole_number(steps, "num_inference_steps", 1, MOST_STEPS)
        steps = None if timesteps is not None and len(timesteps) == steps else steps
    return {
        "num_inference_steps": steps,
        "timesteps": timesteps,
        "eta": None if eta is None else real_number(eta, "eta"),
        "strength": None if strength is None else real_number(strength, "strength"),
    }


def real_number(given: Any, name: str) -> float:
    """``given`` as a float.

    Raises:
        ValueError: it is no number; whether it is in range is not checked here.
    """
    try:
        if isinstance(given, bool | str | bytes):
            raise TypeError
        return float(given)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ValueError(f"{name} must be a number, not {_kind(given)}.") from None


def guidance(given: Any, name: str) -> float:
    """A guidance scale.

    Raises:
        ValueError: it is no number, negative or not finite.
    """
    value = real_number(given, name)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite (1 is off), not {value:g}.")
    return value


def start(shape: tuple[int, ...], seed: Any, generator: Any, latents: Any) -> tuple[Tensor, Generators]:
    """The noise to start from, and the source of what the sampler draws after it.

    Raises:
        ValueError: as `generators` and `as_latents`.
    """
    source, given = generators(seed, generator, shape[0]), None if latents is None else as_latents(latents, shape)
    if given is not None and generator is not None:
        return given, source
    # drawn even where noise is given, most often by this very seed: the sampler's own draws come after it
    noise = unit_normal(shape, source, torch.float32)
    return noise if given is None else given, source


def generators(seed: Any, given: Any, count: int) -> Generators:
    """The source of an image's noise: the user's generator, one for each of ``count`` images, or one from the seed.

    Raises:
        ValueError: both are given, or another number of generators.
    """
    if given is None:
        return torch.Generator().manual_seed(whole_number(0 if seed is None else seed, "seed", 0, 2**64 - 1))
    if seed is not None:
        raise ValueError("Give a seed or a generator, one of the two.")
    found = [given] if isinstance(given, torch.Generator) else list(given) if isinstance(given, list | tuple) else []
    if not found or not all(isinstance(one, torch.Generator) for one in found):
        raise ValueError(f"generator must be a torch.Generator or a list of them, not {_kind(given)}.")
    if len(found) not in (1, count):
        raise ValueError(f"Give one generator, or one for each of {count} images, not {len(found)}.")
    return found[0] if len(found) == 1 else found


def as_latents(given: Any, shape: tuple[int, ...]) -> Tensor:
    """Noise that the user gives.

    Raises:
        ValueError: it is no tensor of this shape, or not finite.
    """
    if not isinstance(given, Tensor):
        raise ValueError(f"latents must be a tensor of the shape {shape}, not {_kind(given)}.")
    if tuple(given.shape) != shape:
        raise ValueError(f"latents must have the shape {shape}, not {tuple(given.shape)}.")
    if not given.is_floating_point() or not given.isfinite().all():
        raise ValueError("latents must be finite floating-point numbers.")
    return given


def _kind(given: Any) -> str:
    """A value in an error, or its type where it is none of Python's plain ones."""
    plain = given is None or isinstance(given, bool | int | float | str | bytes)
    return f"{given!a:.80}" if plain else type(given).__name__
