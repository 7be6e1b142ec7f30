"""Chroma: FLUX.1's blocks with one small network for all modulations, and guidance of its own.

prompt_embeds are 512 tokens of T5. **prompt_bias** is 1 for the text and one token of padding behind it, else 0; the
pipeline hands it over as a float mask, which attention *adds* to its scores: padding takes part, e times less. Chroma
is sampled so, and so it is called here: cut off or masked out, the padding gives other images.

diffusers' network has two more faults, around which this file works (`ChromaNetwork`): gradient checkpointing drops the
mask in the single blocks, and the places of all modulations are counted from the number of blocks that there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fewstep.models.cond import Cond
from fewstep.models.families.family import Family
from fewstep.models.families.network import added_to_time, needed
from fewstep.models.families.packed import Packed, PackedNetwork, pack, places, unpack

_T5_TOKENS = 512


class ChromaNetwork(PackedNetwork):
    """A diffusers ChromaTransformer2DModel; cond holds prompt_embeds [B, 512, width] and prompt_bias [B, 512]."""

    lora_targets = (  # FLUX.1's; the network of the modulations is left alone, for ComfyUI finds no LoRA of it
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "net.0.proj",
        "net.2", "context_embedder", "x_embedder", "proj_mlp", "proj_out",
    )  # fmt: skip
    stacks = ("transformer_blocks", "single_transformer_blocks")
    place = 1

    @property
    def extra_width(self) -> int:  # type: ignore[override]
        return int(self.config.approximator_num_channels)

    @property
    def time_embedder(self) -> Any:
        """The network of the modulations: it reads the time's sinusoids once for each of them."""
        return self.transformer.distilled_guidance_layer

    def _with_extra(self, extra: Tensor | None) -> AbstractContextManager[None]:
        return added_to_time(self.time_embedder, None if extra is None else extra[:, None])

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None, *, extra: Tensor | None = None) -> Tensor:
        cond = needed(cond)
        height, width = (side // self.patch_size for side in x.shape[-2:])
        embeds = cond["prompt_embeds"].to(x.dtype)
        mask = torch.cat([cond["prompt_bias"].to(x.dtype), x.new_ones(len(x), height * width)], dim=1)
        with self._with_extra(extra), self._checkpointing(mask):
            output = self.transformer(
                hidden_states=pack(x),
                timestep=t * self.time_scale,
                encoder_hidden_states=embeds,
                txt_ids=x.new_zeros(embeds.shape[1], 3),
                img_ids=places(height, width, x),
                attention_mask=mask,
                return_dict=False,
            )
        return unpack(cast(Tensor, output[0]), height, width)

    @contextmanager
    def _checkpointing(self, mask: Tensor) -> Iterator[None]:
        """Within this block checkpointed single blocks get the mask, which diffusers forgets to hand over to them."""
        transformer: Any = self.transformer
        given = getattr(transformer, "_gradient_checkpointing_func", None)
        singles = set(map(id, transformer.single_transformer_blocks))

        def checkpoint(block: nn.Module, *args: Any) -> Any:
            forgotten = id(block) in singles and len(args) == 3  # states, modulation, positions
            return given(block, *args, *((mask,) if forgotten else ()))  # type: ignore[misc]

        if given is not None:
            transformer._gradient_checkpointing_func = checkpoint
        try:
            yield
        finally:
            if given is not None:
                transformer._gradient_checkpointing_func = given

    @contextmanager
    def _cut(self, count: int) -> Iterator[None]:
        """As elsewhere, but blocks stay in number: where the modulation of each is found depends on it."""
        transformer: Any = self.transformer
        all_of_them = {stack: len(getattr(transformer, stack)) for stack in self.stacks}
        with super()._cut(count):
            for stack, number in all_of_them.items():
                kept = getattr(transformer, stack)
                passed = [_Passed(pair=stack == self.stacks[0]) for _ in range(number - len(kept))]
                setattr(transformer, stack, nn.ModuleList([*kept, *passed]))
            yield


class _Passed(nn.Module):
    """In the place of a block that is not run: the states as they are, in a ``pair`` after those of the text."""

    def __init__(self, pair: bool) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *_: Any, **__: Any) -> Any:
        return (encoder_hidden_states, hidden_states) if self.pair else hidden_states


class Chroma(Packed, Family):
    """Chroma1-HD, Chroma1-Base and models with their network."""

    title = "Chroma"
    names = ("chroma",)
    network_class = "ChromaTransformer2DModel"
    licences: ClassVar[Mapping[str, str]] = {
        "lodestones/Chroma1-HD": "apache-2.0",
        "lodestones/Chroma1-Base": "apache-2.0",
    }
    configs: ClassVar[Mapping[str, str]] = {"lodestones/Chroma1-HD": "chroma"}
    guidance_scale = 5.0
    usual_side = 128
    passes_sigmas = True
    text_tokens = _T5_TOKENS
    comfyui_shift = "ModelSamplingFlux"
    comfyui_networks = False
    comfyui_time_lora = False

    def network(self) -> nn.Module:
        return ChromaNetwork(self.base)

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        embeds, _, bias, *_ = self.pipeline.encode_prompt(
            list(prompts), device=self.device(), do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds, "prompt_bias": bias}

    def shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (_T5_TOKENS, int(self.base.config.joint_attention_dim)), "prompt_bias": (_T5_TOKENS,)}
