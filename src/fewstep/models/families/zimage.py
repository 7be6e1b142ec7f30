"""Z-Image and Z-Image-Turbo: one stream of image and text tokens, rectified flow.

The transformer takes a list of images and a list of texts, each of its own length (prompt_embeds [B, tokens, width],
of which prompt_length [B] are real): padded rows would change the image, for the network fills texts up with tokens of
its own. It is told 1 - t and returns x0 - eps, the flow with the other sign.

Guidance counts from 0 in its pipeline: ``guidance_scale`` w there is c + w (c - u), our scale is 1 + w. The null
condition is the empty prompt within the chat template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.models.cond import Cond, padded
from fewstep.models.families.family import Family
from fewstep.models.families.network import TransformerNetwork, from_squares, needed

_TOKENS = 512
_TEMPLATE = 8  # tokens of the chat template around a prompt


class ZImageNetwork(TransformerNetwork):
    """A diffusers ZImageTransformer2DModel; cond holds prompt_embeds [B, tokens, width] and prompt_length [B]."""

    lora_targets = (  # every linear layer: 276
        "to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3", "adaLN_modulation.0", "adaLN_modulation.1", "linear",
        "2-1", "mlp.0", "mlp.2", "cap_embedder.1",
    )  # fmt: skip
    stacks = ("layers",)
    end = "all_final_layer.2-1"
    last_layer = "transformer.all_final_layer.2-1.linear"

    @property
    def patch_size(self) -> int:
        return int(self.config.all_patch_size[0])

    @property
    def width(self) -> int:
        return int(self.config.dim)

    def image_tokens(self, tokens: Tensor, count: int) -> Tensor:
        return tokens[:, :count]

    @property
    def time_embedder(self) -> Any:
        return self.transformer.t_embedder.mlp  # type: ignore[union-attr]

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None, *, extra: Tensor | None = None) -> Tensor:
        cond = needed(cond)
        embeds = cond["prompt_embeds"].to(x.dtype)
        texts = [text[:length] for text, length in zip(embeds, cond["prompt_length"].tolist(), strict=True)]
        with self._with_extra(extra):
            output = self.transformer(list(x.unsqueeze(2)), 1 - t, texts, return_dict=False)[0]
        return -torch.stack(output).squeeze(2)

    def from_last_layer(self, tokens: Tensor, x: Tensor) -> Tensor:
        """The output for x [B, C, h, w] from what the last layer gives, of any batch."""
        height, width = (side // self.patch_size for side in x.shape[-2:])
        return -from_squares(tokens, height, width, self.patch_size)


class ZImage(Family):
    """Z-Image, Z-Image-Turbo and models with their network."""

    title = "Z-Image"
    names = ("zimage",)
    network_class = "ZImageTransformer2DModel"
    licences: ClassVar[Mapping[str, str]] = {
        "Tongyi-MAI/Z-Image": "apache-2.0",
        "Tongyi-MAI/Z-Image-Turbo": "apache-2.0",
    }
    configs: ClassVar[Mapping[str, str]] = {"Tongyi-MAI/Z-Image": "zimage"}
    guidance_scale = 5.0  # its card's 4, counted from 0
    any_scheduler: ClassVar[Mapping[str, Any]] = {"shift": 6.0}
    usual_side = 128
    passes_sigmas = True
    text_tokens = _TOKENS - _TEMPLATE
    text_dtype = torch.bfloat16
    comfyui_shift = "ModelSamplingAuraFlow"

    def _check(self) -> None:
        if self.base.config.siglip_feat_dim is not None:  # its sequences begin with the text
            raise ValueError(
                "Z-Image models that take images beside the prompt (Omni, Edit) are not supported as teachers: use "
                "Z-Image itself."
            )
        super()._check()

    def network(self) -> nn.Module:
        return ZImageNetwork(self.base)

    @property
    def patch(self) -> int:
        return int(self.base.config.all_patch_size[0])

    def guidance_arguments(self, scale: float, embedded: float | None) -> dict[str, Any]:
        return {"guidance_scale": scale - 1}

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        texts, _ = self.pipeline.encode_prompt(  # which writes its template into the list that it is given
            list(prompts), device=self.device(), do_classifier_free_guidance=False
        )
        embeds = torch.cat(padded([text[None] for text in texts]))
        return {"prompt_embeds": embeds, "prompt_length": torch.tensor([len(text) for text in texts])}

    def shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (_TOKENS, int(self.base.config.cap_feat_dim)), "prompt_length": ()}
