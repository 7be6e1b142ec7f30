"""A new family is one file and one line in `FAMILIES`, a new sampler one class and one line in `SAMPLERS`.

Every other room must find them there: plans, training, sampling, export, checkpoints and the sentences that list them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import diffusers
import pytest
import torch
from safetensors import safe_open

import fewstep
from fewstep.checkpoints.explain import code, comfy
from fewstep.checkpoints.load import load_checkpoint
from fewstep.checkpoints.registry import find_checkpoint
from fewstep.checkpoints.sampling import sampler_of as published_sampler
from fewstep.export import readme
from fewstep.export.publish import export
from fewstep.models.families import load_teacher, registry
from fewstep.models.meta_pipeline import outline
from fewstep.models.roles import Roles, Weights
from fewstep.recipe.load import parse_recipe
from fewstep.recipe.validate import RecipeError
from fewstep.sampling import SAMPLERS, Sampler
from fewstep.sampling.diffusers_schedulers import SchedulerPlan
from fewstep.sampling.samplers import Step
from fewstep.students.card import Card
from fewstep.students.student import save_student
from tests.command_line import inside
from tests.export import novel


@pytest.fixture
def one_line(monkeypatch):
    """A diffusers that has the new model, and the one line that fewstep needs."""
    for cls in (novel.NovelNetwork, novel.NovelPipeline):
        monkeypatch.setattr(diffusers, cls.__name__, cls, raising=False)
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, novel.Novel))


@pytest.fixture
def folder(tmp_path):
    novel.build().save_pretrained(tmp_path / "novel")
    return tmp_path / "novel"


def student_of(folder, card):
    """A run whose student is a LoRA far from its teacher."""
    roles = Roles(load_teacher(str(folder)).denoiser)
    roles.add("student", Weights("lora", rank=4))
    torch.manual_seed(5)
    with torch.no_grad():
        for p in roles.parameters("student"):
            p.add_(0.1 * torch.randn_like(p))
    save_student(folder.parent / "run" / "student", roles, replace(card, teacher=str(folder)))
    return folder.parent / "run"


LORA = Card("lcm", "euler", 4, "lora", "", rank=4)


def test_without_its_line_a_family_is_refused_by_a_sentence_that_lists_the_others(folder, monkeypatch):
    with pytest.raises(ValueError, match=r"NovelPipeline is not supported as a teacher: use Stable .*, PixArt, .* or "):
        fewstep.as_teacher(novel.build())
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, novel.Novel))
    with pytest.raises(ValueError, match=r"Other is not supported .*, PixArt, .* or Novel\.$"):
        registry.find_family(type("Other", (), {"name": "Other"})())


def test_a_family_is_planned_trained_and_sampled(one_line, folder, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"method: lcm\nteacher: {folder}\nstudent: {{rank: 4}}\ntraining: {{steps: 2, batch_size: 2}}\n")
    code, out, err = inside(monkeypatch, capsys, tmp_path, "distill", recipe, "--dry-run")
    assert code == 0 and "parameters" in out, err
    plan = outline(str(folder / "backbone"))  # the network's folder alone
    assert plan.part == "backbone" and plan.denoiser().schedule.family == "flow"
    assert plan.prompts(3, torch.float32)["prompt_embeds"].shape == (3, 1, novel.WIDTH)
    model = fewstep.load(folder)
    first, second = (model.sample(["a", "long one"], 4, output_type="latent", seed=1, guidance_scale=g) for g in (1, 3))
    assert first.shape == (2, 4, 16, 16) and (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("to", ["diffusers", "merged", "kohya"])
def test_a_family_is_exported(to, one_line, folder, in_this_process, tmp_path):
    """Its own words for guidance, its part, its architecture; kohya's layout is refused."""
    run = student_of(folder, replace(LORA, guidance_scale=1.0))
    if to == "kohya":
        with pytest.raises(ValueError, match="kohya's layout is one of UNets"):
            export(run, to, tmp_path / "out")
        return
    made = export(run, to, tmp_path / "out")
    assert made.round_trip.gap <= 1e-5
    assert ("strength=1.0" in made.call) == (to == "merged")  # the pipeline's own default is 1
    where = tmp_path / "out" / ("backbone" if to == "diffusers" else "")
    with safe_open(next(where.glob("*.safetensors")), "pt") as file:
        assert file.metadata()["modelspec.architecture"] == "novel-1"
    text = (tmp_path / "out" / "README.md").read_text()
    assert to == "diffusers" or "pipe.backbone = NovelNetwork.from_pretrained" in text
    assert readme.licence_words("me/novel") == "mit"


def test_a_family_has_published_files(one_line, folder, tmp_path):
    """A LoRA of its network is explained, loaded and merged at its scale."""
    entry = replace(
        find_checkpoint("hyper-sd3-4step-cfg"), family="novel", base=str(folder), kind="lora-peft", lora_scale=0.5
    )
    assert "pipe.backbone = PeftModel" in code(entry)
    run = student_of(folder, LORA)
    made = load_checkpoint(entry, str(folder), run / "student" / "pytorch_lora_weights.safetensors")
    assert made.family.name == "novel"
    change = made.pipeline.backbone.middle.weight - load_teacher(str(folder)).pipeline.backbone.middle.weight
    assert change.abs().max() > 1e-3
    assert made.pipeline.backbone.clock.weight.equal(load_teacher(str(folder)).pipeline.backbone.clock.weight)


# ---------------------------------------------------------------- samplers


@dataclass(frozen=True, kw_only=True)
class HalfwaySampler(Sampler):
    """Deterministic jumps, as diffusers' DDIM makes them."""

    original_inference_steps: int = 50

    name: ClassVar[str] = "halfway"
    diffusers_names: ClassVar[tuple[str, ...]] = ("HalfwayScheduler",)
    diffusers_start: ClassVar[str] = "table"
    jumps: ClassVar[bool] = True

    def comfyui_sampler(self, schedule) -> str:
        return "halfway"

    def diffusers_schedulers(self, times) -> Iterator[SchedulerPlan]:
        yield SchedulerPlan("DDIMScheduler", {"timestep_spacing": "trailing", "set_alpha_to_one": True})

    def step(self, at: Step) -> torch.Tensor:
        return at.prediction.at(at.next)


@pytest.fixture
def one_sampler(monkeypatch):
    monkeypatch.setitem(SAMPLERS, HalfwaySampler.name, HalfwaySampler)


def test_a_sampler_is_listed_chosen_and_sampled(tiny, one_sampler, tmp_path, monkeypatch, capsys):
    base = {"method": "lcm", "teacher": str(tiny)}
    assert parse_recipe({**base, "sample": {"sampler": "halfway"}}).sample.sampler == "halfway"
    with pytest.raises(RecipeError, match="halfway"):
        parse_recipe({**base, "sample": {"sampler": "nonsense"}})
    code, out, err = inside(monkeypatch, capsys, tmp_path, "sample", tiny, "--sampler", "halfway", "--steps", 2)
    assert code == 0 and "halfway, timesteps 999, 499" in out, err
    code, out, err = inside(monkeypatch, capsys, tmp_path, "sample", tiny, "--sampler", "nonsense")
    assert code == 2 and "halfway" in err


def test_a_sampler_is_exported_and_has_published_files(tiny, one_sampler, in_this_process, tmp_path):
    roles = Roles(load_teacher(str(tiny)).denoiser)
    roles.add("student", Weights("lora", rank=4))
    card = Card("mine", "halfway", 4, "lora", str(tiny), rank=4)
    save_student(tmp_path / "run" / "student", roles, card)
    made = export(tmp_path / "run", "lora", tmp_path / "out")
    assert made.round_trip.gap <= 1e-5
    text = (tmp_path / "out" / "README.md").read_text()
    assert "DDIMScheduler" in text and "sampler halfway, scheduler simple" in text
    entry = replace(find_checkpoint("sdxl-turbo"), scheduler="HalfwayScheduler")
    sampler = published_sampler(entry, {"original_inference_steps": 40}, num_inference_steps=2)
    assert isinstance(sampler, HalfwaySampler) and sampler.original_inference_steps == 40
    assert "HalfwayScheduler.from_config" in code(replace(entry, scheduler_overrides={"a": 1})) and comfy(entry)
