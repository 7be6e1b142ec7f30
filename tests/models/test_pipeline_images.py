"""Images of the tiny pipelines of 2024 to 2026 by fewstep's own calls, against diffusers' pipelines."""

from __future__ import annotations

import pytest
import torch

from fewstep.models.families import as_teacher
from fewstep.sampling import RenoiseSampler, sample
from tests.models.pipeline_images import Case, compare
from tests.models.pipelines import PROMPTS, SIZE, build
from tests.models.pipelines_flow import euler


def _euler(pipeline):
    """Sana's own scheduler is DPM-Solver, with the shift of its flow_shift."""
    pipeline.register_modules(scheduler=euler(shift=3.0))


def _opaque(found):
    """The three colours of Qwen-Image-2.1's four channels."""
    return found.images[:, :3]


_SANA = {"use_resolution_binning": False}
CASES = {
    "sana against a negative prompt": Case(
        "sana", 4.5, {**_SANA, "guidance_scale": 4.5}, negative="blue grass", ready=_euler, sigmas=True
    ),
    "sana guided": Case("sana", 4.5, {**_SANA, "guidance_scale": 4.5}, ready=_euler, sigmas=True),
    "klein guided": Case("klein_base", 4.0, {"guidance_scale": 4.0}),
    "klein": Case("klein", 1.0, {"guidance_scale": 4.0}),  # which a distilled one ignores
    "flux2": Case("flux2_dev", 1.0),
    "chroma guided": Case("chroma", 4.0, {"guidance_scale": 4.0}),
    "chroma against a negative prompt": Case("chroma", 4.0, {"guidance_scale": 4.0}, negative="blue grass"),
    "chroma": Case("chroma", 1.0, {"guidance_scale": 1.0}),
    "sana": Case("sana", 1.0, {**_SANA, "guidance_scale": 1.0}, ready=_euler, sigmas=True),
    "qwen guided": Case("qwen_image", 4.0, {"true_cfg_scale": 4.0, "negative_prompt": [" "] * 2}),
    "qwen against a negative prompt": Case("qwen_image", 2.5, {"true_cfg_scale": 2.5}, negative="blue grass"),
    "qwen": Case("qwen_image", 1.0, {"true_cfg_scale": 1.0}),
    "z-image guided": Case("z_image", 1 + 3.5, {"guidance_scale": 3.5}),
    "z-image against a negative prompt": Case("z_image", 1 + 3.5, {"guidance_scale": 3.5}, negative="blue grass"),
    "z-image": Case("z_image", 1.0, {"guidance_scale": 0.0}),
    "z-image turbo": Case("z_image_turbo", 1.0, {"guidance_scale": 0.0}),
    "krea2 guided": Case("krea2", 1 + 3.5, {"guidance_scale": 3.5}),
    "krea2 against a negative prompt": Case("krea2", 1 + 3.5, {"guidance_scale": 3.5}, negative="blue grass"),
    "krea2": Case("krea2", 1.0, {"guidance_scale": 0.0}),
    "krea2 turbo": Case("krea2_turbo", 1.0, {"guidance_scale": 0.0}),
    "qwen21 guided": Case(
        "qwen_image21", 3.0, {"true_cfg_scale": 3.0}, prompts=PROMPTS[1:], negative="blue grass", images=_opaque
    ),
    "qwen21": Case("qwen_image21", 1.0, prompts=PROMPTS[:1], images=_opaque),
    "qwen21 of two texts of one length": Case(
        "qwen_image21", prompts=("a red circle", "a blue square"), images=_opaque
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_an_image_is_the_pipelines_own(name):
    found = compare(CASES[name])
    assert found.pixels <= 1e-5 and found.grid <= 1e-6


def test_two_steps_of_sprint_are_its_pipelines():
    """SCMScheduler turns angles; ours adds noise in flow's time, at the levels that the family names."""
    pipeline, generator = build("sana_sprint"), torch.Generator().manual_seed(0)
    theirs = pipeline(
        PROMPTS, height=SIZE, width=SIZE, num_inference_steps=2, generator=generator, output_type="pt",
        guidance_scale=6.0, **_SANA,
    ).images  # fmt: skip
    teacher = as_teacher(pipeline, size=SIZE)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, *teacher.latent_shape, generator=generator)
    cond, sampler = teacher.encode_prompts(PROMPTS), RenoiseSampler(timesteps=teacher.family.own_sigmas())
    run = sample(teacher.denoiser, sampler, noise, cond, guidance_embed=6.0, generator=generator)
    assert (teacher.decode(run.x0) - theirs).abs().max() <= 1e-5
    assert teacher.guidance_embed == 4.5 and teacher.guidance_scale == 1.0
