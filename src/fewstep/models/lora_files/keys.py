"""Names of tensors in LoRA files: what each tensor is, and the layer of which network it belongs to.

A name is a prefix (which network), a layer's name and an ending (what the tensor is). Trainers spell layers in
diffusers' or in the network's original names, with dots or underscores. So every layer is looked up by all of its
names, with underscores throughout, and no layout has to be guessed for the file as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fewstep.models.lora_files.original import Place, original_names

Parts = Mapping[str, Any]
"""The modules that a LoRA may adapt by their names in the pipeline: the network first, then the text encoders."""

_ENDINGS: tuple[tuple[str, str, str], ...] = (  # (what it is, layout, ending)
    ("down", "peft's lora_A", r"\.lora_A(\.[^.]+)?\.weight|\.lora_A"),
    ("up", "peft's lora_A", r"\.lora_B(\.[^.]+)?\.weight|\.lora_B"),
    ("bias", "peft's lora_A", r"\.lora_B(\.[^.]+)?\.bias"),
    ("down", "kohya's lora_down", r"\.lora_down(\.weight)?"),
    ("up", "kohya's lora_down", r"\.lora_up(\.weight)?"),
    ("bias", "kohya's lora_down", r"\.lora_up\.bias"),
    ("mid", "kohya's lora_down", r"\.lora_mid\.weight"),
    ("down", "diffusers' lora.down", r"([._]lora|\.lora_linear_layer|(?<=_lora[12]))\.down\.weight"),
    ("up", "diffusers' lora.down", r"([._]lora|\.lora_linear_layer|(?<=_lora[12]))\.up\.weight"),
    ("alpha", "", r"([._]lora)?\.alpha"),
    ("magnitude", "", r"\.lora_magnitude_vector(\.[^.]+)?(\.weight)?"),
    ("dora_scale", "", r"\.dora_scale"),
    ("diff", "", r"\.diff|\.w_norm"),
    ("diff_b", "", r"\.diff_b|\.b_norm"),
    *((name, "", rf"\.{name}") for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")),
    *((name, "", rf"\.{name}") for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")),
    ("lokr_t2", "", r"\.lokr_t2"),
)  # fmt: skip
_KINDS = [(kind, layout, re.compile(f"(?:{ending})$")) for kind, layout, ending in _ENDINGS]

_FIRST, _SECOND, _THIRD, _T5 = "text_encoder", "text_encoder_2", "text_encoder_3", "T5"
_PREFIXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("lora_te_", (_FIRST,)), ("lora_te1_", (_FIRST,)), ("lora_te2_", (_SECOND,)), ("lora_te3_", (_THIRD, _T5)),
    ("text_encoder_2_", (_SECOND,)), ("text_encoder_3_", (_THIRD,)), ("text_encoder_", (_FIRST,)),
    ("clip_l_", (_FIRST,)), ("clip_h_", (_FIRST,)), ("clip_g_", (_SECOND,)), ("t5xxl_", (_T5,)), ("t5_", (_T5,)),
)  # fmt: skip
"""How names of text encoders' layers begin: of kohya, OneTrainer, diffusers and ComfyUI; and whose they may be."""
_NETWORK = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_", "model_diffusion_model_", "diffusion_model_",
            "unet_", "transformer_", "")  # fmt: skip
"""How names of the network's layers begin; the first is VideoX-Fun's, for a network without a name of its own."""
_AROUND = ("base_model_model_", "text_encoders_", "module_")
"""What programs put before any of these."""
_OLD_CLIP = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


@dataclass(frozen=True)
class Key:
    """A name of a tensor, taken apart.

    Attributes:
        layer: the file's name of the layer. kind: what the tensor is. layout: whose ending it has, where that differs.
    """

    name: str
    layer: str
    kind: str
    layout: str


def take_apart(name: str) -> Key | None:
    """The parts of a tensor's name; None where the ending is none of a LoRA's."""
    for kind, layout, pattern in _KINDS:
        found = pattern.search(name)
        if found is not None:
            return Key(name, name[: found.start()], kind, layout)
    return None


def of_text_encoder(name: str) -> bool:
    """Whether a tensor is of a text encoder's layer, by how its name begins."""
    return spelled(name).startswith(tuple(prefix for prefix, _ in _PREFIXES))


def spelled(layer: str) -> str:
    """A layer's name as all names are looked up: with underscores, without what torch and programs put around it."""
    name = layer.replace("._orig_mod.", ".").replace(".", "_").replace("_processor_", "_")
    for prefix in _AROUND:
        name = name.removeprefix(prefix)
    return name


class Layers:
    """All layers of a pipeline's networks by all of their names.

    Args:
        parts: see `Parts`; those that a pipeline lacks are None.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts, self.network = parts, next(iter(parts))
        self._places = {part: _places(module) for part, module in parts.items() if module is not None}
        t5 = [part for part, module in parts.items() if type(module).__name__.startswith("T5")]
        self._t5 = t5[0] if t5 else _T5

    def find(self, layer: str) -> tuple[str, Place] | None:
        """(the pipeline's part, the place in it) of a layer by its name in a file; None where there is none."""
        name = spelled(layer)
        own = (f"{self.network}_", *_NETWORK)  # a family of one's own may call its network otherwise
        for prefix, parts in (*_PREFIXES, *((prefix, (self.network,)) for prefix in own)):
            if not name.startswith(prefix):
                continue
            rest = name.removeprefix(prefix)
            for part in (self._t5 if part == _T5 else part for part in parts):
                places = self._places.get(part, {})
                place = places.get(rest) or places.get(rest.removeprefix("transformer_"))  # a wrapper of ComfyUI's
                if place is not None:
                    return part, place
        return None

    def missing_part(self, layer: str) -> str:
        """The text encoder that a layer belongs to by its name, where the pipeline lacks it; else empty."""
        name = spelled(layer)
        parts = next((parts for prefix, parts in _PREFIXES if name.startswith(prefix)), (self.network,))
        there = [self._t5 if part == _T5 else part for part in parts]
        return "" if any(self.parts.get(part) is not None for part in there) else there[0]


def _places(module: nn.Module) -> dict[str, Place]:
    """Every name of every layer that has weights, with underscores: diffusers' own first, then the others."""
    found: dict[str, Place] = {}
    own = [name for name, layer in module.named_modules() if name and getattr(layer, "weight", None) is not None]
    for name in own:
        found.setdefault(name.replace(".", "_"), Place((name,)))
    for name in own:
        for other in _other_names(name):
            found.setdefault(other.replace(".", "_"), Place((name,)))
    for other, place in original_names(module):
        found.setdefault(other.replace(".", "_"), place)
    return found


def _other_names(name: str) -> Iterator[str]:
    """Names of a layer in earlier releases of diffusers and transformers."""
    if name.endswith(".to_out.0"):
        yield name.removesuffix(".0")
    for spelled in (name, name.removeprefix("text_model.") if name.startswith("text_model.") else f"text_model.{name}"):
        yield spelled
        head, _, last = spelled.rpartition(".")
        if head.endswith("self_attn") and last in _OLD_CLIP:
            yield f"{head}.{_OLD_CLIP[last]}"
