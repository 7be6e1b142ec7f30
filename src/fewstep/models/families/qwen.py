"""Qwen-Image: a double-stream transformer over text and packed latents, rectified flow.

**The guidance rule** is the pipeline's: u + s (c - u), and then every token, a square of 2x2 latents, is given back the
length that it has in c (`QwenNetwork.guide`). It acts on the network's own output, the flow, and is not linear in s.

Prompts have no common length: Qwen2.5-VL's states of the template and the prompt, without the template's first 34
tokens. Padding is masked and changes nothing, so only real tokens are kept. The condition without a prompt is that of a
space, which the model's cards give as the negative prompt: the pipeline guides only where one is given.

The shift depends on the number of tokens, and the levels are then stretched to end at ``shift_terminal`` (0.02).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fewstep.models.cond import Cond
from fewstep.models.families.family import Family, pipeline_class
from fewstep.models.families.frames import OneFrame
from fewstep.models.families.network import needed, real_tokens
from fewstep.models.families.packed import Packed, PackedNetwork, pack, unpack

_TOKENS = 512  # of the pipeline's call; its encode_prompt alone would take 1,024


class QwenNetwork(PackedNetwork):
    """A diffusers QwenImageTransformer2DModel; cond holds prompt_embeds [B, tokens, width] and prompt_length [B]."""

    lora_targets = (  # every linear layer: 846
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "net.0.proj",
        "net.2", "img_mod.1", "txt_mod.1", "img_in", "txt_in", "linear", "linear_1", "linear_2", "proj_out",
    )  # fmt: skip
    place = 1

    def guide(self, with_: Tensor, without: Tensor, scale: float | Tensor) -> Tensor:
        """Classifier-free guidance in which every token keeps its length: g |c| / |g|, over 4 C numbers of a square."""
        height, width = (side // self.patch_size for side in with_.shape[-2:])
        guided, plain = pack(without + scale * (with_ - without)), pack(with_)
        length = guided.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(guided.dtype).tiny)
        return unpack(guided * (plain.norm(dim=-1, keepdim=True) / length), height, width)

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None, *, extra: Tensor | None = None) -> Tensor:
        height, width = (side // self.patch_size for side in x.shape[-2:])
        embeds, mask = real_tokens(needed(cond), x)
        with self._with_extra(extra):
            output = self.transformer(
                hidden_states=pack(x),
                timestep=t * self.time_scale,
                encoder_hidden_states=embeds,
                encoder_hidden_states_mask=mask,
                img_shapes=[[(1, height, width)]] * len(x),
                return_dict=False,
            )
        return unpack(cast(Tensor, output[0]), height, width)


class QwenImage(Packed, OneFrame, Family):
    """Qwen-Image, and models with its network that take text alone."""

    title = "Qwen-Image"
    names = ("qwen",)
    network_class = "QwenImageTransformer2DModel"
    licences: ClassVar[Mapping[str, str]] = {"Qwen/Qwen-Image": "apache-2.0"}
    configs: ClassVar[Mapping[str, str]] = {"Qwen/Qwen-Image": "qwen"}
    guidance_scale = 4.0
    usual_side = 128
    passes_sigmas = True
    text_tokens = _TOKENS
    text_dtype = torch.bfloat16
    comfyui_shift = "ModelSamplingAuraFlow"

    def _check(self) -> None:
        config = self.base.config
        if "Edit" in pipeline_class(self.pipeline) or config.zero_cond_t or config.use_layer3d_rope:
            raise ValueError(
                "Models of Qwen-Image that take an image beside the prompt (Edit, Layered) are not supported as "
                "teachers: use Qwen-Image itself."
            )
        super()._check()

    def network(self) -> nn.Module:
        return QwenNetwork(self.base)

    def guidance_arguments(self, scale: float, embedded: float | None) -> dict[str, Any]:
        return true_guidance(scale)

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        embeds, mask = self.pipeline.encode_prompt(
            list(prompts), device=self.device(), max_sequence_length=self.text_tokens
        )
        return {"prompt_embeds": embeds, "prompt_length": lengths(embeds, mask)}

    def null(self) -> dict[str, Tensor]:
        return self.negative([" "])

    def shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        width = int(self.base.config.joint_attention_dim)
        return {"prompt_embeds": (self.text_tokens, width), "prompt_length": ()}


def true_guidance(scale: float) -> dict[str, Any]:
    """Arguments of a call of Qwen's pipelines, which guide by ``true_cfg_scale`` where a negative prompt is given."""
    return {"true_cfg_scale": scale, "negative_prompt": " "} if scale > 1 else {"true_cfg_scale": 1.0}


def lengths(embeds: Tensor, mask: Tensor | None) -> Tensor:
    """Real tokens of texts [B, tokens, width], [B], on the host; no mask stands for no padding."""
    count, tokens = embeds.shape[:2]
    return torch.full((count,), tokens) if mask is None else mask.sum(dim=1).long().cpu()
