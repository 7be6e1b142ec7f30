"""Why a LoRA file is refused, in one true sentence: another model's, an unknown layout, or what is not supported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NoReturn

from torch import Tensor

from fewstep.models.lora_files.keys import spelled

_UNET, _ORIGINAL = r"(?:down|up|mid)_blocks?_", r"(?:input|output)_blocks_|middle_block_"
_MODELS: tuple[tuple[str, str], ...] = (  # words, and how names of layers of such a model look, with underscores
    ("FLUX.1", r"double_blocks_|single_blocks_|single_transformer_blocks_"),
    ("Stable Diffusion 3", r"joint_blocks_|(?:^|_)transformer_blocks_\d+_attn_add_q_proj|_context_block_"),
    ("a UNet of Stable Diffusion", rf"(?:^|_)(?:{_UNET}|{_ORIGINAL})"),
    ("a text encoder by itself", r"^text_model_"),
    ("one with another text encoder", r"text_model_|^lora_te|^text_encoder"),
    ("a diffusion transformer", r"(?:^|_)(?:transformer_)?(?:blocks|layers)_\d+_"),
)
_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
_INPUTS = ("conv_in", "x_embedder", "pos_embed.proj")
_CROSS = re.compile(r"attn2_to_[kv]$")
_LAST = re.compile(r"(?:^|\.)(?:proj_out|final_layer\.linear)\.(?:set_)?weight$")
_OTHERS: tuple[tuple[str, str], ...] = (  # what else files hold, and how names of its tensors look
    ("OFT or BOFT", r"\.oft_(?:blocks|diag|[rR])|\.boft_|\.rescale$"),
    ("GLoRA", r"\.[ab][12]\.weight$"),
    ("(IA)^3", r"\.on_input$|\.ia3_"),
    ("a LoRA of an embedding", r"\.lora_embedding_[AB]"),
    ("a textual inversion, an embedding of a word", r"^emb_params$|^string_to_param|^clip_[lg]$|^<.*>$"),
    ("a Control LoRA", r"^lora_controlnet$|\.reshape_weight$"),
)


def made_for(layers: Iterable[str], tensors: Mapping[str, Tensor] | None = None) -> str:
    """The kind of model that layers of these names are of, in words; empty if that is not known.

    Args:
        tensors: layer -> its tensor [rank, inputs], which tells UNets apart by their text conditions' width.
    """
    names = [spelled(layer) for layer in layers]
    for words, pattern in _MODELS:
        if any(re.search(pattern, name) for name in names):
            widths = {
                t.shape[1] for layer, t in (tensors or {}).items() if t.ndim > 1 and _CROSS.search(spelled(layer))
            }
            return _WIDTHS.get(widths.pop(), words) if len(widths) == 1 and "UNet" in words else words
    return ""


def other_kind(names: Iterable[str]) -> tuple[str, str]:
    """(what the file holds in the place of a LoRA, one of its tensors); two empty strings if that is not known."""
    found = ((words, name) for name in names for words, pattern in _OTHERS if re.search(pattern, name))
    return next(found, ("", ""))


def refuse_unknown(path: object, names: list[str], unknown: list[str], known: bool) -> NoReturn:
    """Refuse a file with tensors that are none of a LoRA's.

    Args:
        unknown: names of those. known: whether there are others.

    Raises:
        ValueError: always.
    """
    kind, name = other_kind(names)
    unknown = [f"{key:.160}" for key in unknown]
    if kind:
        raise ValueError(f"The file {path} holds {kind} ({name}), which is not supported.")
    if not known:
        raise ValueError(f"The file {path} holds no LoRA: none of its tensors is one's, such as {unknown[0]}.")
    if any(name.startswith("extras.") for name in unknown):
        raise ValueError(f"The LoRA {path} belongs to a student with embeddings of extra inputs: load that student.")
    heads = [name for name in unknown if _LAST.search(name)]
    if heads:
        raise ValueError(
            f"The LoRA {path} holds a last layer for each step ({heads[0]}), which is no style: sample it by the name "
            "of its published checkpoint with this as its file, or from the folder that fewstep exported."
        )
    whole = [name for name in unknown if name.endswith((".weight", ".bias", ".scale")) and ".lora_" not in name]
    if whole:
        norm = "of a norm, " if "norm" in whole[0] else ""
        raise ValueError(
            f"The LoRA {path} holds new weights {norm}{whole[0]}, beside its LoRA layers (a Control LoRA?), which is "
            "not supported."
        )
    raise ValueError(f"The LoRA {path} has a layout that is not known here: it holds {unknown[0]}.")


def refuse_layers(
    path: object, network: str, layers: list[str], wrong: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> NoReturn:
    """Refuse a file with layers that the network lacks.

    Args:
        network: its class. layers: all in the file. wrong: those that are not in the network -> a tensor of each.
        tensors: as in `made_for`.

    Raises:
        ValueError: always.
    """
    kind, key = made_for(wrong, tensors), f"{min(wrong.items())[1]:.160}"
    if not kind:
        raise ValueError(
            f"The LoRA {path} has a layout that is not known here: no {network} has a layer of a name like {key}."
        )
    raise ValueError(
        f"The LoRA {path} is of another model ({kind}): only {len(layers) - len(wrong)} of its {len(layers)} layers "
        f"are in this {network}, and {key} is not."
    )


def refuse_shapes(
    path: object,
    network: str,
    layer: str,
    shape: tuple[int, ...],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Tensor],
) -> NoReturn:
    """Refuse a file with a layer of other shapes than the network's.

    Args:
        network, layer, shape: its class, the layer's name and the shape of its weight.
        shapes: tensor of the file -> its shape. tensors: as in `made_for`.

    Raises:
        ValueError: always.
    """
    down = next((tuple(t.shape) for t in tensors.values()), ())
    if layer in _INPUTS and len(down) == len(shape) and down[1] > shape[1]:
        raise ValueError(
            f"The LoRA {path} widens {layer} from {shape[1]} to {down[1]} inputs, as Control LoRAs do "
            f"({min(shapes)}): that is not supported."
        )
    key, kind = min(shapes), made_for(tensors, tensors)
    raise ValueError(
        f"The LoRA {path} does not fit {network}: {key} has another shape ({_sides(shapes[key])}) than fits {layer} "
        f"({_sides(shape)}){f': it is for {kind}' if kind in _WIDTHS.values() else ''}."
    )


def _sides(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
