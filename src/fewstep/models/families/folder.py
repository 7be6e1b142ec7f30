"""Pipelines in diffusers folders as people keep them: one variant of the weights, parts left out, broken downloads.

Every network is read with its library's report of missing weights: diffusers and transformers would make them random.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fewstep.models.families.registry import parts
from fewstep.models.hub import ModelError, asking_hub, is_cached, short_error
from fewstep.models.sharding import meta_parameters, wait_for_rows
from fewstep.models.tensor_files import StoredFiles

INDEX = "model_index.json"
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>[^.-]+))?(?:-\d+-of-\d+(?:\.(?P<old>[^.]+))?)?\.safetensors"
)
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")
"""Parts that play no role in sampling here: where they are listed and not there, the pipeline does without."""
_LEFT_OUT = ("text_encoder_3", "tokenizer_3", *_UNUSED)
"""Parts that an index need not list; SD3's pipeline puts zeros in the place of T5."""
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",), ("tokenizer.model",))
_CONFIGS = {"scheduler": "scheduler_config.json"}
_SEEING = ("PixtralProcessor", "Qwen3VLProcessor", "CosmosTransformer3DModel")
"""Classes of parts that cannot be used without torchvision."""


def load_folder(folder: Path, dtype: torch.dtype, waits_on: torch.device | None = None) -> Any:
    """The pipeline in a diffusers folder.

    Args:
        waits_on: the device on which each process will have its rows of the network's weights; until then they stay in
            their files (`fewstep.models.sharding.wait_for_rows`), where they can be read by rows.

    Raises:
        ModelError: a part, some of its weights or a vocabulary is missing, damaged, or a pickle.
    """
    from diffusers import DiffusionPipeline

    listed = read_index(folder)
    _check_torchvision(folder, listed)
    given: dict[str, Any] = {part: None for part in _left_out(folder, listed)}
    for part, (library, kind) in listed.items():
        if kind is not None and part not in given:
            network = network_class(folder, library, kind)
            if network is not None:
                if waits_on is not None and part in parts():
                    given[part] = outlined_part(folder / part, network, dtype, waits_on)
                given[part] = given.get(part) or read_part(folder / part, network, dtype)
            elif part.startswith("tokenizer"):
                check_vocabulary(folder / part)
            else:
                _check_there(folder / part, _CONFIGS.get(part, ""))
    return DiffusionPipeline.from_pretrained(str(folder), torch_dtype=dtype, use_safetensors=True, **given)


def _check_torchvision(folder: Path, listed: Mapping[str, tuple[str | None, str | None]]) -> None:
    """Refuse a pipeline that needs torchvision where there is none, before gigabytes are read."""
    needs = [f"{part} ({kind})" for part, (_, kind) in listed.items() if kind in _SEEING]
    if needs and find_spec("torchvision") is None:
        raise ModelError(
            f"The {needs[0]} of the pipeline in {folder} needs torchvision, which is not installed: install the "
            "release that was built for this torch."
        )


def downloaded(name: str) -> Path:
    """The folder of a hub model in the hub's cache; its half-precision variant where there is no other."""
    from diffusers import DiffusionPipeline

    with asking_hub(name, cached=is_cached(name, INDEX)):
        try:
            return Path(DiffusionPipeline.download(name, use_safetensors=True))
        except OSError as error:
            try:
                return Path(DiffusionPipeline.download(name, use_safetensors=True, variant="fp16"))
            except (OSError, ValueError):
                raise error from None


def read_index(folder: Path) -> dict[str, tuple[str | None, str | None]]:
    """(library, class) of each part of the pipeline in a folder; None twice where it is left out.

    Raises:
        ModelError: the index is damaged.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        parts = {name: kind for name, kind in index.items() if is_part(kind) and not name.startswith("_")}
        return {name: (kind[0], kind[1]) for name, kind in parts.items()}
    except (OSError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise ModelError(f"The file {folder / INDEX} is damaged ({short_error(error)}): download it again.") from None


def is_part(value: Any) -> bool:
    """Whether an entry of an index is a part, [library, class]; a setting may be a list too (numbers of layers)."""
    return isinstance(value, list) and len(value) == 2 and all(x is None or isinstance(x, str) for x in value)


def _left_out(folder: Path, listed: Mapping[str, tuple[str | None, str | None]]) -> set[str]:
    """The parts that this pipeline does without; passed as None, for diffusers demands some of them."""
    absent = {part for part, (_, kind) in listed.items() if kind is None}
    absent |= {part for part in _UNUSED if part in listed and not _has_files(folder / part)}
    kinds = {str(kind) for _, kind in listed.values()}
    if "SD3Transformer2DModel" in kinds:
        absent |= {part for part in _LEFT_OUT if part not in listed}
    return absent


def _has_files(folder: Path) -> bool:
    """Whether a part can be read at all, weights and config."""
    if (folder / "preprocessor_config.json").is_file():
        return True
    return (folder / "config.json").is_file() and bool(_by_variant(folder))


def network_class(folder: Path, library: str | None, kind: str) -> Any:
    """The class of a part of the pipeline in ``folder`` that is a network; None for tokenizers, schedulers and so on.

    Raises:
        ModelError: there is no such class here.
    """
    known = library in ("diffusers", "transformers")
    try:
        found = getattr(importlib.import_module(str(library) if known else f"diffusers.pipelines.{library}"), kind)
    except (ImportError, AttributeError):
        raise ModelError(
            f"The pipeline in {folder} has a part of the class {library}.{kind}, which is not one of diffusers'."
        ) from None
    return found if isinstance(found, type) and issubclass(found, torch.nn.Module) else None


def read_part(folder: Path, network: Any, dtype: torch.dtype) -> Any:
    """A network of this class from its folder, all of its weights read.

    Raises:
        ModelError: some are missing, damaged or pickles.
    """
    variant, _ = _files(folder)
    kind = {"dtype" if hasattr(network, "config_class") else "torch_dtype": dtype}  # transformers', and diffusers'
    try:
        module, report = network.from_pretrained(
            str(folder), use_safetensors=True, variant=variant or None, output_loading_info=True, **kind
        )
    except (ValueError, RuntimeError) as error:
        if "expected shape" in str(error) or "mismatch" in str(error):  # diffusers' words, and transformers'
            raise ModelError(
                f"The weights in {folder} have other shapes than its config.json says: they are of another model."
            ) from None
        raise
    refuse_missing(f"The weights in {folder}", report["missing_keys"])
    return module


def _files(folder: Path) -> tuple[str, list[Path]]:
    """(variant, its files) of a part's weights; raises as `read_part`."""
    _check_there(folder, "config.json")
    files = _by_variant(folder)
    if not files:
        raise ModelError(_no_weights(folder))
    variant = next((name for name in ("", "fp32", "fp16", "bf16") if name in files), min(files))
    for file in files[variant]:
        check_whole(file)
    _check_shards(folder, variant)
    return variant, files[variant]


def outlined_part(folder: Path, network: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A network on the meta device that waits for its rows; None where its files name or keep weights otherwise."""
    stored = StoredFiles(_files(folder)[1])
    if getattr(network, "_keep_in_fp32_modules", None) and dtype != torch.float32:
        return None
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as from_pretrained does: what a network computes for itself has it too
    try:
        with meta_parameters():
            module = network.from_config(network.load_config(str(folder)))
    finally:
        torch.set_default_dtype(before)
    if any(name not in stored or stored.shape(name) != p.shape for name, p in module.named_parameters()):
        return None
    if not all(stored.readable(name) for name in module.state_dict().keys() & set(stored)):
        return None
    for name, buffer in module.named_buffers():
        if name in stored:
            buffer.copy_(stored[name])
    wait_for_rows(module, stored, device)
    return module


def refuse_missing(what: str, names: Any) -> None:
    """Refuse weights that lack some of a network's: they would be random.

    Raises:
        ModelError: ``names`` is not empty.
    """
    if names:
        lacked = sorted(names)
        more = f" and {len(lacked) - 1} more" if len(lacked) > 1 else ""
        raise ModelError(f"{what} lack {lacked[0]}{more}, which would be random: get a whole file of this model.")


def check_whole(file: Path) -> None:
    """Refuse a safetensors file that was downloaded in part, or is something else.

    Raises:
        ModelError: one sentence that names the file.
    """
    _check_there(file.parent, file.name)  # a link may lead nowhere
    try:
        with safe_open(file, framework="pt"):
            return
    except (OSError, SafetensorError) as error:
        with file.open("rb") as begin:
            pointer = begin.read(24).startswith(b"version https://git-lfs")
        if pointer:
            raise ModelError(
                f"{file} is a pointer of git-lfs, not weights: run `git lfs pull` in that folder."
            ) from None
        raise ModelError(
            f"The file {file} is damaged, or no safetensors file, or was downloaded in part ({short_error(error)}): "
            "download it again."
        ) from None


def _by_variant(folder: Path) -> dict[str, list[Path]]:
    """A part's files of weights by their variant ("fp16"); plain ones are under the empty name."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        match = _WEIGHTS.fullmatch(file.name)
        if match:
            found.setdefault(match["variant"] or match["old"] or "", []).append(file)
    return found


def _check_shards(folder: Path, variant: str) -> None:
    """Refuse a folder that lacks one of the files that its index names."""
    for index in folder.glob(f"*.safetensors.index{'.' if variant else ''}{variant}.json"):
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        for name in sorted(names):
            _check_there(folder, Path(str(name)).name)


def _check_there(folder: Path, file: str) -> None:
    if not (folder / file).exists():
        raise ModelError(f"The model is not complete, {folder / file} is missing: download it again.")


def check_vocabulary(folder: Path) -> None:
    """Refuse a tokenizer without its words: transformers would make an empty one, and all prompts alike."""
    if not any(all((folder / name).is_file() for name in names) for names in _VOCABULARIES):
        raise ModelError(
            f"The tokenizer in {folder} has no vocabulary (tokenizer.json, vocab.json with merges.txt, spiece.model) "
            "and would encode all prompts alike: download it again."
        )


def _no_weights(folder: Path) -> str:
    pickles = sorted(file.name for file in folder.glob("*") if file.suffix.lower() in PICKLES)
    if not pickles:
        return f"The model is not complete, {folder} holds no weights (.safetensors): download it again."
    return f"The weights in {folder} are pickles ({pickles[0]}), {pickle_advice(folder.parent)}"


def pickle_advice(folder: Path) -> str:
    """Why pickles are not read, and how a pipeline's are converted."""
    return (
        "which may run any program when they are read: where you trust them, convert them by DiffusionPipeline."
        f'from_pretrained("{folder}").save_pretrained("NEW FOLDER").'
    )
