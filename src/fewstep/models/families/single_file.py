"""Checkpoints in a single .safetensors file, as many models are published: SD 1.x and SDXL.

diffusers reads the weights. The networks' configs come with this package. The tokenizers' vocabularies do not: they
are downloaded once, or read from a folder, ``teacher.config``. Models of other shapes need such a folder for all of
their configs; an autoencoder or text encoder that a file lacks is read from there too.

A file may say how its network predicts: by empty tensors (``v_pred``, ``ztsnr``), as ComfyUI reads them, or in its
header, as kohya's trainer writes it. That holds before what the config says, which is often a folder of the base model.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fewstep.models.families import registry
from fewstep.models.families.family import SingleFile
from fewstep.models.families.folder import (
    INDEX,
    PICKLES,
    check_vocabulary,
    check_whole,
    network_class,
    read_index,
    read_part,
    refuse_missing,
)
from fewstep.models.hub import ModelError

_SHIPPED = Path(__file__).parents[2] / "assets" / "configs"
_NETWORK = "model.diffusion_model."
_FIRST = f"{_NETWORK}input_blocks.0.0.weight"
_EDM = ("edm_vpred.sigma_max", "edm_mean")
_LACKING = re.compile(r"^(\w+) = \w+\.from_pretrained", re.MULTILINE)
_PLACES = {
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}
"""How the names of a part's weights begin."""
_SPEC = "modelspec.prediction_type"


def is_single_file(name: str) -> bool:
    """Whether a teacher's name is a file's.

    Raises:
        ModelError: it is a pickle, which can run code when it is read, or of another format.
    """
    path = Path(os.path.expanduser(name))
    if not path.is_file():
        return False
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise ModelError(f"{name} is a pickle, which may run any program when it is read: get it as .safetensors.")
    if suffix == ".gguf":
        raise ModelError(f"{name} is a quantised file (.gguf), which is not read here: get it as .safetensors.")
    return suffix == ".safetensors"


def config_of(path: Path, config: str | None = None) -> Path:
    """The folder of configs for a file: ``config``, or a shipped one by the names of its tensors; reads no weights.

    Raises:
        ModelError: one sentence when the file is damaged or of another kind.
    """
    return _configs(_kind(path, config), config)


def known_configs(name: str) -> Path | None:
    """The folder of shipped configs of a hub model, which may want an account for its own; None for all others."""
    known = {hub: folder for cls in registry.FAMILIES for hub, folder in cls.configs.items()}
    return _SHIPPED / known[name] if name in known else None


def _configs(found: SingleFile | None, config: str | None) -> Path:
    """The folder of configs for a file of that kind."""
    return Path(os.path.expanduser(str(config))) if found is None else _SHIPPED / found.configs


def scheduler_settings(path: Path, own: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of its prediction, as settings of a scheduler, in the place of ``own``; empty for most files.

    Raises:
        ModelError: it is an EDM network, or contradicts a config that is more than the usual one.
    """
    with safe_open(path, framework="pt") as file:
        names, header = set(file.keys()), file.metadata() or {}
    edm = next((name for name in _EDM if name in names), None)
    if edm is not None:
        raise ModelError(f"The file {path} is an EDM network ({edm}): these are not supported as teachers.")
    found: dict[str, Any] = {}
    if "v_pred" in names or header.get(_SPEC, "").lower() in ("v", "v_prediction"):
        found["prediction_type"] = "v_prediction"
        said = own.get("prediction_type", "epsilon")
        if said not in ("epsilon", "v_prediction"):
            raise ModelError(f"The file {path} says v_pred, and its config predicts '{said}': remove one of the two.")
    if "ztsnr" in names:
        found["rescale_betas_zero_snr"] = True
    return found


def load_single_file(path: Path, config: str | None, dtype: torch.dtype) -> Any:
    """The pipeline in a file.

    Args:
        config: a folder with the configs and tokenizers of its model; None takes the shipped ones.

    Raises:
        ValueError: one sentence when the file is of another kind, or lacks a part.
    """
    import diffusers

    found = _kind(path, config)
    folder = _configs(found, config)
    listed = read_index(folder)
    more: dict[str, Any] = {part: None for part, (_, kind) in listed.items() if kind is None}
    for part in listed:
        if not part.startswith("tokenizer"):
            continue
        if found is None:
            check_vocabulary(folder / part)
        else:
            from transformers import CLIPTokenizer

            more[part] = CLIPTokenizer.from_pretrained(found.hub, subfolder=part)
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    settings = scheduler_settings(path, scheduler)
    cls = getattr(diffusers, diffusers.DiffusionPipeline.load_config(folder)["_class_name"])
    with _with_usual_suffix(path) as file:
        pipeline = _completed(cls, file, path, folder, {"torch_dtype": dtype, **more})
    for part in listed:
        _check_filled(path, part, getattr(pipeline, part, None))
    if settings:
        pipeline.scheduler = _changed(pipeline.scheduler, settings)
    return pipeline


def _completed(cls: Any, file: Path, path: Path, folder: Path, more: dict[str, Any]) -> Any:
    """diffusers' pipeline of a file, with parts that it lacks from the folder of its configs."""
    while True:
        try:
            return cls.from_single_file(str(file), config=str(folder), local_files_only=True, **more)
        except NotImplementedError as error:  # from diffusers' move of a network that the file has not filled
            if "meta tensor" not in str(error):
                raise
            raise ModelError(
                f"The file {path} is not whole: it lacks some weights of its network or autoencoder, which would be "
                "random: get a whole file of this model."
            ) from None
        except Exception as error:
            lacking = _LACKING.search(str(error))
            if lacking is None or lacking[1] in more:
                raise
            part = lacking[1]
            with safe_open(file, framework="pt") as opened:
                there = next((name for name in opened.keys() if name.startswith(_PLACES.get(part, ()))), None)  # noqa: SIM118
            if there is not None:
                raise ModelError(
                    f"diffusers cannot read the {part} in the file {path} ({there} and others): get a file with all "
                    "parts under their usual names."
                ) from None
            if not any((folder / part).glob("*.safetensors")):
                raise ModelError(
                    f"The file {path} cannot be loaded: it holds no {part}; give a folder with one, weights and "
                    "configs, as teacher.config (FILE@FOLDER)."
                ) from None
            library, kind = read_index(folder)[part]
            more[part] = read_part(folder / part, network_class(folder, library, str(kind)), more["torch_dtype"])


@contextmanager
def _with_usual_suffix(path: Path) -> Iterator[Path]:
    """Another name of a file, that ends in .safetensors: diffusers reads MODEL.SAFETENSORS as a pickle."""
    if path.suffix == ".safetensors":
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="fewstep-") as place:
        link = Path(place) / f"{path.stem}.safetensors"
        try:
            link.symlink_to(path.resolve())
        except OSError:  # links are a privilege on Windows
            shutil.copyfile(path, link)
        yield link


def _check_filled(path: Path, part: str, network: Any) -> None:
    """Refuse a network of which the file lacks weights: diffusers leaves them on the meta device."""
    if isinstance(network, torch.nn.Module):
        tensors = [*network.named_parameters(), *network.named_buffers()]
        refuse_missing(f"The file {path} is not whole: its weights of the {part}", [n for n, t in tensors if t.is_meta])


def _changed(scheduler: Any, settings: Mapping[str, Any]) -> Any:
    """A scheduler with other settings; DDIM's where its own class does not have them."""
    import diffusers

    known = inspect.signature(type(scheduler).__init__).parameters.keys()
    cls = type(scheduler) if settings.keys() <= known else diffusers.DDIMScheduler
    return cls.from_config(scheduler.config, **settings)


def _kind(path: Path, config: str | None) -> SingleFile | None:
    """The kind of a file by its tensors' names; None where ``config`` takes its place."""
    check_whole(path)
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        channels = file.get_slice(_FIRST).get_shape()[1:2] if _FIRST in names else []
    if not any(name.startswith(_NETWORK) for name in names):
        raise ModelError(
            f"The file {path} holds no whole model ({_NETWORK}... is missing): a LoRA, or a network alone?"
        )
    kinds = {cls.single_file: cls for cls in registry.FAMILIES if cls.single_file is not None}
    found = next((kind for kind in kinds if any(name.startswith(kind.prefix) for name in names)), None)
    if config is not None:
        folder = Path(os.path.expanduser(config))
        if not (folder / INDEX).is_file():
            raise ModelError(f"teacher.config: the folder {config} holds no configs ({INDEX} is missing).")
        theirs = registry.family_in(folder)
        if found is not None and theirs is not None and theirs is not kinds[found]:
            raise ModelError(
                f"The file {path} is for {found.title}, and the configs in {config} are of {theirs.title}: give those "
                f"of {found.title}."
            )
        return None
    if found is None:
        titles = " nor ".join(kind.title for kind in kinds)
        raise ModelError(f"The file {path} is neither {titles}: give the folder of its configs as teacher.config.")
    wanted = json.loads((_SHIPPED / found.configs / "unet" / "config.json").read_text(encoding="utf-8"))["in_channels"]
    if channels and channels[0] != wanted:
        raise ModelError(
            f"The UNet in {path} takes {channels[0]} channels, {found.title}'s takes {wanted}: inpainting, editing and "
            "control models are not supported as teachers."
        )
    return found
