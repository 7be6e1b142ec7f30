"""Which family a file of weights is for, by names and shapes of its tensors: a wrong base is named before it loads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fewstep.models.families.chroma import Chroma
from fewstep.models.families.family import Family
from fewstep.models.families.flux import Flux
from fewstep.models.families.flux2 import Flux2, Klein
from fewstep.models.families.krea2 import Krea2
from fewstep.models.families.load import expanded, parts_of, shipped
from fewstep.models.families.pixart import PixArt
from fewstep.models.families.qwen import QwenImage
from fewstep.models.families.qwen21 import QwenImage21
from fewstep.models.families.registry import family_in
from fewstep.models.families.sana import Sana, SanaSprint
from fewstep.models.families.sd3 import StableDiffusion3
from fewstep.models.families.unet import StableDiffusion, StableDiffusionXL
from fewstep.models.families.zimage import ZImage
from fewstep.models.hub import ModelError

_WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}
"""Widths of the prompt that the published UNets attend to."""
_UNET = r"down_blocks|up_blocks|input_blocks|output_blocks"
_OF_FLUX = (Flux, Chroma, Flux2, Klein)
_SIGNS: tuple[tuple[tuple[type[Family], ...], tuple[str, ...]], ...] = (  # the first of which each is in some name
    ((Flux2, Klein), ("to_qkv_mlp_proj|double_stream_modulation|ff(_context)?.linear_in",)),
    ((Chroma,), ("distilled_guidance_layer",)),
    ((Flux, Chroma), (r"single_transformer_blocks.\d+.(proj_mlp|attn.to_[qkv])",)),
    (_OF_FLUX, ("double_blocks|single_blocks|single_transformer_blocks",)),
    ((QwenImage21,), (r"transformer_blocks.\d+.img_mlp.(gate_layer|out|proj)",)),
    ((QwenImage,), (r"transformer_blocks.\d+.(img|txt)_(mod|mlp)",)),
    ((StableDiffusion3,), ("joint_blocks",)),
    ((StableDiffusion3, QwenImage, *_OF_FLUX), (r"transformer_blocks.\d+.attn.add_[qkv]_proj",)),
    ((Krea2,), (r"transformer_blocks.\d+.attn.to_gate",)),
    ((ZImage,), (r"layers.\d+.attention.to_[qkv]",)),
    ((StableDiffusionXL,), (_UNET, "add_embedding|label_emb|text_encoder_2|lora_te2|conditioner.embedders.1")),
    ((StableDiffusion,), (_UNET,)),
    ((Sana, SanaSprint), ("conv_inverted|conv_point",)),
    ((PixArt,), ("adaln_single",)),
    ((PixArt, Sana, SanaSprint), ("caption_projection",)),
)
"""Families whose files have such names. Some share theirs, and a LoRA of a few layers may fit several."""
_ATTENDS = re.compile(r"attn2[._](?:to_k[._](?:lora_down|lora_A|lora\.down|weight)|processor[._]to_k_lora[._]down)")


def refuse_wrong_base(what: str, file: Path, base: str, family: type[Family] | None = None) -> None:
    """Refuse weights for another family, or for another width of the prompt, than the model ``base``, by configs alone.

    Where the family of either is not known, nothing is refused: the loader will look at every layer.

    Args:
        what: the weights in words, singular. family: what they are said to be for, where their tensors do not tell.

    Raises:
        ModelError: one sentence that names both.
    """
    there = _base(base)
    shapes = _shapes(file)
    if there is None or not shapes:
        return
    theirs, wide = there
    names = "\n".join(shapes)
    mine = next((some for some, signs in _SIGNS if all(re.search(sign, names) for sign in signs)), ())
    width = next((shape[1] for name, shape in shapes.items() if _ATTENDS.search(name) and len(shape) > 1), None)
    unets = (StableDiffusion, StableDiffusionXL)
    of_unet = bool(mine) and mine[0] in unets
    if of_unet and theirs in unets:
        other = None not in (width, wide) and width != wide
        wrong = other or (mine == (StableDiffusionXL,) and theirs is StableDiffusion)
    else:
        wrong = bool(mine) and theirs not in mine
    if wrong:
        told = family in (unets if mine == (StableDiffusion,) else mine)
        said = " or ".join(_words(cls, width if of_unet else None) for cls in ((family,) if told else mine))
        raise ModelError(f"{what} is for {said}, and {base} is {_words(theirs, wide)}: give a model of its kind.")


def _words(cls: type[Family] | None, width: int | None) -> str:
    """A model in words: by the width of its prompts if it is a published one's."""
    title = "SDXL" if cls is StableDiffusionXL else _WIDTHS.get(width or 0, "")
    known = title and (width is None or width in _WIDTHS)
    text = title or ("a model" if cls is None else cls.title)
    return text if known or width is None else f"{text} with prompts of width {width}"


def _base(name: str) -> tuple[type[Family], int | None] | None:
    """(family, width of the prompt for a UNet) of a model in a folder or in the hub's cache; None if not known."""
    first = parts_of(name)[0]
    folder = shipped(first) or expanded(first)
    if not folder.is_dir():
        found = _cached(first)
        if found is None:
            return None
        folder = found
    cls = family_in(folder)
    if cls is None:
        return None
    config: Mapping[str, object] = json.loads((folder / cls.part / "config.json").read_text(encoding="utf-8"))
    width = config.get("cross_attention_dim") if issubclass(cls, StableDiffusion) else None
    return cls, width if isinstance(width, int) else None


def _cached(name: str) -> Path | None:
    """The folder of a hub model in the hub's cache, if its index is there."""
    from huggingface_hub import try_to_load_from_cache

    if name.count("/") != 1:
        return None
    found = try_to_load_from_cache(name, "model_index.json")
    return Path(found).parent if isinstance(found, str) else None


def _shapes(file: Path) -> dict[str, list[int]]:
    """The shape of each tensor in a safetensors file; nothing where it is damaged, which its reader will say."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return {}
