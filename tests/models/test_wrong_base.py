"""Weights are refused on a model of another family by their names alone, and never on their own."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from fewstep.models.families.registry import class_of, find_family
from fewstep.models.families.wrong_base import refuse_wrong_base
from tests.checkpoints.tiny import lora_of
from tests.models.pipelines import build

ALL = ("sd3", "flux", "pixart", "sana", "qwen_image", "z_image", "klein_base", "flux2_dev", "krea2", "chroma")
ALL += ("qwen_image21",)
ONE_NETWORK = ({"klein_base", "flux2_dev"}, {"flux", "chroma"})
"""Whose layers have the same names: only their loader can tell them apart."""
SHARED = {"flux", "chroma", "klein_base", "flux2_dev", "qwen_image"}
"""Which have every layer of SD3's by its name."""


@pytest.fixture(scope="module")
def layers():
    """Names of the layers that a LoRA of each family adapts."""
    networks = {family: find_family(build(family)).network() for family in ALL}
    return {f: list(lora_of(network.transformer, 1, targets=network.lora_targets)) for f, network in networks.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each family with the two files that say what it is."""
    made = {}
    for family in ALL:
        made[family], pipeline = tmp_path_factory.mktemp(family), build(family)
        kind = type(pipeline.transformer).__name__
        (made[family] / "transformer").mkdir()
        config = {**pipeline.transformer.config, "_class_name": kind}
        (made[family] / "transformer" / "config.json").write_text(json.dumps(config, default=str))
        index = {"_class_name": type(pipeline).__name__, "transformer": ["diffusers", kind]}
        (made[family] / "model_index.json").write_text(json.dumps(index))
    return made


def lora(names, path):
    save_file({f"{name}.lora_A.weight": torch.zeros(1, 8) for name in names}, path)
    return path


@pytest.mark.parametrize("begin, dot", [("transformer.", "."), ("diffusion_model.", "."), ("lora_unet_", "_")])
def test_a_lora_fits_its_own_base(begin, dot, layers, folders, tmp_path):
    """Whole, and a layer of each kind alone."""
    for family, names in layers.items():
        named = [begin + name.replace(".", dot) for name in names]
        kinds = {re.sub(r"\d+", "", name): name for name in named}
        for some in (named, *([name] for name in kinds.values())):
            refuse_wrong_base("It", lora(some, tmp_path / "it.safetensors"), str(folders[family]))


def test_a_lora_of_another_family_is_refused(layers, folders, tmp_path):
    for family, names in layers.items():
        title = class_of(build(family)).title
        file = lora([f"transformer.{name}" for name in names], tmp_path / "it.safetensors")
        for other in ALL:
            if family == other or {family, other} in ONE_NETWORK or (family == "sd3" and other in SHARED):
                continue
            with pytest.raises(ValueError, match=f"^It is for .*{title}.*, and .* is {class_of(build(other)).title}"):
                refuse_wrong_base("It", file, str(folders[other]))
