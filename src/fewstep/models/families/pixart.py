"""PixArt-alpha and PixArt-sigma: a diffusion transformer that looks at T5's tokens, epsilon on a VP schedule.

prompt_embeds are T5's, with prompt_mask of those that are words; no prompt is the empty prompt, encoded. PixArt-alpha
at 1024 pixels is told the picture's ``resolution`` (height, width) and ``aspect_ratio`` too. The transformer's second
half of channels, its guess of the variance, is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fewstep.models.cond import Cond
from fewstep.models.families.family import Family
from fewstep.models.families.network import TransformerNetwork, needed

_TOKENS = {"alpha": 120, "sigma": 300}


class PixArtNetwork(TransformerNetwork):
    """A diffusers PixArtTransformer2DModel; cond holds prompt_embeds [B, tokens, width], prompt_mask [B, tokens].

    Where it wants to know the size, resolution [B, 2] in pixels and aspect_ratio [B, 1] as well.
    """

    lora_targets = (
        "to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "linear", "linear_1", "linear_2", "proj_out",
    )  # fmt: skip

    def _time_embedder(self) -> nn.Module:
        return self.transformer.adaln_single.emb.timestep_embedder  # type: ignore[union-attr,return-value]

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None, *, extra: Tensor | None = None) -> Tensor:
        cond = needed(cond)
        names = ("resolution", "aspect_ratio")
        with self._told(extra):
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

    def shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        sigma = "Sigma" in str(getattr(self.pipeline, "name", ""))  # an outline knows its pipeline's class
        tokens = _TOKENS["sigma" if sigma else "alpha"]
        return {"prompt_embeds": (tokens, int(self.base.config.caption_channels)), "prompt_mask": (tokens,)}
