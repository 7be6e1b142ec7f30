"""Every shipped recipe on a tiny pipeline of its family: chains through all stages, the others before they train."""

from __future__ import annotations

import pytest
from PIL import Image

from fewstep.inference.load import load
from fewstep.recipe.chain import Chain
from fewstep.recipe.chain import load as load_recipe
from fewstep.recipe.shipped import shipped_recipes
from fewstep.runs.chain import run
from fewstep.runs.foresee import foresee
from fewstep.training.run_files import RunFiles
from tests.models.pipelines import SIZE, build
from tests.rewards import taste

FAMILIES = {name: name for name in ("sd15", "sdxl", "sd3", "flux", "sana")} | {
    "qwen": "qwen_image",
    "qwen21": "qwen_image21",
    "zimage": "z_image",
    "klein": "klein_base",
    "flux2": "flux2_dev",
    "krea2": "krea2",
    "chroma": "chroma",
}
"""Families, as recipes begin, and their tiny pipelines."""
FEW = [
    "training.steps=1", "training.batch_size=2", "training.accumulation=1", "training.warmup_steps=1",
    "training.device=cpu", "training.precision=fp32", "training.log_every=1", "training.checkpoint_every=1",
    "teacher.dtype=fp32", "teacher.quantize=null", "student.rank=2", "student.targets=[to_q]", "sample.every=100",
    "sample.teacher_steps=1", "sample.prompts=[a red circle]", "data.size=4",
]  # fmt: skip
OWN = {"halvings": 2, "encoder": "scenes-64"}
"""Settings of methods that fit small pictures; others stay those of the recipe."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pipeline folder of every family, and a folder of captioned pictures."""
    folder = tmp_path_factory.mktemp("shipped")
    (folder / "pictures").mkdir()
    for i, caption in enumerate(["a red circle", "a blue square", "a blue circle on grass", "a red square"]):
        Image.new("RGB", (SIZE, SIZE), (60 * i, 20, 200 - 60 * i)).save(folder / "pictures" / f"{i}.png")
        (folder / "pictures" / f"{i}.txt").write_text(caption)
    (folder / "prompts.txt").write_text("a red circle\na blue square\na blue circle on grass\na red square\n")
    return folder


def short(name, place):
    """The shipped recipe ``name``, so short that it runs on a tiny pipeline in seconds."""
    recipe, sets = load_recipe(name), list(FEW)
    family = name.split("-")[0]
    if family in FAMILIES:
        if not (place / family).is_dir():
            build(FAMILIES[family]).save_pretrained(place / family)
        sets += [f"teacher.path={place / family}", f"teacher.size={SIZE}", f"data.path={place / 'pictures'}"]
        if not isinstance(recipe, Chain) and recipe.data.source == "prompts":
            sets[-1] = f"data.path={place / 'prompts.txt'}"
    stages = recipe.stages if isinstance(recipe, Chain) else [None]
    for stage in stages:
        made, prefix = (recipe, "") if stage is None else (stage.recipe, f"stages.{stage.name}.")
        if made is None:
            continue
        known = set(made.method_class().setting_names())
        if stage is not None:
            sets += [f"{prefix}training.steps=1"]
        if family in FAMILIES:
            sets += [f"{prefix}method.{key}={value}" for key, value in OWN.items() if key in known & made.method.keys()]
        if "rewards" in made.method:
            sets += [
                f"{prefix}method.rewards=[{{model: {taste(place / 'taste.safetensors', 'encoder')}, threshold: 9}}]"
            ]
            sets += [f"{prefix}method.held_out={taste(place / 'other.safetensors', 'detector')}"]
        sets += [f"{prefix}pairs.size=4", f"{prefix}pairs.num_inference_steps=1"] if made.needs_pairs else []
    return load_recipe(name, sets)


CHAINS = [name for name in shipped_recipes() if isinstance(load_recipe(name), Chain)]


def test_the_chains_are_those_that_are_named():
    assert {"sd15-lightning", "sdxl-lightning", "sd3-lightning", "flux-lightning", "sdxl-hyper"} < set(CHAINS)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_a_shipped_chain_runs_from_its_first_stage_to_images(name, place, tmp_path, monkeypatch):
    """Every stage trains, and its finished student is sampled; grids during training are left out for time."""
    monkeypatch.setattr("fewstep.runs.distill.SampleGrid", lambda run: lambda step: None)
    chain = short(name, place)
    folder = tmp_path / "run"
    student = run(chain, folder)
    assert student.parent == RunFiles(folder).stages()[-1] and len(RunFiles(folder).stages()) == len(chain.stages)
    latents = load(folder).sample(["a red circle"], output_type="latent")
    assert latents.isfinite().all() and float(latents.std()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name not in CHAINS])
def test_a_shipped_recipe_fits_its_family(name, place):
    """Method, sampler, prediction type and data fit each other on the family's schedule."""
    foresee(short(name, place))
