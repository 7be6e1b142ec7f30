"""Every method on tiny pipelines of every family: finite, the student begins as its teacher, exports reload."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import replace

import pytest
import torch

from fewstep.data.pairs import PairSource, WithPairs
from fewstep.data.sources import LatentSource
from fewstep.inference.generate import load_model
from fewstep.methods.registry import METHODS
from fewstep.models.families import as_teacher, load_teacher
from fewstep.models.roles import Weights
from fewstep.recipe.load import load_recipe, parse_recipe
from fewstep.runs.distill import distill
from fewstep.students.card import Card, load_card
from fewstep.students.student import LORA_FILE, load_student, save_student
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import Trainer, build_roles
from tests.models.pipelines import PROMPTS, SIZE, build
from tests.models.pipelines_flow import TEACHERS
from tests.rewards import never_enough

EVERYWHERE = ("lcm", "tcd", "pcm", "dmd2", "lightning")
TWENTY = ("sdxl", "sd3")
"""Families that take 20 steps under every method; others take 6."""
CASES = [
    (family, method) for family in TWENTY for method in METHODS if method != "pdd"
]  # tests/runs/test_distill_pdd.py
CASES += [(f, m) for f in ("sd15", "sd2v", "flux") for m in EVERYWHERE if m in METHODS] + [("pixart", "lcm")]
CASES += [(family, method) for family in TEACHERS for method in EVERYWHERE]
QUICK = {("sdxl", "lcm"), ("sd15", "dmd2"), ("sd2v", "tcd"), ("flux", "tcd"), ("pixart", "lcm")}
"""What `make test` tries of them."""
FEW = {"num_grid_steps": 4, "segments": 2, "num_phases": 2, "max_hops": 2, "encoder": "scenes-64"}
SETTINGS = TrainingSettings(steps=20, batch_size=2, warmup_steps=1, learning_rate=1e-3, ema_decay=0.0)


def small(method):
    """Settings of a method that fit a few steps."""
    return METHODS[method].Settings(**{k: v for k, v in FEW.items() if k in METHODS[method].Settings.__annotations__})


def teacher_of(family):
    """A teacher whose network is nobody else's."""
    pipeline = copy.copy(build(family))
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    pipeline.register_modules(**{part: copy.deepcopy(getattr(pipeline, part))})
    return as_teacher(pipeline, family, size=SIZE)


@functools.cache
def source_of(family):
    teacher = teacher_of(family)
    mean = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    cond = teacher.encode_prompts(PROMPTS)
    return WithPairs(LatentSource(mean, torch.zeros_like(mean), cond), PairSource(mean, cond, seed=0))


def told(view):
    """What a student of extra inputs is told: where to go, and how guided."""
    said = {"end": view.schedule.end, "guidance_embed": 3.5}
    return {name: value for name, value in said.items() if name in view.accepts}


@pytest.mark.parametrize(
    "family, method", [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_a_method_distils_a_family(family, method, tmp_path):
    distilled(family, method, Weights(rank=2), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", TEACHERS)
def test_all_weights_learn(family, tmp_path):
    distilled(family, "lcm", Weights("full"), tmp_path)


def distilled(family, method, weights, place):
    teacher, source = teacher_of(family), source_of(family)
    taught = METHODS[method](teacher.denoiser.schedule, small(method))
    helpers = replace(teacher.helpers(taught.encoder), rewards=dict.fromkeys(taught.rewards, never_enough))
    roles = build_roles(teacher.denoiser, taught, SETTINGS, weights, helpers=helpers)
    x, t, cond = source.data.mean, teacher.denoiser.schedule.start, source.data.cond

    @torch.no_grad()
    def ask(view):
        return view(x, t, cond, **told(view)).output

    before = ask(roles.teacher)
    assert torch.equal(ask(roles.student), before)
    Trainer(taught, roles, source, SETTINGS if family in TWENTY + TEACHERS else replace(SETTINGS, steps=6)).run()
    after = ask(roles.student)
    assert torch.equal(ask(roles.teacher), before)
    assert after.isfinite().all() and (after - before).abs().max() > 1e-4
    assert all(tensor.isfinite().all() for tensor in roles.tensors().values())
    extra = next(spec for spec in taught.roles() if spec.name == "student").extra_inputs
    rank = weights.rank if weights.kind == "lora" else 0
    card = Card(method, taught.sampler, 4, weights.kind, family, rank=rank, extra_inputs=extra)
    save_student(place, roles, card)
    torch.testing.assert_close(ask(load_student(teacher_of(family), place)), after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family, method", [("sdxl", "tcd"), ("sd3", "pcm"), ("flux", "lcm")])
def test_a_run_from_a_folder_to_a_file_that_others_read(family, method, tmp_path):
    """`fewstep distill`; its file through diffusers' own loader and `teacher.loras`. SD3's teacher in bf16."""
    half = family == "sd3"
    build(family).save_pretrained(tmp_path / family)
    recipe = parse_recipe({
        "method": {"name": method, "num_grid_steps": 4, **({"num_phases": 2} if method == "pcm" else {})},
        "teacher": {"path": str(tmp_path / family), "size": SIZE, "dtype": "bf16" if half else "fp32"},
        "student": {"rank": 4},
        "data": {"size": 2},
        "training": {"steps": 3, "batch_size": 2, "log_every": 1, "warmup_steps": 1, "learning_rate": 1e-2,
                     "precision": "bf16" if half else "fp32"},
        "sample": {"every": 100, "teacher_steps": 1, "prompts": ["a red circle"]},
    })  # fmt: skip
    student = distill(recipe, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    numbers = [value for line in lines for value in line.values() if isinstance(value, float)]
    assert len(lines) == 3 and len(numbers) >= 6 and torch.tensor(numbers).isfinite().all()
    card = load_card(student)
    assert (card.image_size, card.guidance_embed) == (SIZE, 3.5 if family == "flux" else None)
    model = load_model(str(tmp_path / "run"))
    assert model.teacher.image_size == SIZE
    x = torch.randn(1, *model.teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    cond, t = model.teacher.encode_prompts(["a red circle"]), model.denoiser.schedule.start
    mine = model.denoiser(x, t, cond).output
    assert (mine - model.teacher.denoiser(x, t, cond).output).abs().max() > 1e-2
    ours, theirs = (load_teacher(str(tmp_path / family), loras=loras, size=SIZE)
                    for loras in ([str(student / LORA_FILE)], []))  # fmt: skip
    theirs.pipeline.load_lora_weights(str(student / LORA_FILE))
    for fused in (ours, theirs):
        torch.testing.assert_close(fused.denoiser(x, t, cond).output, mine, rtol=1e-3, atol=1e-4)
    assert (student / "samples.png").is_file()


@pytest.mark.parametrize("model", ["sd15", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("method", ["lcm", "tcd", "pcm"])
def test_a_models_recipe_is_one(model, method):
    recipe = load_recipe(f"{model}-{method}")
    settings, student = recipe.method_settings(), recipe.student
    assert (recipe.method["name"], student.weights, recipe.data.source) == (method, "lora", "folder")
    if model == "flux":  # told its guidance, not guided
        assert (recipe.teacher.guidance_embed, settings.guidance_scale) == (3.5, 1.0)
    else:
        assert recipe.teacher.guidance_embed is None and settings.guidance_scale != 1.0
