"""Sana and Sana-Sprint: a linear-attention transformer on the 32-fold compressed latents of a DC-AE, rectified flow.

prompt_embeds are Gemma's states of 300 tokens, prompt_mask marks those that are not padding. As in the pipeline's call,
an instruction of eight lines stands before a prompt while it is encoded, and not before a negative one; the null
condition is the empty negative prompt. The autoencoder is deterministic: there is no posterior.

**Sana-Sprint** was distilled from guidance, and has an embedding of the scale (``guidance_embed``, 4.5 by default).
diffusers runs it by angles (TrigFlow, SCMScheduler). Its network is a plain flow network all the same: with
t = sin a / (sin a + cos a) and the state x = (1 - t) x0 + t eps it predicts eps - x0, and SCM's step of angles is
`renoise`. It takes t itself, where Sana takes 1000 t.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fewstep.models.cond import Cond
from fewstep.models.families.family import Family
from fewstep.models.families.network import EmbedsGuidance, from_squares, needed

_DOWN, _TOKENS = 32, 300
_USUAL_SIDE = 1024  # of its pipeline, whatever the model
_SECOND_ANGLE = 1.3  # of two steps of Sprint's pipeline; the first is pi / 2


class SanaNetwork(EmbedsGuidance):
    """A diffusers SanaTransformer2DModel; cond holds prompt_embeds [B, 300, width] and prompt_mask [B, 300]."""

    lora_targets = (  # every linear layer and 1x1 convolution; the depthwise ones (conv_depth) are left alone
        "to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point", "linear", "linear_1", "linear_2", "proj_out",
    )  # fmt: skip
    guidance_embed = 4.5

    @property
    def time_embedder(self) -> Any:
        embedding: Any = self.transformer.time_embed
        return embedding.timestep_embedder if self.config.guidance_embeds else embedding.emb.timestep_embedder

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Cond | None,
        *,
        guidance_embed: Tensor | None = None,
        extra: Tensor | None = None,
    ) -> Tensor:
        cond, scale = needed(cond), self.embedded_scale(t, guidance_embed)
        embeds = {} if scale is None else {"guidance": scale * self.config.guidance_embeds_scale}
        with self._with_extra(extra):
            output = self.transformer(
                x,
                timestep=t * self.time_scale,
                encoder_hidden_states=cond["prompt_embeds"].to(x.dtype),
                encoder_attention_mask=cond["prompt_mask"],
                return_dict=False,
                **embeds,
            )
        return cast(Tensor, output[0])

    def from_last_layer(self, tokens: Tensor, x: Tensor) -> Tensor:
        """The output for x [B, C, h, w] from what the last layer gives, of any batch."""
        height, width = (side // self.patch_size for side in x.shape[-2:])
        return from_squares(tokens, height, width, self.patch_size)


class Sana(Family):
    """Sana and SANA-1.5, from 512 to 4096 pixels."""

    title = "Sana"
    names = ("sana",)
    network_class = "SanaTransformer2DModel"
    licences: ClassVar[Mapping[str, str]] = {
        "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": "nscl-v2-custom",
        "Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers": "nscl-v2-custom",
    }
    configs: ClassVar[Mapping[str, str]] = {"Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": "sana"}
    guidance_scale = 4.5
    pixels_per_token = _DOWN * _DOWN
    any_scheduler: ClassVar[Mapping[str, Any]] = {"shift": 3.0}
    text_tokens = _TOKENS
    text_dtype = torch.bfloat16
    embeds_guidance: ClassVar[bool] = False

    @classmethod
    def is_own(cls, config: Mapping[str, Any]) -> bool:
        return bool(config.get("guidance_embeds")) == cls.embeds_guidance

    def network(self) -> nn.Module:
        return SanaNetwork(self.base, self.schedule().num_train_timesteps * self.base.config.timestep_scale)

    @property
    def down(self) -> int:
        config = self._vae_config
        return _DOWN if config is None else int(2 ** (len(config.encoder_block_out_channels) - 1))

    def size_arguments(self) -> dict[str, Any]:
        """diffusers would take 1024 pixels for any model, and the nearest of the published sides, and resize."""
        height, width = (side * self.down for side in self.latent_shape[-2:])
        if height == width == _USUAL_SIDE == self.base.config.sample_size * _DOWN:
            return {}
        return {"height": height, "width": width, "use_resolution_binning": False}

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        parameters = inspect.signature(type(self.pipeline).__call__).parameters
        return self._encoded(prompts, parameters["complex_human_instruction"].default)

    def negative(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return self._encoded(prompts, None)

    def _encoded(self, prompts: Sequence[str], instruction: list[str] | None) -> dict[str, Tensor]:
        alone = {} if self.embeds_guidance else {"do_classifier_free_guidance": False}
        embeds, mask, *_ = self.pipeline.encode_prompt(
            list(prompts), device=self.device(), complex_human_instruction=instruction, **alone
        )
        return {"prompt_embeds": embeds, "prompt_mask": mask}

    def shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (_TOKENS, int(self.base.config.caption_channels)), "prompt_mask": (_TOKENS,)}


class SanaSprint(Sana):
    """Sana-Sprint."""

    title = "Sana-Sprint"
    names = ("sprint",)
    licences: ClassVar[Mapping[str, str]] = {}
    configs: ClassVar[Mapping[str, str]] = {}
    flow_schedulers = False  # its pipeline asks for angles, which SCMScheduler alone has
    embeds_guidance = True

    def network(self) -> nn.Module:
        return SanaNetwork(self.base)

    def own_sigmas(self) -> tuple[float, ...]:
        sine, cosine = math.sin(_SECOND_ANGLE), math.cos(_SECOND_ANGLE)
        return 1.0, sine / (sine + cosine)
