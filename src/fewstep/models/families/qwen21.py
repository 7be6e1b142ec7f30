"""Qwen-Image-2.1 and its Turbo: one causal sequence of text and image tokens, rectified flow, images with alpha.

The image's place in the rotary embedding is the length of the text in the batch, padding counted. Texts of unequal
lengths thus change each other's images in the pipeline; here only rows whose texts have one length are predicted
together, and every image is that of its prompt alone.

The model was distilled from guidance: its scale is 1, one branch. Where guidance is asked for it is the plain one,
without Qwen-Image's lengths. Latents have 64 channels and 16 pixels a side; sides are multiples of 32 pixels. Images
are encoded opaque, and of what is decoded the three colours are kept. **Turbo** is sampled at eight levels of its own
(``sample_sigmas`` of its index), whatever number of steps its pipeline is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fewstep.models.cond import Cond
from fewstep.models.families.family import Family
from fewstep.models.families.frames import OneFrame
from fewstep.models.families.network import needed
from fewstep.models.families.packed import Packed, PackedNetwork, pack, unpack
from fewstep.models.families.qwen import lengths, true_guidance
from fewstep.models.sharding import is_spread

_DOWN = 16  # pixels along a side of a latent, where there is no autoencoder to ask
_SLOT = 2  # side in latents of what the language model sees as one token of an image


class Qwen21Network(PackedNetwork):
    """A diffusers QwenImage21Transformer2DModel; cond holds prompt_embeds [B, tokens, width] and prompt_length [B]."""

    lora_targets = (  # every linear layer: 232
        "to_q", "to_k", "to_v", "to_out.0", "proj", "gate_layer", "out", "img_in", "in_layer", "out_layer",
        "modulation.1", "linear", "linear_1", "linear_2", "proj_out",
    )  # fmt: skip
    patch_size = 1

    def __init__(self, transformer: nn.Module, time_scale: float = 1.0) -> None:
        super().__init__(transformer, time_scale)
        if any(parameter.is_meta for parameter in transformer.parameters()):
            for module in (*self._blocks(), transformer.get_submodule(self.end)):
                module.register_forward_pre_hook(_masks_onto_meta, with_kwargs=True)

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None, *, extra: Tensor | None = None) -> Tensor:
        cond = needed(cond)
        parts = [self._alike(x[r], t[r], cond[r], None if extra is None else extra[r]) for r in self._rows(cond)]
        if len(parts) == 1:
            return parts[0]
        counts = [r.stop - r.start for r in self._rows(cond)]  # a bank gives several mixtures of each group
        by_row = [part.unflatten(0, (-1, count)) for part, count in zip(parts, counts, strict=True)]
        return torch.cat(by_row, dim=1).flatten(0, 1)

    def features(self, x: Tensor, t: Tensor, cond: Cond | None, taps: Iterable[str]) -> list[Tensor]:
        cond, wanted = needed(cond), list(taps)
        found = [super(Qwen21Network, self).features(x[r], t[r], cond[r], wanted) for r in self._rows(cond)]
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    def _rows(self, cond: Cond) -> list[slice]:
        """Neighbouring rows whose texts have one length.

        Each is a row alone where the network is sharded: all processes must call it equally often.
        """
        counts, start, found = cond["prompt_length"].tolist(), 0, []
        for _, group in groupby(enumerate(counts), key=lambda row: row[0] if is_spread(self) else row[1]):
            stop = start + len(list(group))
            found.append(slice(start, stop))
            start = stop
        return found

    def _alike(self, x: Tensor, t: Tensor, cond: Cond, extra: Tensor | None) -> Tensor:
        """The forward for texts of one length."""
        height, width = x.shape[-2:]
        tokens = int(cond["prompt_length"][0])
        if extra is not None and self.config.causal_condition:  # the time embedder sees t = 0 too, for the text
            extra = torch.cat([extra, torch.zeros_like(extra[:1])])
        slots = torch.zeros(1, tokens + height * width // _SLOT**2, dtype=torch.bool)
        slots[:, tokens:] = True
        if not x.is_meta:  # there only a mask on the host says how many tokens there are
            slots = slots.to(x.device, non_blocking=True)
        with self._with_extra(extra), _RepeatsOnMeta() if x.is_meta else nullcontext():
            output = self.transformer(
                hidden_states=pack(x, self.patch_size),
                timestep=t * self.time_scale,
                encoder_hidden_states=cond["prompt_embeds"][:, :tokens].to(x.dtype),
                img_shapes=[[(1, height, width)]] * len(x),
                img_mask=slots,
                return_dict=False,
            )
        return unpack(cast(Tensor, output[0])[:, -height * width :], height, width, self.patch_size)


class _RepeatsOnMeta(TorchFunctionMode):
    """Within it the tensors of the meta device are repeated by numbers on the host, backward too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.repeat_interleave and args[0].is_meta:
            return args[0].index_select(kwargs["dim"], torch.repeat_interleave(args[1]).to("meta"))
        return func(*args, **(kwargs or {}))


def _masks_onto_meta(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A hook of blocks on the meta device: the transformer hands them the mask that it has read on the host."""
    given = [*args, *kwargs.values()]
    if any(isinstance(value, Tensor) and value.is_meta for value in given):
        args = tuple(_onto_meta(value) for value in args)
        kwargs = {name: _onto_meta(value) for name, value in kwargs.items()}
    return args, kwargs


def _onto_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) and value.dtype == torch.bool else value


class QwenImage21(Packed, OneFrame, Family):
    """Qwen-Image-2.1 and Qwen-Image-2.1-Turbo, from text."""

    title = "Qwen-Image-2.1"
    names = ("qwen21",)
    network_class = "QwenImage21Transformer2DModel"
    licences: ClassVar[Mapping[str, str]] = {"Qwen/Qwen-Image-2.1": "apache-2.0"}
    configs: ClassVar[Mapping[str, str]] = {"Qwen/Qwen-Image-2.1": "qwen21"}
    guidance_scale = 1.0
    usual_side = 64
    square = 1
    passes_sigmas = True
    mixes_texts = True
    text_tokens = 512  # in plans: the encoder has no limit
    text_dtype = torch.bfloat16
    comfyui_shift = "ModelSamplingAuraFlow"

    @property
    def text_parts(self) -> tuple[str, ...]:
        return (*self.text_encoders, "processor")

    def network(self) -> nn.Module:
        return Qwen21Network(self.base)

    def own_sigmas(self) -> tuple[float, ...] | None:
        levels = self.settings.get("sample_sigmas")
        return None if levels is None else tuple(map(float, levels))

    def forget_sampling(self) -> None:
        self.pipeline.register_to_config(sample_sigmas=None)

    @property
    def down(self) -> int:
        return _DOWN if self._vae_config is None else super().down

    @property
    def side_step(self) -> int:
        return _SLOT * self.down

    def to_encoder(self, images: Tensor) -> Tensor:
        return super().to_encoder(torch.cat([images, torch.ones_like(images[:, :1])], dim=1))

    def from_decoder(self, decoded: Tensor) -> Tensor:
        return super().from_decoder(decoded)[:, :3]

    def guidance_arguments(self, scale: float, embedded: float | None) -> dict[str, Any]:
        return true_guidance(scale)

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        embeds, mask, _ = self.pipeline.encode_prompt(list(prompts), device=self.device())
        return {"prompt_embeds": embeds, "prompt_length": lengths(embeds, mask)}

    def null(self) -> dict[str, Tensor]:
        return self.negative([" "])

    def shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        width = int(self.base.config.context_in_dim)
        return {"prompt_embeds": (self.text_tokens, width), "prompt_length": ()}
