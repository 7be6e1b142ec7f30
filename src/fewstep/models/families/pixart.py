"""PixArt-alpha and PixArt-sigma: a diffusion transformer with cross-attention to T5, epsilon on a VP schedule.

prompt_embeds are T5's tokens, prompt_mask marks those that are not padding; the null condition is the encoded empty
prompt. PixArt-alpha at 1024 pixels is also conditioned on the image's ``resolution`` (height, width) and
``aspect_ratio``. The second half of the transformer's output channels, a prediction of the variance, is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fewstep.models.cond import Cond
from fewstep.models.families.family import Family, pipeline_class
from fewstep.models.families.network import TransformerNetwork, needed

_TOKENS = {"alpha": 120, "sigma": 300}


class PixArtNetwork(TransformerNetwork):
    """A diffusers PixArtTransformer2DModel; cond holds prompt_embeds [B, tokens, width], prompt_mask [B, tokens].

    Where it is conditioned on the size, cond holds resolution [B, 2] in pixels and aspect_ratio [B, 1] as well.
    """

    lora_targets = (
        "to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "linear", "linear_1", "linear_2", "proj_out",
    )  # fmt: skip

    @property
    def time_embedder(self) -> Any:
        return self.transformer.adaln_single.emb.timestep_embedder  # type: ignore[union-attr]

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None, *, extra: Tensor | None = None) -> Tensor:
        cond = needed(cond)
        names = ("resolution", "aspect_ratio")
        with self._with_extra(extra):
            output = self.transformer(
                x,
                timestep=t,
                encoder_hidden_states=cond["prompt_embeds"].to(x.dtype),
                encoder_attention_mask=cond["prompt_mask"],
                added_cond_kwargs={name: cond[name].to(x.dtype) if name in cond else None for name in names},
                return_dict=False,
            )
        return cast(Tensor, output[0])[:, : x.shape[1]]


class PixArt(Family):
    """PixArt-alpha and PixArt-sigma."""

    title = "PixArt"
    names = ("pixart",)
    network_class = "PixArtTransformer2DModel"
    comfyui_betas = ("linear", 0.0001, 0.02)

    def network(self) -> nn.Module:
        return PixArtNetwork(self.base)

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        embeds, mask, _, _ = self.pipeline.encode_prompt(list(prompts), False, device=self.device())
        return {"prompt_embeds": embeds, "prompt_mask": mask}

    def sizes(self, height: int, width: int) -> dict[str, Tensor]:
        if not self.base.use_additional_conditions:
            return {}
        resolution = torch.tensor([[float(height), float(width)]])
        return {"resolution": resolution, "aspect_ratio": torch.tensor([[height / width]])}

    def size_arguments(self) -> dict[str, Any]:
        """diffusers would generate at the nearest of the published model's sides, and resize the image."""
        return {} if self.size is None else {"use_resolution_binning": False}

    def shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        tokens = self.text_tokens
        return {"prompt_embeds": (tokens, int(self.base.config.caption_channels)), "prompt_mask": (tokens,)}

    @property
    def text_tokens(self) -> int:  # type: ignore[override]
        return _TOKENS["sigma" if "Sigma" in pipeline_class(self.pipeline) else "alpha"]
