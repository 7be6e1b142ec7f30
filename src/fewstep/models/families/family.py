"""The contract of a family: everything that the other rooms need to know about one kind of diffusers pipeline.

A new family is one file with a subclass of `Family` (and its network), and one line in `FAMILIES` of
`fewstep.models.families.registry`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.diffusion.schedule import Schedule, Shift
from fewstep.models.cond import Cond, on_host
from fewstep.models.denoiser import Denoiser
from fewstep.models.families.latents import Latents
from fewstep.models.sharding import device_of

CLIP_TOKENS = 77


@dataclass(frozen=True)
class SingleFile:
    """How a checkpoint of a family in one .safetensors file is recognised and completed.

    Attributes:
        title: its models in words.
        prefix: how names of tensors begin that no other kind of file has.
        configs: folder in ``assets/configs`` with the networks' configs.
        hub: repository of its tokenizers.
    """

    title: str
    prefix: str
    configs: str
    hub: str


class Family(Latents):
    """One kind of diffusers pipeline as a teacher.

    Args:
        pipeline: a loaded pipeline, or any object that has its parts as attributes (`MetaPipeline`'s, on meta).
        size: side of the images in pixels; None takes the model's own.

    Raises:
        ValueError: one sentence when the parts do not make a teacher, or ``size`` does not fit the network.

    Attributes:
        title: the models in words, for "... is not supported as a teacher: use ...".
        names: what `fewstep checkpoints` calls the family's models.
        part: the pipeline's attribute, and folder, of the network that is distilled.
        network_class: class of that network in diffusers.
        text_encoders: the attributes of the text encoders, which are freed once all prompts are encoded and which
            LoRA files may adapt too.
        optional_encoders: those of the text encoders that a pipeline may do without.
        single_file: how its checkpoints in one file are recognised; None: they are not read.
        licences: of base models, by their hub names.
        configs: folders in ``assets/configs`` of base models, by their hub names: for plans without a download.
        guidance_scale: classifier-free guidance of a teacher unless the user gives one (1 is off).
        pixels_per_token: area of one image token in pixels; the shift of a flow schedule may depend on the tokens.
        any_scheduler: config of a scheduler for a network that comes without one.
        passes_sigmas: whether its pipeline passes the levels n/n, ..., 1/n to the scheduler by itself.
        mixes_texts: whether texts of unequal lengths change each other's images in its pipeline.
        flow_schedulers: whether diffusers has few-step schedulers of flow models that work in its pipeline.
        closes_guidance: whether its pipeline runs without guidance, whatever scale it is given, when the network has
            a guidance-scale embedding.
        text_tokens: of a prompt that its longest text encoder reads, where its tokenizer does not set a lower number.
        text_dtype: in which encoded prompts are kept: float16, or bfloat16 for values beyond 65,504.
        kohya_prefix: how names in kohya's LoRA layout begin; empty: that layout is not for this family.
        kohya_bases: `architecture` -> kohya's name of the base model.
        comfyui_embeds_guidance: whether ComfyUI can run a network with a guidance-scale embedding.
        comfyui_betas: kind, first and last beta of ComfyUI's table for its models; None where it has none, or none is
            known here.
        comfyui_shift: node of ComfyUI that sets the shift of a flow model; empty where none is known here.
        comfyui_networks: whether ComfyUI reads a whole network under diffusers' names.
        comfyui_time_lora: whether ComfyUI knows a LoRA's layers of the time embedding.
    """

    title: ClassVar[str]
    names: ClassVar[tuple[str, ...]]
    part: ClassVar[str] = "transformer"
    network_class: ClassVar[str] = ""
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    optional_encoders: ClassVar[tuple[str, ...]] = ()
    single_file: ClassVar[SingleFile | None] = None
    licences: ClassVar[Mapping[str, str]] = {}
    configs: ClassVar[Mapping[str, str]] = {}
    guidance_scale: ClassVar[float] = 3.0
    pixels_per_token: ClassVar[int] = 16 * 16  # an autoencoder with 8 x 8 pixels a latent, and patches of 2 x 2
    any_scheduler: ClassVar[Mapping[str, Any]] = {"shift": 1.0}
    passes_sigmas: ClassVar[bool] = False
    mixes_texts: ClassVar[bool] = False
    flow_schedulers: ClassVar[bool] = True
    closes_guidance: ClassVar[bool] = False
    text_tokens: int = CLIP_TOKENS
    text_dtype: ClassVar[torch.dtype] = torch.float16
    kohya_prefix: ClassVar[str] = ""
    kohya_bases: ClassVar[Mapping[str, str]] = {}
    comfyui_embeds_guidance: ClassVar[bool] = True
    comfyui_betas: ClassVar[tuple[str, float, float] | None] = None
    comfyui_shift: ClassVar[str] = ""
    comfyui_networks: ClassVar[bool] = True
    comfyui_time_lora: ClassVar[bool] = True

    def __init__(self, pipeline: Any, size: int | None = None) -> None:
        self.pipeline, self.size, self._sides = pipeline, size, None
        self._check()
        step = self.side_step
        if size is not None and (size < step or size % step):
            raise ValueError(f"teacher.size must be a multiple of {step} pixels for this model, not {size}.")

    @classmethod
    def fits(cls, pipeline: Any) -> bool:
        """Whether ``pipeline`` is of this family, by the class of its network."""
        network = getattr(pipeline, cls.part, None)
        return type(network).__name__ == cls.network_class and cls.is_own(network.config)  # type: ignore[union-attr]

    @classmethod
    def fits_config(cls, config: Mapping[str, Any]) -> bool:
        """As `fits`, by the network's config.json."""
        return config.get("_class_name") == cls.network_class and cls.is_own(config)

    @classmethod
    def is_own(cls, config: Mapping[str, Any]) -> bool:
        """Whether a network of `network_class` with this config is of this family, where families share the class."""
        return True

    def _check(self) -> None:
        config = self._vae_config
        latents = getattr(config, "latent_channels", getattr(config, "z_dim", None))
        if latents is not None and latents != self.latent_channels:
            raise ValueError(
                f"This {type(self.base).__name__} takes {self.latent_channels} channels, but its autoencoder makes "
                f"{latents}: inpainting, editing and control models are not supported as teachers."
            )

    # ---------------------------------------------------------------- names

    @property
    def name(self) -> str:
        """Which of `names` this model is; empty if it is none of them."""
        return self.names[0]

    @property
    def architecture(self) -> str:
        """modelspec's name of the network (``modelspec.architecture``); its class where modelspec has none."""
        return type(self.base).__name__

    # ---------------------------------------------------------------- networks

    @property
    def base(self) -> Any:
        """The network that is distilled."""
        return getattr(self.pipeline, self.part)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Settings of the pipeline itself, from its index (FLUX.2's is_distilled); empty for a network alone."""
        return dict(getattr(self.pipeline, "config", None) or {})

    @property
    def text_parts(self) -> tuple[str, ...]:
        """The parts that only encode prompts, which are let go once all are encoded."""
        return self.text_encoders

    @property
    def lora_parts(self) -> dict[str, Any]:
        """The modules that LoRA files may adapt, the network first; None for those that this pipeline lacks."""
        return {name: getattr(self.pipeline, name, None) for name in (self.part, *self.text_encoders)}

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
        """The scheduler's; where its shift depends on the image's size, with the shift of this size.

        The stretch to a lowest level is followed where the pipeline passes plain levels (`passes_sigmas`): elsewhere it
        only corrects the scheduler's own.
        """
        schedule, config = Schedule.from_diffusers(self.pipeline.scheduler), self._scheduler()
        if schedule.family != "flow":
            return schedule
        dynamic = config.get("use_dynamic_shifting")
        shift = self.shift(config, self.tokens, self.settings) if dynamic else schedule.shift
        terminal = float(config.get("shift_terminal") or 0.0) if self.passes_sigmas else 0.0
        return Schedule.flow(shift, schedule.num_train_timesteps, terminal)

    @classmethod
    def shift(cls, config: Mapping[str, Any], tokens: int, settings: Mapping[str, Any]) -> Shift:
        """The flow shift for an image of so many tokens, where the scheduler's config leaves it to the pipeline.

        Args:
            settings: as `settings`.
        """
        return Schedule.shift_of_size(config, tokens)

    @property
    def few_steps(self) -> int | None:
        """Steps of a pipeline that says of itself that it is a few-step model, without guidance; None: it does not."""
        return None

    def own_sigmas(self) -> tuple[float, ...] | None:
        """The levels that the pipeline samples at whatever number of steps it is given; None: it has none."""
        return None

    def forget_sampling(self) -> None:
        """Take from the pipeline what it says of its own sampling (`own_sigmas`), before a student is saved in it."""

    def prediction_type(self, schedule: Schedule) -> str:
        return "flow" if schedule.family == "flow" else str(self._scheduler().get("prediction_type", "epsilon"))

    def _scheduler(self) -> dict[str, Any]:
        scheduler = self.pipeline.scheduler
        return dict(getattr(scheduler, "config", scheduler))

    def guidance_arguments(self, scale: float, embedded: float | None) -> dict[str, Any]:
        """Arguments of the pipeline's call for guidance at ``scale`` (1 is off), in the pipeline's own convention.

        Args:
            embedded: scale for the network's guidance-scale embedding, None where it has none; pipelines of
                diffusers take it as ``guidance_scale``, in the place of the other one.
        """
        return {"guidance_scale": scale if embedded is None else embedded}

    # ---------------------------------------------------------------- sizes

    def size_arguments(self) -> dict[str, Any]:
        """Arguments of the pipeline's call without which it would generate images of other sides than `size`."""
        return {}

    # ---------------------------------------------------------------- conditions

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The condition of each prompt as named tensors [B, ...], by the pipeline's own encoding.

        Texts of no common length are padded to the longest of ``prompts``, and ``prompt_length`` [B], int64 on the
        host, says how many tokens of each are real (`Cond`): caches then keep these alone.
        """
        raise NotImplementedError

    def negative(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """As `encode`, of negative prompts, for pipelines that encode them otherwise."""
        return self.encode(prompts)

    def null(self) -> dict[str, Tensor]:
        """The condition without a prompt, [1, ...] each, as the pipeline has it: most often the empty prompt's."""
        return self.negative([""])

    def pooled_width(self) -> int:
        """Length of a prompt as one vector (`fewstep.models.helpers.pooled_prompt`)."""
        shapes = self.shapes(CLIP_TOKENS)
        return shapes["pooled_embeds" if "pooled_embeds" in shapes else "prompt_embeds"][-1]

    def sizes(self, height: int, width: int) -> dict[str, Tensor]:
        """Conditions on the image's size in pixels, [1, ...] each, the same with a prompt and without."""
        return {}

    def shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes, without the batch, of what `encode` returns, from the configs alone."""
        raise NotImplementedError

    def conditions(
        self,
        prompts: Sequence[str],
        batch_size: int,
        size: tuple[int, int] | None = None,
        guided: bool = True,
        negative: bool = False,
    ) -> Cond:
        """The prompts as the network's condition; further arguments as in `Teacher.encode_prompts`."""
        encode = self.negative if negative else self.encode
        pieces = [Cond(encode(list(prompts[i : i + batch_size]))) for i in range(0, len(prompts), batch_size)]
        return self._with_sizes(Cond.cat(pieces).tensors, self.null() if guided else None, size)

    def cut_off(self, prompts: Sequence[str]) -> str:
        """A sentence about prompts that no text encoder reads to their end; empty where there are none."""
        parts = ("tokenizer_3", "tokenizer_2", "tokenizer")  # the last one's encoder reads most
        tokenizer = next((t for t in (getattr(self.pipeline, part, None) for part in parts) if t is not None), None)
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # within a processor of images and text
        most = min(self.text_tokens, int(getattr(tokenizer, "model_max_length", self.text_tokens)))
        # no token is shorter than a byte, and there are at most two special ones
        longer = [text for text in prompts if len(text.encode("utf-8", "replace")) + 2 > most]
        longer = [text for text in longer if tokenizer is not None and len(tokenizer(text)["input_ids"]) > most]
        if not longer:
            return ""
        some = f"{len(longer)} of {len(prompts)} prompts are" if len(prompts) > 1 else "The prompt is"
        read = f"the {most} tokens that the text encoder reads; the rest is ignored"
        return f"{some} longer than {read}: '{longer[0]:.40}…'."

    def zeros(self, count: int, clip_tokens: int, dtype: torch.dtype, device: str) -> Cond:
        """Conditions of zeros in the right shapes, to measure memory with; texts are as long as can be."""
        shapes = self.shapes(clip_tokens)
        given, null = (
            {
                name: torch.full((n,), shapes["prompt_embeds"][0])
                if on_host(name)
                else torch.zeros(n, *shape, dtype=self._dtype(name, dtype), device=device)
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
        height, width = size or (side * self.down for side in self.latent_shape[-2:])
        sizes = {name: t.to(like.device) for name, t in self.sizes(height, width).items()}
        expanded = {name: t.expand(len(like), *t.shape[1:]).clone() for name, t in sizes.items()}
        return Cond(tensors | expanded, null=None if null is None else null | sizes)

    def device(self) -> torch.device:
        """Where the network is, and prompts and images are encoded."""
        return device_of(self.base)


def pipeline_class(pipeline: Any) -> str:
    """Name of a pipeline's class; what stands for a pipeline on the meta device has it as ``name``."""
    return str(getattr(pipeline, "name", "")) or type(pipeline).__name__
