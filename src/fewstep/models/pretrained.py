"""Frozen networks that losses and metrics see images through: how their files are read, and how their pixels look."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fewstep.models.hub import asking_hub, is_cached, quiet, short_error

Net = TypeVar("Net", bound=nn.Module)
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def read_network(path: Path, build: Callable[[Mapping[str, str]], Net], refusal: str) -> Net:
    """A network of ours from a safetensors file, its weights in float32.

    Args:
        build: makes the network from the file's metadata.

    Raises:
        ValueError: ``refusal``, where the file is missing, damaged or of another shape.
    """
    try:
        with safe_open(path, framework="pt") as file:
            network = build(file.metadata())
            network.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(refusal) from None
    return network


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Within this block, what libraries raise for a missing or damaged model becomes one ValueError about ``what``."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{what} cannot be loaded: {short_error(error)}") from None


def from_pretrained(model: Any, config: Any, place: str, device: str) -> Any:
    """A transformers model from a folder or a hub name; safetensors only, no remote code.

    Args:
        model, config: its classes, or transformers' Auto classes.
        device: on "meta" the model has shapes alone, and no weights are read.

    Raises:
        ValueError: there is no such folder, or weights are missing; and whatever transformers raises.
    """
    if not Path(place).exists() and (place.count("/") > 1 or place.startswith((".", "/"))):
        raise ValueError(f"there is no folder {place}.")
    with asking_hub(place, cached=Path(place).is_dir() or is_cached(place, "config.json")):
        if device == "meta":
            with torch.device("meta"):
                return getattr(model, "from_config", model)(config.from_pretrained(place, trust_remote_code=False))
        with quiet():  # transformers fills in random weights for those it does not find, with a warning
            found, report = model.from_pretrained(
                place, use_safetensors=True, trust_remote_code=False, ignore_mismatched_sizes=True,
                output_loading_info=True,
            )  # fmt: skip
    lost = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
    if lost:
        raise ValueError(f"its files lack weights of a {type(found).__name__}, such as {lost[0]}.")
    return found.to(device)


def pixel_statistics(place: str, kind: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [3] of pixels in [0, 1], from the model's own file where there is one.

    Args:
        place: folder or hub name. kind: ``model_type`` of its config, whose usual statistics serve without a file.
    """
    from transformers.models.auto.image_processing_auto import get_image_processor_config

    mean, std = _CLIP if kind.startswith("clip") else _HALF if kind.startswith("siglip") else _IMAGENET
    own = get_image_processor_config(place)
    return torch.tensor(own.get("image_mean") or mean), torch.tensor(own.get("image_std") or std)


def pooled(output: Any) -> Tensor:
    """The one vector per input, [B, D], of a transformers output: a tensor, or an object that holds it."""
    if isinstance(output, Tensor):
        return output
    embeds = getattr(output, "image_embeds", None)
    return cast(Tensor, output.pooler_output if embeds is None else embeds)
