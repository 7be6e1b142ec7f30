"""The registry of published files against a table of what their publishers say, which was written apart from it.

Held against itself the registry would stay "right" when an entry changes: other tests take its values as they are.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from fewstep.checkpoints.registry import checkpoints

TABLE = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))
PUBLISHED = {
    name: {**TABLE["default"], **group.get("same", {}), **own}
    for group in TABLE["groups"]
    for name, own in group["files"].items()
}
ENTRIES = checkpoints()

# Conditioned on the guidance scale by an embedding: LCM's w (their UNets have time_cond_proj_dim) and FLUX.1-dev's.
EMBEDDED = {"lcm-dreamshaper-v7", "lcm-sdxl", "hyper-flux-8step", "hyper-flux-16step", "flux1-turbo-alpha",
            "sana-sprint-1.6b", "sana-sprint-0.6b",
            "flux2-dev-turbo"}  # fmt: skip
# Networks by the model that they were made for; pipelines that are their own base by what they are.
FAMILIES = {
    "stable-diffusion-v1-5": "sd1", "dreamshaper-7": "sd1", "stable-diffusion-2": "sd2", "SSD-1B": "sdxl",
    "Segmind-Vega": "sdxl", "stable-diffusion-xl": "sdxl", "stable-diffusion-3": "sd3", "FLUX.1": "flux",
    "PixArt": "pixart", "Qwen-Image-Edit": "qwen-edit", "Qwen-Image-2.1": "qwen21", "Qwen-Image": "qwen",
    "Z-Image": "zimage", "Krea-2": "krea2",
    "FLUX.2-klein": "klein", "FLUX.2-dev": "flux2",
    "ERNIE-Image": "ernie-image", "Sana_Sprint": "sprint", "sony/ctm": "edm",
}  # fmt: skip
# By their licences: openrail++, mit and apache-2.0 allow it, the non-commercial ones and that of FLUX.1-dev do not.
COMMERCIAL = {
    "lcm-lora-sd15", "lcm-lora-sdxl", "lcm-lora-ssd-1b", "lcm-dreamshaper-v7", "lcm-sdxl", "flux1-schnell",
    "flux2-klein-4b",
    *(f"sdxl-lightning-{name}" for name in ("1step", *(f"{n}step-{k}" for n in (2, 4, 8) for k in ("unet", "lora")))),
    "z-image-turbo", *(f"z-image-fun-{n}step" for n in (2, 4, 8)),
}  # fmt: skip
NOT_COMMERCIAL = {
    "sdxl-turbo", "dmd2-sdxl-4step", "dmd2-sdxl-4step-lora", "dmd2-sdxl-1step", "hyper-flux-8step",
    "hyper-flux-16step",
    "flux2-klein-9b", "flux2-dev-turbo",
}  # fmt: skip


def test_the_table_names_every_entry_and_says_where_each_value_was_read():
    assert sorted(ENTRIES) == sorted(name for group in TABLE["groups"] for name in group["files"])
    assert all(len(group["source"]) > 12 for group in TABLE["groups"])
    keys = set.intersection(*(set(row) for row in PUBLISHED.values()))
    # what is left of an entry is checked below, or in words: licence, note, ComfyUI's settings, how well it is known
    others = {"id", "family", "guidance", "default_steps", "pipeline", "guidance_argument", "call", "commercial",
              "licence", "note", "comfy"}  # fmt: skip
    assert keys | others == set(asdict(ENTRIES["tcd-sdxl"])) and not keys & others


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_entry_holds_what_was_published(name):
    found, wanted = asdict(ENTRIES[name]), dict(PUBLISHED[name])
    if wanted["guidance_scale"] == "off":
        wanted["guidance_scale"] = 1.0
    for key, value in wanted.items():
        mine = list(found[key]) if isinstance(found[key], tuple) else found[key]
        assert mine == value, key


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_the_table_does_not_say_follows_from_it(name):
    entry, row = ENTRIES[name], PUBLISHED[name]
    base = row["base"] or row["repo"]
    assert entry.family == next(family for part, family in FAMILIES.items() if part in base)
    assert entry.guidance == ("embedded" if name in EMBEDDED else "cfg")
    said = "yes" if name in COMMERCIAL else "no" if name in NOT_COMMERCIAL else "ask"
    assert entry.commercial == said and entry.licence
    steps = row["steps"]
    assert entry.default_steps == (4 if 4 in steps else max(steps))  # ours: four where it can, else the most
    assert row["timesteps"] is None or len(row["timesteps"]) == entry.default_steps
    assert row["sigmas"] is None or len(row["sigmas"]) == entry.default_steps
    assert entry.is_lora == (row["lora_scale"] is not None)
    call = {"flux1-schnell": {"max_sequence_length": 256}}.get(name, {})
    argument = "true_cfg_scale" if entry.family.startswith("qwen") else "guidance_scale"
    pipeline = {"lcm-dreamshaper-v7": "LatentConsistencyModelPipeline"}.get(name, "DiffusionPipeline")
    assert (entry.call, entry.guidance_argument, entry.pipeline) == (call, argument, pipeline)
