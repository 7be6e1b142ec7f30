"""Models on disk as people keep them, made from tiny pipelines: variants, missing files, other networks."""

from __future__ import annotations

import json
import shutil

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.models import pipelines
from tests.models.pipelines import build

WEIGHTS = "diffusion_pytorch_model.safetensors"
RED = "a red circle"


def edit(path, **changes):
    """Change entries of a JSON file; None removes one."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def rewritten(source, target, change):
    """A copy of a safetensors file whose tensors ``change`` has edited in place; its header stays."""
    tensors = load_file(source)
    with safe_open(source, "pt") as file:
        header = file.metadata()
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, target, metadata=header)
    return target


def without(*parts):
    """A change that removes the tensors whose names hold one of ``parts``."""

    def change(tensors):
        for name in [name for name in tensors if any(part in name for part in parts)]:
            del tensors[name]

    return change


def lcm(folder):
    """A pipeline with a guidance-scale embedding, as LCM_Dreamshaper's."""
    torch.manual_seed(5)
    pipeline = pipelines.sd15()
    pipeline.unet = pipelines.unet(16, time_cond_proj_dim=8)
    pipeline.save_pretrained(folder)
    edit(
        folder / "model_index.json",
        _class_name="LatentConsistencyModelPipeline",
        scheduler=["diffusers", "LCMScheduler"],
    )
    edit(folder / "scheduler" / "scheduler_config.json", _class_name="LCMScheduler")
    return folder


class Shelf:
    """Pipelines of every kind in one folder, saved when they are asked for; copies may be changed."""

    def __init__(self, place):
        self.place = place

    def __call__(self, name):
        folder = self.place / "models" / name
        if not folder.exists():
            build(name).save_pretrained(folder)
        return folder

    def copy(self, name, called):
        folder = self.place / called
        shutil.copytree(self(name), folder)
        return folder
