"""Stable Diffusion 1.x, 2.x and XL: UNets under a text condition.

==========  ===========================================  ===========================================  ============
model       prompt_embeds                                what else it is told                         no prompt
==========  ===========================================  ===========================================  ============
SD 1.x      CLIP-L's last layer, [77, 768]                                                            "" encoded
SD 2.x      OpenCLIP-H's last but one, [77, 1024]                                                     "" encoded
SDXL        both encoders' last but one, [77, 2048]      pooled_embeds [1280], time_ids [6]           zeros, or ""
==========  ===========================================  ===========================================  ============

SDXL's pipeline zeroes the null where its config says ``force_zeros_for_empty_prompt``, as the base model's does.
``time_ids`` are (height, width) of the original, (top, left) of the crop, (height, width) wanted: here always an
uncropped picture of the size that is trained, as the pipeline tells it by default; they stay when the prompt goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fewstep.models.cond import Cond
from fewstep.models.denoiser import check_taps
from fewstep.models.families.family import Family
from fewstep.models.families.network import needed, watched
from fewstep.models.sharding import is_spread

# The layers that LCM-LoRA adapts in a UNet (latent-consistency LoRA report; 788 layers of SDXL).
UNET_LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
_TIME_IDS = 6


class UNetNetwork(nn.Module):
    """A diffusers UNet2DConditionModel in the network contract; cond holds ``prompt_embeds`` [B, tokens, width].

    For SDXL it holds ``pooled_embeds`` [B, width] and ``time_ids`` [B, 6] as well. ``time_scale`` takes native times to
    the UNet's own: 1 for table indices, 1,000 for flow's [0, 1].
    """

    lora_targets = UNET_LORA_TARGETS

    def __init__(self, unet: nn.Module, time_scale: float = 1.0) -> None:
        super().__init__()
        self.unet, self.time_scale = unet, time_scale

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.unet.parameters() if p.is_floating_point())

    @property
    def extra_width(self) -> int:
        """Width of the vector that extra inputs add to the time embedding's input."""
        return int(self.unet.config.block_out_channels[0])  # type: ignore[union-attr,index]

    @property
    def tap_channels(self) -> dict[str, int]:
        """What a discriminator can look at: the output of every down block and of the middle, with its channels."""
        widths: Any = self.unet.config.block_out_channels  # type: ignore[union-attr]
        return {**{f"down{i}": int(c) for i, c in enumerate(widths)}, "mid": int(widths[-1])}

    def features(self, x: Tensor, t: Tensor, cond: Cond | None, taps: Iterable[str]) -> list[Tensor]:
        """Activations [B, C, h, w] at the taps, in their order; the UNet is left at the last of them.

        Spread over processes it runs to its end: all of them must meet at its last layers, too.

        Raises:
            ValueError: for a tap that is not there.
        """
        wanted = check_taps(taps, self.tap_channels)
        blocks: dict[str, nn.Module] = {f"down{i}": b for i, b in enumerate(self.unet.down_blocks)}  # type: ignore[arg-type]
        blocks["mid"] = self.unet.mid_block  # type: ignore[assignment]
        last = None if is_spread(self) else max(wanted, key=list(blocks).index)
        found: dict[str, Tensor] = {}
        with watched({tap: blocks[tap] for tap in wanted}, found, last):  # down blocks give their skips too, second
            self(x, t, cond)
        return [found[tap] for tap in wanted]

    def drop_decoder(self) -> None:
        """Leave out what lies behind the middle block: from then on only `features` make sense."""
        unet: Any = self.unet
        unet.up_blocks = nn.ModuleList()
        unet.conv_norm_out, unet.conv_out = None, nn.Identity()  # spread, a UNet runs to its end

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None, *, extra: Tensor | None = None) -> Tensor:
        cond = needed(cond)
        if extra is not None and self.unet.time_embedding.cond_proj is None:  # type: ignore[union-attr]
            # diffusers adds cond_proj(timestep_cond) to the time embedding; ours arrives projected.
            self.unet.time_embedding.cond_proj = _AsGiven()  # type: ignore[union-attr]
        if self.time_scale != 1:
            t = t * self.time_scale
        more: dict[str, Any] = {}
        if "time_ids" in cond:
            pooled, ids = (cond[name].to(x.dtype) for name in ("pooled_embeds", "time_ids"))
            more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
        embeds = cond["prompt_embeds"].to(x.dtype)
        output = self.unet(x, t, encoder_hidden_states=embeds, timestep_cond=extra, return_dict=False, **more)
        return cast(Tensor, output[0])


class _AsGiven(nn.Module):
    """Stands where diffusers would project timestep_cond."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x, epsilon or v-prediction."""

    part = "unet"

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
        return UNetNetwork(self.base, schedule.num_train_timesteps if schedule.family == "flow" else 1.0)

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        embeds, _ = self.pipeline.encode_prompt(list(prompts), self.device(), 1, False)
        return {"prompt_embeds": embeds}

    def shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (clip_tokens, int(self.base.config.cross_attention_dim))}


class StableDiffusionXL(StableDiffusion):
    """SDXL and what shares its UNet's form (SSD-1B, Segmind-Vega)."""

    def _check(self) -> None:
        super()._check()
        encoder = getattr(self.pipeline, "text_encoder_2", None)
        if encoder is not None and encoder.config.projection_dim != self._pooled():
            raise ValueError(
                "This UNet is told other things than SDXL's base model (a refiner is told how pretty its picture is): "
                "it is not supported as a teacher."
            )

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
