"""What all families of teachers have in common: how a pipeline's parts become a network, a schedule and conditions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.diffusion.schedule import Schedule
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser

CLIP_TOKENS = 77
_DOWN = 8  # pixels to a latent's side, where no autoencoder says it


class Family:
    """One kind of pipeline as a teacher.

    Args:
        pipeline: its parts as attributes; a loaded pipeline, or an outline whose networks are on the meta device.
        size: side of the pictures in pixels; None takes the model's own.

    Raises:
        ValueError: one sentence when the parts do not make a teacher, or pictures cannot have this size.

    Attributes:
        part: the attribute, and folder, of the network that is distilled.
    """

    part: ClassVar[str] = "transformer"

    def __init__(self, pipeline: Any, size: int | None = None) -> None:
        self.pipeline, self.size = pipeline, size
        self._check()
        step = self.down * self.patch
        if size is not None and (size < step or size % step):
            raise ValueError(f"teacher.size must be a multiple of {step} pixels for this model, not {size}.")

    def _check(self) -> None:
        vae = getattr(self.pipeline, "vae", None)
        latents = getattr(getattr(vae, "config", None), "latent_channels", None)
        if latents is not None and latents != self.latent_channels:
            raise ValueError(
                f"This {type(self.base).__name__} takes {self.latent_channels} channels, but its autoencoder makes "
                f"{latents}: inpainting, editing and control models are not supported as teachers."
            )

    # ---------------------------------------------------------------- networks

    @property
    def base(self) -> Any:
        """The network that is distilled."""
        return getattr(self.pipeline, self.part)

    def network(self) -> nn.Module:
        """The network in the contract of `fewstep.models.denoiser`."""
        raise NotImplementedError

    def denoiser(self) -> Denoiser:
        """The network with its schedule and prediction kind.

        Raises:
            ValueError: one sentence for a scheduler that does not fit.
        """
        schedule = self.schedule()
        if schedule.family == "edm":
            raise ValueError(
                "Pipelines with an EDM scheduler are not supported as teachers yet: "
                "wrap the network in edm_precondition."
            )
        return Denoiser(self.network(), schedule, self.prediction_type(schedule))

    def schedule(self) -> Schedule:
        """The scheduler's; where its shift depends on the picture's size (FLUX), that of this size."""
        schedule, config = Schedule.from_diffusers(self.pipeline.scheduler), self._scheduler()
        if schedule.family != "flow" or not config.get("use_dynamic_shifting"):
            return schedule
        return Schedule.flow(Schedule.shift_of_size(config, self.tokens), schedule.num_train_timesteps)

    def prediction_type(self, schedule: Schedule) -> str:
        return "flow" if schedule.family == "flow" else str(self._scheduler().get("prediction_type", "epsilon"))

    def _scheduler(self) -> dict[str, Any]:
        scheduler = self.pipeline.scheduler
        return dict(getattr(scheduler, "config", scheduler))

    # ---------------------------------------------------------------- sizes

    @property
    def latent_channels(self) -> int:
        return int(self.base.config.in_channels)

    @property
    def patch(self) -> int:
        """Side of the latents' square that must not be cut."""
        return int(self.base.config.patch_size)

    @property
    def down(self) -> int:
        """Pixels to a latent's side."""
        vae = getattr(self.pipeline, "vae", None)
        return _DOWN if vae is None else int(2 ** (len(vae.config.block_out_channels) - 1))

    def own_size(self) -> tuple[int, int]:
        """(height, width) of the latents that the model was made for."""
        size = self.base.config.sample_size
        if size is None:
            raise ValueError(f"The {self.part} of this model has no sample_size in its config: write it there.")
        height, width = (size, size) if isinstance(size, int) else size
        return height, width

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the latents.

        Raises:
            ValueError: when neither the network's config nor ``size`` tells it.
        """
        sides = self.own_size() if self.size is None else (self.size // self.down,) * 2
        return self.latent_channels, *sides

    @property
    def multiple(self) -> int:
        """Pixels of which a picture's sides are best multiples."""
        return self.down * self.patch

    @property
    def smallest(self) -> int:
        """A side of latents that is enough to try the network."""
        return 2 * self.patch

    @property
    def tokens(self) -> int:
        """Patches of a picture's latents."""
        _, height, width = self.latent_shape
        return (height // self.patch) * (width // self.patch)

    # ---------------------------------------------------------------- conditions

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Named tensors [B, ...] of what the network is told about each prompt, by the pipeline's own encoding."""
        raise NotImplementedError

    def null(self) -> dict[str, Tensor]:
        """What stands for no prompt, [1, ...] each: as in the pipeline itself, most often the empty prompt."""
        return self.encode([""])

    def pooled_width(self) -> int:
        """Length of a prompt as one vector (`fewstep.models.helpers.pooled_prompt`)."""
        shapes = self.shapes(CLIP_TOKENS)
        return shapes["pooled_embeds" if "pooled_embeds" in shapes else "prompt_embeds"][-1]

    def sizes(self, height: int, width: int) -> dict[str, Tensor]:
        """What the network is told about a picture of this size in pixels, [1, ...] each, with a prompt and without."""
        return {}

    def shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes, without the batch, of what `encode` gives, from the configs alone."""
        raise NotImplementedError

    def conditions(
        self, prompts: Sequence[str], batch_size: int, size: tuple[int, int] | None = None, guided: bool = True
    ) -> Cond:
        """The prompts as the network is told them; ``size`` and ``guided`` as in `Teacher.encode_prompts`."""
        pieces = [self.encode(list(prompts[i : i + batch_size])) for i in range(0, len(prompts), batch_size)]
        tensors = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        return self._with_sizes(tensors, self.null() if guided else None, size)

    def zeros(self, count: int, clip_tokens: int, dtype: torch.dtype, device: str) -> Cond:
        """Conditions of the right shapes, for rehearsals."""
        shapes = self.shapes(clip_tokens)
        given, null = (
            {
                name: torch.zeros(n, *shape, dtype=self._dtype(name, dtype), device=device)
                for name, shape in shapes.items()
            }
            for n in (count, 1)
        )
        return self._with_sizes(given, null)

    @staticmethod
    def _dtype(name: str, dtype: torch.dtype) -> torch.dtype:
        return torch.int64 if name.endswith("_mask") else dtype

    def _with_sizes(
        self, tensors: dict[str, Tensor], null: dict[str, Tensor] | None, size: tuple[int, int] | None = None
    ) -> Cond:
        like = tensors["prompt_embeds"]
        height, width = size or (side * self.down for side in self.latent_shape[1:])
        sizes = {name: t.to(like.device) for name, t in self.sizes(height, width).items()}
        told = {name: t.expand(len(like), *t.shape[1:]).clone() for name, t in sizes.items()}
        return Cond(tensors | told, null=None if null is None else null | sizes)

    def device(self) -> torch.device:
        """Where prompts are encoded."""
        return torch.device(self.base.device)
