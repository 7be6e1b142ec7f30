"""Stable Diffusion 1.x, 2.x and XL: UNets under a text condition.

==========  ===========================================  ===========================================  ============
model       prompt_embeds                                other conditions                             null
==========  ===========================================  ===========================================  ============
SD 1.x      CLIP-L's last layer, [77, 768]                                                            "" encoded
SD 2.x      OpenCLIP-H's last but one, [77, 1024]                                                     "" encoded
SDXL        both encoders' last but one, [77, 2048]      pooled_embeds [1280], time_ids [6]           zeros, or ""
==========  ===========================================  ===========================================  ============

SDXL's pipeline zeroes the null where its config has ``force_zeros_for_empty_prompt``, as the base model's does.
``time_ids`` are (height, width) of the original, (top, left) of the crop, (height, width) of the target: here always an
uncropped image of the training size, the pipeline's default. They are the same with a prompt and without.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.models.cond import Cond
from fewstep.models.denoiser import check_taps
from fewstep.models.extras import sinusoid
from fewstep.models.families.family import Family, SingleFile
from fewstep.models.families.network import added_to_time, needed, watched
from fewstep.models.sharding import is_spread

# The layers that LCM-LoRA adapts in a UNet (latent-consistency LoRA report; 788 layers of SDXL).
UNET_LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
_TIME_IDS = 6
CLOSED_WIDTH = 4  # of the embedding that `fewstep.export.pipeline.close_guidance` adds: diffusers divides by half - 1
LCM_SCALE = 8.5  # the guidance scale of diffusers' LatentConsistencyModelPipeline where its call gives none
_SDXL_WIDTH, _SSD_1B_DEPTH = 2048, 4  # of the prompts; transformer blocks at the lowest resolution


class UNetNetwork(nn.Module):
    """A diffusers UNet2DConditionModel in the network contract; cond holds ``prompt_embeds`` [B, tokens, width].

    For SDXL it holds ``pooled_embeds`` [B, width] and ``time_ids`` [B, 6] as well.

    Args:
        time_scale: native times are multiplied by it: 1 for table indices, 1,000 for flow's [0, 1].

    Attributes:
        guidance_embed: the embedded guidance scale of callers that give none, where the UNet has such an embedding
            (``time_cond_proj_dim``, the published LCM models').
        casts_inputs: as of `fewstep.models.families.network.TransformerNetwork`.
    """

    lora_targets = UNET_LORA_TARGETS
    last_layer = "unet.conv_out"
    casts_inputs = True

    def __init__(self, unet: nn.Module, time_scale: float = 1.0, guidance_embed: float = LCM_SCALE) -> None:
        super().__init__()
        self.unet, self.time_scale, self.guidance_embed = unet, time_scale, guidance_embed

    @property
    def accepts(self) -> frozenset[str]:
        return frozenset({"guidance_embed"} if embeds_guidance(self.unet) else ())

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.unet.parameters() if p.is_floating_point())

    @property
    def extra_width(self) -> int:
        """Width of the vector that extra inputs add to the time embedding's input."""
        return int(self.unet.config.block_out_channels[0])  # type: ignore[union-attr,index]

    @property
    def time_embedder(self) -> Any:
        """The module that turns sinusoids of the time [B, `extra_width`] into its embedding, first by ``linear_1``."""
        return self.unet.time_embedding

    @property
    def tap_channels(self) -> dict[str, int]:
        """Features for a discriminator: the output of every down block and of the middle block, with its channels.

        Some small UNets (Segmind's small-sd, SSD-1B and Vega) have no middle block.
        """
        widths: Any = self.unet.config.block_out_channels  # type: ignore[union-attr]
        middle = {"mid": int(widths[-1])} if self.unet.mid_block is not None else {}
        return {**{f"down{i}": int(c) for i, c in enumerate(widths)}, **middle}

    def features(self, x: Tensor, t: Tensor, cond: Cond | None, taps: Iterable[str]) -> list[Tensor]:
        """Activations [B, C, h, w] at the taps, in their order; the forward ends at the last of them.

        A network that is sharded over processes runs to its end: all processes must reach each of its layers.

        Raises:
            ValueError: for an unknown tap.
        """
        wanted = check_taps(taps, self.tap_channels)
        blocks: dict[str, nn.Module] = {f"down{i}": b for i, b in enumerate(self.unet.down_blocks)}  # type: ignore[arg-type]
        if self.unet.mid_block is not None:
            blocks["mid"] = self.unet.mid_block  # type: ignore[assignment]
        last = None if is_spread(self) else max(wanted, key=list(blocks).index)
        found: dict[str, Tensor] = {}
        with watched({tap: blocks[tap] for tap in wanted}, found, last):  # down blocks return (output, skips)
            self(x, t, cond)
        return [found[tap] for tap in wanted]

    def drop_decoder(self) -> None:
        """Remove everything after the middle block: from then on only `features` may be called."""
        unet: Any = self.unet
        unet.up_blocks = nn.ModuleList()
        unet.conv_norm_out, unet.conv_out = None, nn.Identity()  # a sharded UNet runs to its end

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Cond | None,
        *,
        guidance_embed: Tensor | None = None,
        extra: Tensor | None = None,
    ) -> Tensor:
        cond = needed(cond)
        if self.accepts:
            usual = torch.full_like(t, self.guidance_embed, dtype=torch.float32)
            w = usual if guidance_embed is None else guidance_embed
            embedded = sinusoid(1000 * (w - 1), int(self.unet.config.time_cond_proj_dim)).to(x.dtype)  # type: ignore[union-attr,arg-type]
            with added_to_time(self.time_embedder, extra):
                return self._called(x, t, cond, embedded)
        if extra is not None and self.time_embedder.cond_proj is None:
            # diffusers adds cond_proj(timestep_cond) to the time embedding; ours arrives projected.
            self.time_embedder.cond_proj = _AsGiven()
        return self._called(x, t, cond, None if extra is None else extra.to(x.dtype))

    def _called(self, x: Tensor, t: Tensor, cond: Cond, timestep_cond: Tensor | None) -> Tensor:
        if self.time_scale != 1:
            t = t * self.time_scale
        more: dict[str, Any] = {}
        if "time_ids" in cond:
            pooled, ids = (cond[name].to(x.dtype) for name in ("pooled_embeds", "time_ids"))
            more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
        embeds = cond["prompt_embeds"].to(x.dtype)
        output = self.unet(x, t, encoder_hidden_states=embeds, timestep_cond=timestep_cond, return_dict=False, **more)
        return cast(Tensor, output[0])


def embeds_guidance(unet: Any) -> bool:
    """Whether a UNet has a guidance-scale embedding, which it was trained with.

    An export that closes guidance has one of `CLOSED_WIDTH` and zeros, which no scale can change.
    """
    layer = getattr(getattr(unet, "time_embedding", None), "cond_proj", None)
    if not isinstance(layer, nn.Linear):
        return False
    return layer.in_features != CLOSED_WIDTH or (not layer.weight.is_meta and bool(layer.weight.any()))


class _AsGiven(nn.Module):
    """In the place of diffusers' projection of timestep_cond: the identity."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x, epsilon or v-prediction."""

    title = "Stable Diffusion 1.x or 2.x"
    names: ClassVar[tuple[str, ...]] = ("sd1", "sd2")
    part = "unet"
    network_class = "UNet2DConditionModel"
    single_file = SingleFile(
        "SD 1.x", "cond_stage_model.transformer.", "sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5"
    )
    licences: ClassVar[Mapping[str, str]] = {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
        "stabilityai/stable-diffusion-2-1": "openrail++",
        "stabilityai/stable-diffusion-2-1-base": "openrail++",
    }
    configs: ClassVar[Mapping[str, str]] = {"stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15"}
    any_scheduler: ClassVar[Mapping[str, Any]] = {"beta_schedule": "scaled_linear"}
    flow_schedulers = False
    closes_guidance = True
    kohya_prefix = "lora_unet_"
    kohya_bases: ClassVar[Mapping[str, str]] = {"stable-diffusion-v1": "sd_v1"}
    comfyui_embeds_guidance = False
    comfyui_betas = ("scaled_linear", 0.00085, 0.012)
    comfyui_shift = "ModelSamplingSD3"
    addition_embed_type: ClassVar[str | None] = None
    """The UNet config's entry for conditions beside the prompt."""

    @classmethod
    def fits(cls, pipeline: Any) -> bool:
        unet = getattr(pipeline, cls.part, None)
        added = getattr(getattr(unet, "config", None), "addition_embed_type", None)
        return unet is not None and added == cls.addition_embed_type

    @classmethod
    def is_own(cls, config: Mapping[str, Any]) -> bool:
        return config.get("addition_embed_type") == cls.addition_embed_type

    @property
    def name(self) -> str:
        return {768: "sd1", 1024: "sd2"}.get(self.base.config.cross_attention_dim, "")

    @property
    def architecture(self) -> str:
        """By the width of the prompts, which pruned models (BK-SDM, tiny-sd) keep while they leave out blocks."""
        wide = (self.base.config.sample_size or 64) > 64
        second = "stable-diffusion-v2-768-v" if wide else "stable-diffusion-v2-512"
        return {"sd1": "stable-diffusion-v1", "sd2": second}.get(self.name, super().architecture)

    @property
    def patch(self) -> int:
        return 1

    @property
    def multiple(self) -> int:
        return int(self.down * 2 ** (len(self.base.config.block_out_channels) - 1))

    @property
    def smallest(self) -> int:
        return int(2 ** len(self.base.config.block_out_channels))

    def network(self) -> nn.Module:
        schedule = self.schedule()
        return UNetNetwork(
            self.base, schedule.num_train_timesteps if schedule.family == "flow" else 1.0, self._usual_scale()
        )

    def _usual_scale(self) -> float:
        """The guidance scale that this kind of pipeline embeds where its call gives none."""
        parameters = inspect.signature(type(self.pipeline).__call__).parameters
        return float(parameters["guidance_scale"].default) if "guidance_scale" in parameters else LCM_SCALE

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        embeds, _ = self.pipeline.encode_prompt(list(prompts), self.device(), 1, False)
        return {"prompt_embeds": embeds}

    def shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (clip_tokens, int(self.base.config.cross_attention_dim))}


class StableDiffusionXL(StableDiffusion):
    """SDXL and smaller models of its UNet's form (SSD-1B, Segmind-Vega)."""

    title = "Stable Diffusion XL"
    names = ("sdxl",)
    text_encoders = ("text_encoder", "text_encoder_2")
    single_file = SingleFile(
        "SDXL", "conditioner.embedders.1.model.", "sdxl", "stabilityai/stable-diffusion-xl-base-1.0"
    )
    licences: ClassVar[Mapping[str, str]] = {"stabilityai/stable-diffusion-xl-base-1.0": "openrail++"}
    configs: ClassVar[Mapping[str, str]] = {"stabilityai/stable-diffusion-xl-base-1.0": "sdxl"}
    flow_schedulers = True
    kohya_bases: ClassVar[Mapping[str, str]] = {
        "stable-diffusion-xl-v1-base": "sdxl_base_v1-0",
        "segmind-stable-diffusion-1b": "sdxl_base_v1-0",
    }
    addition_embed_type = "text_time"

    @property
    def name(self) -> str:
        return "sdxl"

    @property
    def architecture(self) -> str:
        """That of the base model for pruned ones too (Segmind-Vega, KOALA), but for SSD-1B, which has its own name."""
        config = self.base.config
        if config.cross_attention_dim != _SDXL_WIDTH:
            return type(self.base).__name__
        depths = config.transformer_layers_per_block  # one for all levels, or one a level, or one a block of each
        deepest = depths[-1] if isinstance(depths, list | tuple) else depths
        return (
            "segmind-stable-diffusion-1b"
            if set(np.ravel(deepest)) == {_SSD_1B_DEPTH}
            else "stable-diffusion-xl-v1-base"
        )

    def _check(self) -> None:
        super()._check()
        encoder = getattr(self.pipeline, "text_encoder_2", None)
        if encoder is not None and encoder.config.projection_dim != self._pooled():
            raise ValueError(
                "This UNet has other conditions than SDXL's base model (a refiner has an aesthetic score): it is not "
                "supported as a teacher."
            )

    @property
    def latent_scale(self) -> tuple[Any, Any]:
        """As `Family.latent_scale`, for an autoencoder that normalises every channel too.

        SDXL's pipelines alone follow an autoencoder's ``latents_mean`` and ``latents_std`` (Playground's has them).
        """
        config, (factor, shift) = self._vae_config, super().latent_scale
        found = [getattr(config, name, None) for name in ("latents_mean", "latents_std")]
        if None in found:
            return factor, shift
        mean, std = map(self.per_channel, found)
        return factor / std, mean

    def _pooled(self) -> int:
        config = self.base.config
        return int(config.projection_class_embeddings_input_dim - _TIME_IDS * config.addition_time_embed_dim)

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.device(), do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds, "pooled_embeds": pooled}

    def null(self) -> dict[str, Tensor]:
        _, embeds, _, pooled = self.pipeline.encode_prompt("", device=self.device(), do_classifier_free_guidance=True)
        return {"prompt_embeds": embeds, "pooled_embeds": pooled}

    def sizes(self, height: int, width: int) -> dict[str, Tensor]:
        sides = (height, width)
        return {"time_ids": torch.tensor([[*sides, 0, 0, *sides]])}

    def shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(clip_tokens), "pooled_embeds": (self._pooled(),)}
