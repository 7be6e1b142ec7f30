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

from torch import Tensor, nn

from fewstep.models.cond import Cond
from fewstep.models.families.family import Family
from fewstep.models.families.network import EmbedsGuidance, needed
from fewstep.models.families.packed import Packed, PackedNetwork, pack, places, unpack

_T5_TOKENS = 512


class FluxNetwork(EmbedsGuidance, PackedNetwork):
    """A diffusers FluxTransformer2DModel; cond holds prompt_embeds [B, tokens, width] and pooled_embeds [B, width]."""

    lora_targets = (  # every linear layer: 504
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "net.0.proj",
        "net.2", "linear", "linear_1", "linear_2", "context_embedder", "x_embedder", "proj_mlp", "proj_out",
    )  # fmt: skip
    stacks = ("transformer_blocks", "single_transformer_blocks")
    place = 1
    guidance_embed = 3.5

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
        height, width = (side // self.patch_size for side in x.shape[-2:])
        embeds = cond["prompt_embeds"].to(x.dtype)
        with self._with_extra(extra):
            output = self.transformer(
                hidden_states=pack(x),
                timestep=t * self.time_scale,
                guidance=self.embedded_scale(t, guidance_embed),
                encoder_hidden_states=embeds,
                pooled_projections=cond["pooled_embeds"].to(x.dtype),
                txt_ids=x.new_zeros(embeds.shape[1], 3),
                img_ids=places(height, width, x),
                return_dict=False,
            )
        return unpack(cast(Tensor, output[0]), height, width)


class Flux(Packed, Family):
    """FLUX.1-dev, FLUX.1-schnell and models with their network."""

    title = "FLUX.1"
    names = ("flux",)
    network_class = "FluxTransformer2DModel"
    text_encoders = ("text_encoder", "text_encoder_2")
    licences: ClassVar[Mapping[str, str]] = {
        "black-forest-labs/FLUX.1-dev": "flux-1-dev-non-commercial-license",
        "black-forest-labs/FLUX.1-schnell": "apache-2.0",
    }
    usual_side = 128
    passes_sigmas = True
    configs: ClassVar[Mapping[str, str]] = {"black-forest-labs/FLUX.1-dev": "flux"}
    text_tokens = _T5_TOKENS
    comfyui_shift = "ModelSamplingFlux"

    @property
    def architecture(self) -> str:
        return "flux-1-dev" if self.base.config.guidance_embeds else "flux-1-schnell"

    def network(self) -> nn.Module:
        return FluxNetwork(self.base)

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        embeds, pooled, _ = self.pipeline.encode_prompt(list(prompts), device=self.device())
        return {"prompt_embeds": embeds, "pooled_embeds": pooled}

    def shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        config: Any = self.base.config
        return {
            "prompt_embeds": (_T5_TOKENS, int(config.joint_attention_dim)),
            "pooled_embeds": (int(config.pooled_projection_dim),),
        }
