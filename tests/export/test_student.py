"""Students as files: what is written, under which name, and that it answers as before when read back."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fewstep.diffusion.schedule import Schedule
from fewstep.models.denoiser import Denoiser
from fewstep.models.extras import sinusoid
from fewstep.models.lora import live
from fewstep.models.roles import Roles, Weights
from fewstep.students.card import CARD_FILE, Card, load_card, sampler_of
from fewstep.students.student import LORA_FILE, OWN_FILE, load_student, save_student

VP = Schedule.scaled_linear()
CARD = Card("tcd", "tcd", 4, "lora", "small", eta=0.2, original_inference_steps=40, rank=4, steps=7)


class Small(nn.Module):
    """x [B, 2, 4, 4]; a convolution and two linear layers."""

    extra_width = 8

    def __init__(self):
        super().__init__()
        self.inlet, self.outlet = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)
        self.time, self.middle = nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, x, t, cond=None, *, extra=None):
        emb = self.time(sinusoid(t, 16))
        emb = emb if extra is None else emb + extra
        h = self.inlet(x) + emb[:, :, None, None]
        return self.outlet(h + self.middle(h.transpose(1, 3)).tanh().transpose(1, 3))


def small():
    torch.manual_seed(0)
    return Small()


def trained(kind="lora", extra_inputs=(), alpha=None):
    """Roles whose student is far from the teacher, and its average half way."""
    roles = Roles(Denoiser(small(), VP))
    roles.add("student", Weights(kind, rank=4, alpha=alpha), extra_inputs=extra_inputs)
    roles.follow("ema", "student", 0.5)
    with torch.no_grad():
        for p in roles.parameters("student"):
            p.add_(0.2 * torch.randn_like(p))
    roles.update_followers("student")
    return roles


def ask(view, **told):
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    return view(x, torch.tensor([999, 500, 19]), **told).output.detach()


def reload(folder):
    return load_student(SimpleNamespace(denoiser=Denoiser(small(), VP)), folder)


@pytest.mark.parametrize("role", ["student", "ema"])
@pytest.mark.parametrize("alpha", [None, 2.0, 12.0])
def test_a_lora_predicts_as_before_whatever_its_alpha(alpha, role, tmp_path):
    """The file's own scale is 1 (alpha = rank): readers that know no alpha get it right."""
    roles = trained(alpha=alpha)
    path = save_student(tmp_path, roles, CARD, role)
    assert path.name == LORA_FILE and {p.name for p in tmp_path.iterdir()} == {LORA_FILE, CARD_FILE}
    torch.testing.assert_close(ask(reload(tmp_path)), ask(getattr(roles, role)), rtol=1e-5, atol=1e-6)
    assert not torch.equal(ask(roles.student), ask(roles.ema))
    tensors, base, x = load_file(path), small(), torch.randn(5, 8)
    with torch.no_grad():  # by hand: W + B A
        change = tensors["middle.lora_B.weight"] @ tensors["middle.lora_A.weight"]
        expected = nn.functional.linear(x, base.middle.weight + change, base.middle.bias)
    with torch.no_grad(), live((role,)):
        torch.testing.assert_close(roles.base.middle(x), expected, rtol=1e-5, atol=1e-6)


def test_all_weights_predict_as_before(tmp_path):
    roles = trained("full")
    assert save_student(tmp_path, roles, replace(CARD, weights="full", rank=0)).name == OWN_FILE
    assert torch.equal(ask(reload(tmp_path)), ask(roles.student))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_only_fewstep_can_read_never_gets_the_public_name(kind, tmp_path):
    """A LoRA without its embeddings would load elsewhere and draw something else."""
    roles = trained(kind, extra_inputs=("end", "guidance_embed"))
    card = replace(CARD, weights=kind, extra_inputs=("end", "guidance_embed"), guidance_embed=8.0)
    assert save_student(tmp_path, roles, card).name == OWN_FILE
    assert {p.name for p in tmp_path.iterdir()} == {OWN_FILE, CARD_FILE}
    told = dict(end=torch.tensor([0, 19, 0]), guidance_embed=8.0)
    student = reload(tmp_path)
    torch.testing.assert_close(ask(student, **told), ask(roles.student, **told), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ask(student, **told), ask(student, end=500, guidance_embed=8.0), atol=1e-3)
    assert load_card(tmp_path) == card


def test_a_card_holds_how_to_sample(tmp_path):
    save_student(tmp_path, trained(), CARD)
    card = load_card(tmp_path)
    assert card == CARD and json.loads((tmp_path / CARD_FILE).read_text())["format"] == 1
    sampler = sampler_of(card)
    assert (sampler.name, sampler.num_inference_steps) == ("tcd", 4)
    assert (sampler.eta, sampler.original_inference_steps) == (0.2, 40)
    assert sampler_of(card, num_inference_steps=8, eta=0.0).eta == 0.0
    other = sampler_of(card, "euler", timesteps=[999, 499])
    assert other.name == "euler" and other.num_inference_steps is None


def test_a_card_with_timesteps_samples_there_unless_the_user_gives_others(tmp_path):
    save_student(tmp_path, trained(), replace(CARD, sampler="renoise", timesteps=(899.0, 399.0), num_inference_steps=2))
    card = load_card(tmp_path)
    for asked in ({}, {"num_inference_steps": 2}):
        assert sampler_of(card, **asked).times(VP).tolist() == [899, 399, -1]
    for name in (None, "ddim"):  # on its grid another number would begin at 999, where it was never trained
        with pytest.raises(
            ValueError, match=r"times of its own \(899, 399\) and takes 2 steps, not 4: leave the number"
        ):
            sampler_of(card, name, num_inference_steps=4)
    assert sampler_of(card, timesteps=[499]).times(VP).tolist() == [499, -1]
    assert sampler_of(card, num_inference_steps=2, timestep_spacing="leading").times(VP).tolist() == [500, 0, -1]
    for asked in ({}, {"num_inference_steps": 2}):
        assert sampler_of(card, "ddim", **asked).times(VP).tolist() == [899, 399, -1]
