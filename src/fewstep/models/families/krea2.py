"""Krea 2 (Raw and Turbo): one stream of text and packed latents, rectified flow.

Prompts are states of twelve layers of Qwen3-VL for every token (prompt_embeds [B, tokens, states, width], of which
prompt_length [B] are real), which the network itself joins to one. The pipeline pads in the middle, before the end of
the template; positions count real tokens alone and padding is masked, so only real tokens are kept here.

Guidance counts from 0 in its pipeline: ``guidance_scale`` w there is c + w (c - u), our scale is 1 + w. The shift
depends on the number of tokens; a distilled model (``is_distilled`` of its index) has that of mu 1.15 at every size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fewstep.diffusion.schedule import Shift
from fewstep.models.cond import Cond, padded
from fewstep.models.families.family import Family
from fewstep.models.families.frames import OneFrame
from fewstep.models.families.network import added_to_time, needed, real_tokens
from fewstep.models.families.packed import Packed, PackedNetwork, pack, places, unpack

_TOKENS = 512
_SUFFIX = 5  # tokens of the chat template behind a prompt; those before it are dropped
_DISTILLED_MU, _DISTILLED_STEPS = 1.15, 8


class Krea2Network(PackedNetwork):
    """A diffusers Krea2Transformer2DModel; cond: prompt_embeds [B, tokens, states, width] and prompt_length [B]."""

    lora_targets = (  # every linear layer but text_fusion.projector, which joins twelve states to one: 263
        "to_q", "to_k", "to_v", "to_gate", "to_out.0", "gate", "up", "down", "img_in", "linear", "linear_1", "linear_2",
        "time_mod_proj",
    )  # fmt: skip
    end = "final_layer"
    last_layer = "transformer.final_layer.linear"

    @property
    def time_embedder(self) -> Any:
        return self.transformer.time_embed.linear_1  # type: ignore[union-attr]

    def _with_extra(self, extra: Tensor | None) -> AbstractContextManager[None]:
        return added_to_time(self.time_embedder, None if extra is None else extra[:, None])

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None, *, extra: Tensor | None = None) -> Tensor:
        height, width = (side // self.patch_size for side in x.shape[-2:])
        embeds, mask = real_tokens(needed(cond), x)
        of_image = places(height, width, x.new_empty(0, dtype=torch.float32))
        with self._with_extra(extra):
            output = self.transformer(
                hidden_states=pack(x),
                encoder_hidden_states=embeds,
                timestep=t,
                position_ids=torch.cat([of_image.new_zeros(embeds.shape[1], 3), of_image]),
                encoder_attention_mask=mask,
                return_dict=False,
            )
        return unpack(cast(Tensor, output[0]), height, width)


class Krea2(Packed, OneFrame, Family):
    """Krea 2 Raw, Krea 2 Turbo and models with their network."""

    title = "Krea 2"
    names = ("krea2",)
    network_class = "Krea2Transformer2DModel"
    licences: ClassVar[Mapping[str, str]] = {
        "krea/Krea-2-Raw": "krea-2-community-license",
        "krea/Krea-2-Turbo": "krea-2-community-license",
    }
    configs: ClassVar[Mapping[str, str]] = {"krea/Krea-2-Raw": "krea2"}
    guidance_scale = 4.5  # Raw's card: 3.5, counted from 0
    usual_side = 128
    passes_sigmas = True
    text_tokens = _TOKENS - _SUFFIX
    text_dtype = torch.bfloat16
    comfyui_shift = "ModelSamplingAuraFlow"
    comfyui_networks = False  # it knows diffusers' names of its LoRAs alone

    @classmethod
    def shift(cls, config: Mapping[str, Any], tokens: int, settings: Mapping[str, Any]) -> Shift:
        return math.exp(_DISTILLED_MU) if settings.get("is_distilled") else super().shift(config, tokens, settings)

    @property
    def few_steps(self) -> int | None:
        return _DISTILLED_STEPS if self.settings.get("is_distilled") else None

    def network(self) -> nn.Module:
        return Krea2Network(self.base)

    def guidance_arguments(self, scale: float, embedded: float | None) -> dict[str, Any]:
        return {"guidance_scale": scale - 1}

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        embeds, masks = self.pipeline.encode_prompt(list(prompts), device=self.device())
        texts = [text[real] for text, real in zip(embeds, masks, strict=True)]  # the padding is not at their ends
        joined = torch.cat(padded([text[None] for text in texts]))
        return {"prompt_embeds": joined, "prompt_length": torch.tensor([len(text) for text in texts])}

    def shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        config: Any = self.base.config
        of_token = int(config.num_text_layers), int(config.text_hidden_dim)
        return {"prompt_embeds": (_TOKENS, *of_token), "prompt_length": ()}
