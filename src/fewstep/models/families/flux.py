"""FLUX.1: a transformer over text and packed latents, rectified flow, with a guidance-scale embedding.

**The guidance rule.** FLUX.1-dev was distilled from guidance: it has an embedding of the scale (``guidance_embed``) and
predicts the guided flow in one call. A caller that gives no ``guidance_embed`` gets `FluxNetwork.guidance_embed`, 3.5
by default. ``guidance_scale``, classifier-free guidance on top at twice the cost, should stay 1; where it does not, the
null condition is the empty prompt at the same embedded scale (the pipeline's true_cfg_scale). A student's own
``guidance_embed`` (LCM's w) is the same input. FLUX.1-schnell has no such embedding.

Latents stay [B, 16, h, w] outside; this file packs squares of 2x2 into tokens. The shift of the schedule depends on the
number of tokens (`Family.schedule`): 3.16 at 1024 pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fewstep.models.cond import Cond
from fewstep.models.families.family import Family
from fewstep.models.families.network import TransformerNetwork, needed

_PACKED = 2
_OWN_SIZE = 128  # side in latents: the pipeline's default, which no config holds
_T5_TOKENS = 512


class FluxNetwork(TransformerNetwork):
    """A diffusers FluxTransformer2DModel; cond holds prompt_embeds [B, tokens, width] and pooled_embeds [B, width].

    Attributes:
        guidance_embed: the embedded guidance scale of callers that give none.
    """

    lora_targets = (  # every linear layer: 504
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "net.0.proj",
        "net.2", "linear", "linear_1", "linear_2", "context_embedder", "x_embedder", "proj_mlp", "proj_out",
    )  # fmt: skip
    stacks = ("transformer_blocks", "single_transformer_blocks")
    place = 1
    patch_size = _PACKED
    guidance_embed = 3.5

    def lay_out(self, noise: Tensor) -> Tensor:
        """Noise that diffusers' schedulers draw in the shape of tokens, reshaped to [B, C, h, w] -> latents."""
        height, width = (side // _PACKED for side in noise.shape[-2:])
        return unpack(noise.reshape(len(noise), height * width, -1), height, width)

    @property
    def accepts(self) -> frozenset[str]:
        return frozenset({"guidance_embed"} if self.config.guidance_embeds else ())

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
        height, width = (side // _PACKED for side in x.shape[-2:])
        if self.config.guidance_embeds and guidance_embed is None:
            guidance_embed = torch.full_like(t, self.guidance_embed)
        embeds = cond["prompt_embeds"].to(x.dtype)
        with self._with_extra(extra):
            output = self.transformer(
                hidden_states=pack(x),
                timestep=t * self.time_scale,
                guidance=guidance_embed,
                encoder_hidden_states=embeds,
                pooled_projections=cond["pooled_embeds"].to(x.dtype),
                txt_ids=x.new_zeros(embeds.shape[1], 3),
                img_ids=places(height, width, x),
                return_dict=False,
            )
        return unpack(cast(Tensor, output[0]), height, width)


def pack(x: Tensor) -> Tensor:
    """Latents [B, C, 2h, 2w] -> tokens [B, h w, 4 C], a square of 2x2 each, channel by channel."""
    return nn.functional.pixel_unshuffle(x, _PACKED).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens [B, h w, 4 C] -> latents [B, C, 2h, 2w]."""
    return nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), _PACKED)


def places(height: int, width: int, like: Tensor) -> Tensor:
    """Positions (0, row, column) of the tokens, [h w, 3]."""
    rows = torch.arange(height, device=like.device, dtype=like.dtype).repeat_interleave(width)
    columns = torch.arange(width, device=like.device, dtype=like.dtype).repeat(height)
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=1)


class Flux(Family):
    """FLUX.1-dev, FLUX.1-schnell and models with their network."""

    title = "FLUX.1"
    names = ("flux",)
    network_class = "FluxTransformer2DModel"
    text_encoders = ("text_encoder", "text_encoder_2")
    licences: ClassVar[Mapping[str, str]] = {
        "black-forest-labs/FLUX.1-dev": "flux-1-dev-non-commercial-license",
        "black-forest-labs/FLUX.1-schnell": "apache-2.0",
    }
    passes_sigmas = True
    configs: ClassVar[Mapping[str, str]] = {"black-forest-labs/FLUX.1-dev": "flux"}
    text_tokens = _T5_TOKENS
    comfyui_shift = "ModelSamplingFlux"

    @property
    def architecture(self) -> str:
        return "flux-1-dev" if self.base.config.guidance_embeds else "flux-1-schnell"

    def network(self) -> nn.Module:
        return FluxNetwork(self.base)

    @property
    def latent_channels(self) -> int:
        return int(self.base.config.in_channels) // _PACKED**2

    def output_latents(self, latents: Tensor) -> Tensor:
        return pack(latents)

    @property
    def patch(self) -> int:
        return _PACKED

    def own_size(self) -> tuple[int, int]:
        return _OWN_SIZE, _OWN_SIZE

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        embeds, pooled, _ = self.pipeline.encode_prompt(list(prompts), device=self.device())
        return {"prompt_embeds": embeds, "pooled_embeds": pooled}

    def shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        config: Any = self.base.config
        return {
            "prompt_embeds": (_T5_TOKENS, int(config.joint_attention_dim)),
            "pooled_embeds": (int(config.pooled_projection_dim),),
        }
