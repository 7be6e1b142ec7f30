"""Stable Diffusion 3 and 3.5: a transformer over text and image together (MM-DiT), rectified flow.

prompt_embeds are CLIP-L's and OpenCLIP-G's tokens side by side, padded to T5's width, followed by 256 tokens of T5;
pooled_embeds are both CLIPs' pooled embeddings. The null condition is the encoded empty prompt. Where T5 is left out,
the pipeline puts zeros in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

from torch import Tensor, nn

from fewstep.models.cond import Cond
from fewstep.models.families.family import Family
from fewstep.models.families.network import TransformerNetwork, needed

_T5_TOKENS = 256


class SD3Network(TransformerNetwork):
    """A diffusers SD3Transformer2DModel; cond holds prompt_embeds [B, tokens, width] and pooled_embeds [B, width]."""

    lora_targets = (  # every linear layer: 340 of SD3's
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        "net.0.proj", "net.2", "linear", "linear_1", "linear_2", "context_embedder", "proj_out",
    )  # fmt: skip
    place = 1

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None, *, extra: Tensor | None = None) -> Tensor:
        cond = needed(cond)
        with self._with_extra(extra):
            output = self.transformer(
                hidden_states=x,
                timestep=t * self.time_scale,
                encoder_hidden_states=cond["prompt_embeds"].to(x.dtype),
                pooled_projections=cond["pooled_embeds"].to(x.dtype),
                return_dict=False,
            )
        return cast(Tensor, output[0])


class StableDiffusion3(Family):
    """SD3 and SD3.5 (medium, large)."""

    title = "Stable Diffusion 3.x"
    names = ("sd3",)
    network_class = "SD3Transformer2DModel"
    text_tokens = _T5_TOKENS
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    optional_encoders = ("text_encoder_3",)
    licences: ClassVar[Mapping[str, str]] = {
        "stabilityai/stable-diffusion-3-medium-diffusers": "stabilityai-ai-community",
        "stabilityai/stable-diffusion-3.5-medium": "stabilityai-ai-community",
        "stabilityai/stable-diffusion-3.5-large": "stabilityai-ai-community",
    }
    comfyui_shift = "ModelSamplingSD3"
    configs: ClassVar[Mapping[str, str]] = {"stabilityai/stable-diffusion-3-medium-diffusers": "sd3"}

    @property
    def architecture(self) -> str:
        return "stable-diffusion-3-medium"

    def network(self) -> nn.Module:
        return SD3Network(self.base, self.schedule().num_train_timesteps)

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        given = list(prompts)
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            given, given, given, device=self.device(), do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds, "pooled_embeds": pooled}

    def shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        config = self.base.config
        return {
            "prompt_embeds": (clip_tokens + _T5_TOKENS, int(config.joint_attention_dim)),
            "pooled_embeds": (int(config.pooled_projection_dim),),
        }
