"""FLUX.2: a transformer over text and whitened squares of latents, rectified flow; klein (4B, 9B) and dev (32B).

prompt_embeds are three layers of a language model side by side, always 512 tokens: there is no mask, and the padding
takes part in the attention. The null condition is the empty prompt's.

**Latents** are [B, 128, h, w], a pixel of them 16 x 16 of the image: squares of 2 x 2 of the autoencoder's 32 channels,
whitened by the statistics of its batch norm. Data are the posterior's mode, as in the pipeline.

**The shift** of a grid depends on the image's tokens and on the number of steps: 9.89 for 4 steps of 1024 pixels, 7.56
for 50 (`empirical_shift`).

**Guidance.** klein-base takes classifier-free guidance; klein, its few-step student, none. dev was distilled from
guidance and has an embedding of the scale (``guidance_embed``, 4 by default), as FLUX.1-dev.

The network rounds its time to the dtype that it computes in: in bfloat16 steps of 1/256 at t > 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fewstep.diffusion.schedule import Shift
from fewstep.models.cond import Cond
from fewstep.models.families.family import Family
from fewstep.models.families.network import EmbedsGuidance, needed
from fewstep.models.families.packed import Packed, PackedNetwork, pack, unpack

_SQUARE = 2
_TOKENS = 512
_FEW_STEPS = 4  # of klein, the student


class Flux2Network(EmbedsGuidance, PackedNetwork):
    """A diffusers Flux2Transformer2DModel; cond holds prompt_embeds [B, 512, width]."""

    # every linear layer of the blocks, and those before and behind them; the modulations that all blocks share and the
    # time embedding are left alone, for ComfyUI finds no LoRA of them
    lora_targets = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "linear_in",
        "linear_out", "to_qkv_mlp_proj", "to_out", "x_embedder", "context_embedder", "norm_out.linear", "proj_out",
    )  # fmt: skip
    stacks = ("transformer_blocks", "single_transformer_blocks")
    place = 1
    patch_size = 1
    guidance_embed = 4.0

    @property
    def time_embedder(self) -> Any:
        return self.transformer.time_guidance_embed.timestep_embedder  # type: ignore[union-attr]

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Cond | None,
        *,
        guidance_embed: Tensor | None = None,
        extra: Tensor | None = None,
    ) -> Tensor:
        embeds = needed(cond)["prompt_embeds"].to(x.dtype)
        height, width = x.shape[-2:]
        with self._with_extra(extra):
            output = self.transformer(
                hidden_states=pack(x, self.patch_size),
                timestep=t * self.time_scale,
                guidance=self.embedded_scale(t, guidance_embed),
                encoder_hidden_states=embeds,
                txt_ids=torch.cartesian_prod(*_counts(1, 1, 1, embeds.shape[1], device=x.device)),
                img_ids=torch.cartesian_prod(*_counts(1, height, width, 1, device=x.device)),
                return_dict=False,
            )
        return unpack(cast(Tensor, output[0]), height, width, self.patch_size)


def _counts(*lengths: int, device: torch.device) -> list[Tensor]:
    """0, 1, ... of each axis of the positions (image, row, column, token)."""
    return [torch.arange(n, device=device) for n in lengths]


def empirical_shift(count: int, num_steps: int) -> float:
    """The shift of FLUX.2's grids: mu is linear in the tokens at 10 and at 200 steps, and linear in the steps between.

    Beyond 4,300 tokens mu is that of 200 steps (the constants are those of its authors' sampler).
    """
    many, few = 0.00016927 * count + 0.45666666, 8.73809524e-05 * count + 1.89833333
    mu = many if count > 4300 else many + (many - few) / 190 * (num_steps - 200)
    return math.exp(mu)


class Flux2(Packed, Family):
    """FLUX.2-dev."""

    title = "FLUX.2-dev"
    names = ("flux2",)
    network_class = "Flux2Transformer2DModel"
    licences: ClassVar[Mapping[str, str]] = {"black-forest-labs/FLUX.2-dev": "flux-dev-non-commercial-license"}
    configs: ClassVar[Mapping[str, str]] = {"black-forest-labs/FLUX.2-dev": "flux2"}
    guidance_scale = 4.0
    any_scheduler: ClassVar[Mapping[str, Any]] = {"use_dynamic_shifting": True}
    usual_side = 64
    square = 1
    passes_sigmas = True
    text_tokens = _TOKENS
    text_dtype = torch.bfloat16
    comfyui_shift = "ModelSamplingFlux"
    comfyui_networks = False
    comfyui_time_lora = False
    embeds_guidance: ClassVar[bool] = True

    @classmethod
    def is_own(cls, config: Mapping[str, Any]) -> bool:
        return bool(config.get("guidance_embeds", True)) == cls.embeds_guidance

    def _check(self) -> None:
        channels = getattr(self._vae_config, "latent_channels", None)
        if channels is not None and channels * _SQUARE**2 != self.latent_channels:
            raise ValueError(
                f"This {type(self.base).__name__} takes squares of {self.latent_channels // _SQUARE**2} channels, but "
                f"its autoencoder makes {channels}: they are of two models."
            )

    def network(self) -> nn.Module:
        return Flux2Network(self.base)

    @classmethod
    def shift(cls, config: Mapping[str, Any], tokens: int, settings: Mapping[str, Any]) -> Shift:
        return partial(empirical_shift, tokens)

    # ---------------------------------------------------------------- latents

    @property
    def down(self) -> int:
        return super().down * _SQUARE

    @property
    def latent_scale(self) -> tuple[Any, Any]:
        """By the batch norm's statistics, in float32: in bfloat16 1 / std would not be the inverse of std."""
        vae = self.pipeline.vae
        mean, variance = (t.float().view(1, -1, 1, 1) for t in (vae.bn.running_mean, vae.bn.running_var))
        return (variance + vae.config.batch_norm_eps).rsqrt(), mean

    def from_encoder(self, encoded: Tensor) -> Tensor:
        return nn.functional.pixel_unshuffle(encoded, _SQUARE)

    def to_decoder(self, latents: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(latents, _SQUARE).to(self.pipeline.vae.dtype)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The mode alone: the pipeline gives the network no noise of the autoencoder's."""
        mean, std = super().posterior(images)
        return mean, torch.zeros_like(std)

    # ---------------------------------------------------------------- texts

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        embeds, _ = self.pipeline.encode_prompt(list(prompts), device=self.device())
        return {"prompt_embeds": embeds}

    def shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (_TOKENS, int(self.base.config.joint_attention_dim))}


class Klein(Flux2):
    """FLUX.2-klein-base, and its few-step student FLUX.2-klein, of 4B and 9B."""

    title = "FLUX.2-klein"
    names = ("klein",)
    licences: ClassVar[Mapping[str, str]] = {
        "black-forest-labs/FLUX.2-klein-base-4B": "apache-2.0",
        "black-forest-labs/FLUX.2-klein-4B": "apache-2.0",
        "black-forest-labs/FLUX.2-klein-base-9B": "flux-non-commercial-license",
        "black-forest-labs/FLUX.2-klein-9B": "flux-non-commercial-license",
    }
    configs: ClassVar[Mapping[str, str]] = {
        "black-forest-labs/FLUX.2-klein-base-4B": "klein",
        "black-forest-labs/FLUX.2-klein-base-9B": "klein-9b",
    }
    embeds_guidance = False

    @property
    def few_steps(self) -> int | None:
        return _FEW_STEPS if self.settings.get("is_distilled") else None

    def output_latents(self, latents: Tensor) -> Tensor:
        """Those that its autoencoder decodes."""
        factor, shift = self.latent_scale
        return self.to_decoder(latents / factor + shift)
