"""What is said of an entry: the lines for diffusers are run against its real schedulers, with stand-ins for weights."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch

from fewstep.checkpoints.explain import code, comfy, explain, licence_notice, table, warnings
from fewstep.checkpoints.load import load_checkpoint
from fewstep.checkpoints.registry import FILE, checkpoints, find_checkpoint
from fewstep.checkpoints.sampling import sampler_class, sampler_of, schedule_of
from fewstep.models.families import family_named
from tests.checkpoints.test_sampling import base_of, mu_of

ENTRIES = checkpoints()


class Pipe:
    """Remembers what was done with it."""

    def __init__(self, entry):
        family = getattr(diffusers, entry.scheduler)
        own = entry.scheduler_overrides if entry.kind == "pipeline" else {}
        self.scheduler = SimpleNamespace(config={**base_of(entry), **own})
        self.lora, self.scale, self.family, self.parts = None, None, family, {}
        self.unet, self.transformer = "unet", "transformer"

    def load_lora_weights(self, repo, weight_name=None):
        self.lora, self.scale = (repo, weight_name), 1.0

    def fuse_lora(self, lora_scale):
        self.scale = lora_scale

    def __call__(self, prompt, **call):
        self.call = call
        return SimpleNamespace(images=[prompt])


def follow(entry, monkeypatch):
    """Run an entry's lines; returns the pipe, with what became of its weights."""
    pipe = Pipe(entry)

    def loaded(repo, **parts):
        pipe.repo, pipe.parts = repo, parts
        return pipe

    class UNet:
        load_config = staticmethod(lambda repo, subfolder: (repo, subfolder))
        from_config = classmethod(lambda cls, config: cls())
        from_pretrained = classmethod(lambda cls, repo, **_: pipe.__dict__.update(file=(repo, None)) or cls())

        def to(self, dtype):
            return self

        def load_state_dict(self, tensors):
            pipe.file = tensors

    loader = SimpleNamespace(from_pretrained=loaded)
    fakes = SimpleNamespace(
        DiffusionPipeline=loader, LatentConsistencyModelPipeline=loader, UNet2DConditionModel=UNet,
        **{n: getattr(diffusers, n) for n in {e.scheduler for e in ENTRIES.values() if sampler_class(e.scheduler)}},
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "diffusers", fakes)
    monkeypatch.setattr(torch, "load", lambda path, weights_only: path if weights_only else None)
    hub = SimpleNamespace(hf_hub_download=lambda repo, file: (repo, file))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    on_top = SimpleNamespace(PeftModel=SimpleNamespace(from_pretrained=lambda network, repo: (network, repo)))
    monkeypatch.setitem(sys.modules, "peft", on_top)
    monkeypatch.setitem(sys.modules, "safetensors.torch", SimpleNamespace(load_file=lambda path: path))
    exec(compile(code(entry), entry.id, "exec"), {})
    monkeypatch.undo()
    return pipe


def test_sana_sprints_lines_give_its_pipeline_the_angles_that_we_take(monkeypatch):
    """Left to itself the pipeline has an angle for two steps, and refuses four."""
    entry = ENTRIES["sana-sprint-1.6b"]
    pipe = follow(entry, monkeypatch)
    call = {"num_inference_steps": 4, "guidance_scale": 4.5, "intermediate_timesteps": None}
    assert pipe.call == call and pipe.repo == entry.repo
    scheduler = diffusers.SCMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(4, intermediate_timesteps=None)
    angles = scheduler.timesteps[:-1].double().numpy()
    mine = sampler_of(entry, {}).times(schedule_of(entry, {}))[:-1]
    np.testing.assert_allclose(mine, np.sin(angles) / (np.sin(angles) + np.cos(angles)), atol=1e-5)


SET_BY_NUMBER = [n for n, e in ENTRIES.items() if sampler_class(e.scheduler) and e.scheduler != "SCMScheduler"]


@pytest.mark.parametrize("name", SET_BY_NUMBER)
def test_the_code_for_diffusers_does_what_the_entry_holds(name, monkeypatch):
    """Weights, scale, guidance, eta; and a scheduler that asks at the times at which our sampler asks."""
    entry = ENTRIES[name]
    pipe = follow(entry, monkeypatch)
    assert pipe.repo == (entry.repo if entry.kind == "pipeline" else entry.base)
    if entry.kind == "lora-peft":
        part = "transformer" if entry.family == "pixart" else "unet"
        assert getattr(pipe, part) == (part, entry.repo)
    elif entry.kind == "lora":
        assert pipe.lora == (entry.repo, entry.file or None) and pipe.scale == entry.lora_scale
    elif entry.kind == "unet":
        assert pipe.file[0] == entry.repo and pipe.file[1] in (entry.file, None) and "unet" in pipe.parts
    given, call = pipe.scheduler, dict(pipe.call)
    scale = call.pop("guidance_scale", call.pop("true_cfg_scale", None))
    assert max(1, scale) == entry.guidance_scale and call.pop("eta", None) == entry.eta
    scheduler = given if not isinstance(given, SimpleNamespace) else pipe.family.from_config(given.config)
    assert type(scheduler).__name__ == entry.scheduler
    for key, value in entry.scheduler_overrides.items():
        assert scheduler.config.get(key, value) == value
    n, told = entry.default_steps, {k: v for k, v in call.items() if k in ("timesteps", "sigmas")}
    if entry.flow and "sigmas" not in told:
        assert entry.family != "sd3"
        told["sigmas"] = np.linspace(1, 1 / n, n).tolist()  # which these pipelines hand over by themselves
    if entry.flow and scheduler.config.use_dynamic_shifting:
        told["mu"] = mu_of(entry, scheduler.config, call.get("num_inference_steps", 50))
    scheduler.set_timesteps(**(told or {"num_inference_steps": call["num_inference_steps"]}))
    mine = sampler_of(entry, base_of(entry)).times(schedule_of(entry, base_of(entry)))[:-1]
    np.testing.assert_allclose(scheduler.timesteps, mine * (1000 if entry.flow else 1), atol=1e-3)


def test_every_entry_is_whole():
    assert FILE.is_file()
    for name, entry in ENTRIES.items():
        assert entry.default_steps in entry.steps and entry.licence and entry.repo.count("/") == 1
        assert (entry.lora_scale is not None) == entry.is_lora
        low, high = entry.guidance_range or (entry.guidance_scale,) * 2
        assert entry.guidance_scale is None or low <= entry.guidance_scale <= high
        assert entry.scheduler == "" or hasattr(diffusers, entry.scheduler) or name == "flash-sd3"
        assert name in explain(entry) and name in licence_notice(entry) and name in table([entry])
    steps_in_name = [e for n, e in ENTRIES.items() if f"{e.default_steps}step" in n]
    assert len(steps_in_name) > 35 and all(e.steps_exact or e.flow for e in steps_in_name)


def test_comfyuis_settings_are_in_its_own_words():
    assert comfy(find_checkpoint("hyper-flux-8step")) == (
        "sampler euler, scheduler simple, cfg 1, FluxGuidance 3.5, strength_model 0.125, steps 8"
    )
    assert "ModelSamplingDiscrete:x0" in comfy(find_checkpoint("sdxl-lightning-1step"))
    assert "cannot load it" in comfy(find_checkpoint("lcm-sdxl"))
    assert "not known" in comfy(find_checkpoint("flash-sd3"))


LIGHTNING, LCM = find_checkpoint("sdxl-lightning-4step-lora"), find_checkpoint("lcm-lora-sdxl")


@pytest.mark.parametrize("entry, base, family, steps, scale, words", [
    (LIGHTNING, LIGHTNING.base, "sdxl", 4, None, []),
    (LIGHTNING, LIGHTNING.base, "sdxl", 4, 0.0, []),
    (LIGHTNING, LIGHTNING.base, "sdxl", 5, None, ["is bound to 4 steps, not 5"]),
    (LIGHTNING, LIGHTNING.base, "sdxl", 4, 7.5, ["without guidance"]),
    (LIGHTNING, "me/mine", "sdxl", 4, 1.0, ["was made for stabilityai/"]),
    (LIGHTNING, "me/mine", "sd1", 4, 1.0, ["another family (sd1)"]),
    (LCM, LCM.base, "sdxl", 6, 2.0, ["is known to work at 2, 4, 8 steps, not 6"]),
    (LCM, LCM.base, "sdxl", 4, 2.5, ["at guidance 1 to 2, not 2.5"]),
    (replace(LCM, guidance_range=(3.0, 5.0)), LCM.base, "sdxl", 4, 1.0, ["at guidance 3 to 5, not 1"]),
])  # fmt: skip
def test_settings_other_than_the_entrys_are_warned_about(entry, base, family, steps, scale, words):
    said = warnings(entry, base, family, steps, scale)
    assert len(said) == len(words) and all(word in line for word, line in zip(words, said, strict=True))


@pytest.mark.parametrize("name, near", [
    ("sdxl-lightning-4step", "sdxl-lightning-4step"), ("Hyper-SDXL-4step", "hyper-sdxl-4step"), ("zzz", "lists them"),
])  # fmt: skip
def test_a_wrong_name_names_the_nearest(name, near):
    with pytest.raises(ValueError, match=near):
        find_checkpoint(name)


def test_what_cannot_be_sampled_here_is_refused():
    for name in ("ctm-imagenet64", "flash-sd3"):
        with pytest.raises(ValueError, match="not built in here"):
            sampler_of(ENTRIES[name], {})
    for entry in ENTRIES.values():
        if family_named(entry.family) is None:  # known by its family, before anything is downloaded
            with pytest.raises(ValueError, match=f"{entry.id} cannot be sampled here, .* --code"):
                load_checkpoint(entry)
    foreign = {entry.family for entry in ENTRIES.values() if family_named(entry.family) is None}
    assert {"edm", "ernie-image"} <= foreign <= {"edm", "ernie-image", "qwen-edit"}
    with pytest.raises(ValueError, match="which has no eta"):
        sampler_of(LCM, {}, eta=0.5)
    assert "no scheduler for ctm-imagenet64" in code(ENTRIES["ctm-imagenet64"])
