"""A target time folded into weights: told and folded networks are equal on the grid, for a toy and for every family."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fewstep.diffusion.schedule import Schedule
from fewstep.export.fold import LIMIT, fold_end, refuse_fresh_noise
from fewstep.export.possible import obstacle
from fewstep.models.denoiser import Denoiser
from fewstep.models.extras import sinusoid
from fewstep.models.families import as_teacher, load_teacher
from fewstep.models.families.network import added_to_time
from fewstep.models.families.unet import StableDiffusion
from fewstep.models.lora import merge
from fewstep.models.roles import Roles, Weights
from fewstep.sampling import SAMPLERS, make_sampler, sample
from fewstep.students.card import Card, refuse_other_times, sampler_of
from tests.models.pipelines import build

VP, FLOW = Schedule.scaled_linear(), Schedule.flow(3.0)
WIDTH = 32
TOLD = Card("ctm", "ctm", 4, "lora", "", rank=4, extra_inputs=("end",))


class Toy(nn.Module):
    """x [B, 4] and a time embedding, whose first layer may see the time of a second row, 0, as Qwen-Image-2.1's does.

    It may have a guidance-scale embedding of its own there, as published LCM models.
    """

    lora_targets = ("first", "second", "mix")
    extra_width = WIDTH

    def __init__(self, two_rows=False, native=False):
        super().__init__()
        torch.manual_seed(0)
        self.time_embedder = nn.ModuleDict({"first": nn.Linear(WIDTH, 24), "second": nn.Linear(24, 4)})
        self.time_embedder.forward = self._embedded
        self.mix, self.scale = nn.Linear(4, 4), nn.Linear(WIDTH, WIDTH, bias=False)
        self.two_rows, self.accepts = two_rows, frozenset({"guidance_embed"} if native else ())

    def _embedded(self, phi):
        return self.time_embedder["second"](torch.tanh(self.time_embedder["first"](phi)))

    def forward(self, x, t, cond=None, *, extra=None, guidance_embed=None):
        phi = sinusoid(1000 * t if t.max() <= 1 else t, WIDTH).to(x.dtype)
        if guidance_embed is not None:
            phi = phi + self.scale(sinusoid(1000 * (guidance_embed - 1), WIDTH).to(x.dtype))
        if self.two_rows:
            phi = torch.cat([phi, sinusoid(0 * t, WIDTH).to(x.dtype)])
            extra = None if extra is None else torch.cat([extra, 0 * extra])
        with added_to_time(self.time_embedder, extra):
            embedded = self.time_embedder(phi)
        if self.two_rows:
            embedded = embedded[: len(x)] * (1 + embedded[len(x) :].tanh())
        return x * embedded + self.mix(x)


class Alone(Toy):
    """Its time embedding begins with a linear layer that is itself called `time_embedder`, as Krea 2's."""

    lora_targets = ("time_embedder", "mix")

    def __init__(self):
        super().__init__()
        self.second, self.time_embedder = self.time_embedder["second"], self.time_embedder["first"]

    def forward(self, x, t, cond=None, *, extra=None):
        with added_to_time(self.time_embedder, None if extra is None else extra[:, None]):
            embedded = self.time_embedder(sinusoid(t, WIDTH).to(x.dtype)[:, None])
        return x * self.second(embedded.tanh())[:, 0] + self.mix(x)


def trained(denoiser, kind="lora", extra_inputs=("end",), size=0.3):
    """A student far from its teacher, and what differs from it, in float64."""
    roles = Roles(denoiser)
    student = roles.add("student", Weights(kind, rank=3), extra_inputs=extra_inputs)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in roles.tensors_of("student").items():
            if kind == "full" and not name.startswith("extras."):
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
            elif ".lora_B" in name or name.startswith("extras."):
                far = size if name.startswith("extras.") else 0.1
                tensor.copy_(far * torch.randn(tensor.shape, generator=generator))
    return student, {name: t.detach() for name, t in roles.tensors_of("student").items()}


@torch.no_grad()
def ordinary(base, tensors, fold, form):
    """The network without extra inputs in float64, its fold in float32 as a file holds it: by ranks, or whole."""
    network = copy.deepcopy(base)
    weights = dict(network.named_parameters())
    kept = {name: weight.clone() for name, weight in weights.items()}
    if form == "ranks":
        tensors = fold.as_ranks(tensors, kept[f"{fold.layer}.weight"].float())
    for name, tensor in tensors.items():
        if ".lora_A" in name:
            layer, up = name.removesuffix(".lora_A.weight"), tensors[name.replace("lora_A", "lora_B")]
            weights[f"{layer}.weight"] += (up.double().flatten(1) @ tensor.double().flatten(1)).view_as(
                weights[f"{layer}.weight"]
            )
        elif ".lora_" not in name and not name.startswith("extras."):
            weights[name].copy_(tensor)
    if form == "whole":
        weight = fold.weight_of(network)
        weight.copy_(fold.folded(weight.float()).double())
    return network


@torch.no_grad()
def compared(denoiser, kind, form, sampler, x, cond=None, embed=None, extra_inputs=("end",)):
    """(largest difference of told and folded, what being told changes, the fold)."""
    base = copy.deepcopy(denoiser.network)
    student, tensors = trained(denoiser, kind, extra_inputs)
    fold = fold_end(student, sampler, x[:1], cond if cond is None else cond[:1], embed)
    network = ordinary(base, tensors, fold, form)
    plain = Denoiser(network, denoiser.schedule, denoiser.prediction_type)
    inputs = {} if embed is None else {"guidance_embed": embed}
    native = {key: value for key, value in inputs.items() if key in plain.accepts}
    gap = change = 0.0
    for t, s in sampler.targets(denoiser.schedule):
        told = student(x, t, cond, end=s, **inputs).output
        gap = max(gap, float((plain(x, t, cond, **native).output - told).abs().max()))
        change = max(change, float((student(x, t, cond, **native).output - told).abs().max()))
    return gap, change, fold


def state(seed=2):
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("two_rows", [False, True])
@pytest.mark.parametrize("kind, form", [("lora", "ranks"), ("lora", "whole"), ("full", "whole")])
def test_told_and_folded_are_equal_on_the_grid(kind, form, two_rows):
    for schedule, name in ((VP, "ctm"), (VP, "lcm"), (FLOW, "euler")):
        for n in (1, 2, 3, 5, 8):
            denoiser = Denoiser(Toy(two_rows).double(), schedule, "epsilon" if schedule is VP else "flow")
            sampler = make_sampler(name, num_inference_steps=n)
            gap, change, fold = compared(denoiser, kind, form, sampler, state())
            assert gap <= LIMIT * change and change > 0.05, (name, n, gap, change)
            assert fold.left.shape[1] == (1 if name == "lcm" else n)  # LCM jumps to one time
            before = fold.weight_of(denoiser.network if kind == "full" else Toy(two_rows).double()).detach()
            assert fold.gap(before, before) > 0.1


@pytest.mark.parametrize("form", ["ranks", "whole"])
def test_the_layer_may_be_the_whole_embedder(form):
    """What is added there arrives by a hook of the layer itself."""
    sampler = make_sampler("ctm", num_inference_steps=4)
    gap, change, fold = compared(Denoiser(Alone().double(), VP), "lora", form, sampler, state())
    assert gap <= LIMIT * change and change > 0.05 and fold.layer == "time_embedder"


@pytest.mark.parametrize("native", [False, True])
def test_the_guidance_scale_is_folded_with_it(native):
    """One that the student learnt to hear is a part of what is folded; the network's own is left to its caller."""
    sampler = make_sampler("ctm", num_inference_steps=4)
    for form in ("ranks", "whole"):
        denoiser = Denoiser(Toy(native=native).double(), VP)
        gap, change, _ = compared(denoiser, "lora", form, sampler, state(), None, 3.0, ("end", "guidance_embed"))
        assert gap <= LIMIT * change and change > 0.05


def test_half_precision_disturbs_it_little():
    """Times as bfloat16 rounds them: the estimator is at least three times nearer than the smallest matrix."""
    student, _ = trained(Denoiser(Toy().double(), FLOW, "flow"))
    sampler = make_sampler("euler", num_inference_steps=4)
    fold = fold_end(student, sampler, state()[:1])
    smallest = (np.linalg.pinv(fold.reads.numpy()) @ fold.added.numpy()).T
    chosen, (off, far) = (fold.left @ fold.right).numpy(), (0.0, 0.0)
    assert np.abs(smallest @ fold.reads.numpy().T - fold.added.numpy().T).max() < 1e-9
    for row, (t, _) in zip(fold.added.numpy(), fold.targets, strict=True):
        for rounded in (t * (1 - 2**-9), t * (1 + 2**-9)):
            phi = sinusoid(torch.tensor([1000 * rounded], dtype=torch.float64), WIDTH).numpy()[0]
            off, far = (max(worst, np.abs(a @ phi - row).max()) for worst, a in ((off, chosen), (far, smallest)))
    assert off < far / 3 and off < 0.2 * fold.added.abs().max()


def test_what_cannot_be_folded_is_one_sentence():
    student, tensors = trained(Denoiser(Toy().double(), VP))
    fold = fold_end(student, make_sampler("ctm", num_inference_steps=60), state()[:1])
    for made in (lambda: fold.as_ranks(tensors, Toy().time_embedder["first"].weight),
                 lambda: fold.folded(Toy().time_embedder["first"].weight)):  # fmt: skip
        with pytest.raises(
            ValueError, match=r"^The target times of 60 steps cannot be fixed .*first.* fewstep sample\.$"
        ):
            made()
    bare = Toy()
    del bare.time_embedder
    for network in (bare, Toy()):
        network.accepts = frozenset({"end"})
        network.forward = lambda x, t, cond=None, end=None: x  # no layer reads the time
        with pytest.raises(ValueError, match="Toy has no linear layer that reads the time"):
            fold_end(Denoiser(network, VP), make_sampler("ddim", num_inference_steps=2), state()[:1].float())


def test_embeddings_that_were_never_trained_fold_into_nothing():
    roles = Roles(Denoiser(Toy().double(), VP))
    student = roles.add("student", Weights("lora", rank=3), extra_inputs=("end",))
    fold = fold_end(student, make_sampler("ctm", num_inference_steps=4), state()[:1])
    tensors, weight = roles.tensors_of("student"), Toy().time_embedder["first"].weight.detach()
    lora = {name: t for name, t in tensors.items() if ".lora_" in name}
    assert fold.as_ranks(tensors, weight) == lora and torch.equal(fold.folded(weight), weight)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("schedule", [VP, FLOW])
def test_the_targets_of_a_sampler_are_those_that_sampling_tells(schedule, name):
    told = []

    class Network:
        accepts = frozenset({"end"})

        def __call__(self, x, t, cond, *, end):
            told.append((float(t[0]), float(end[0])))
            return x

    for eta in (0.0, 0.6) if "eta" in SAMPLERS[name].options() else (None,):
        told.clear()
        sampler = make_sampler(name, num_inference_steps=5, **({} if eta is None else {"eta": eta}))
        sample(Denoiser(Network(), schedule, "flow"), sampler, state())
        known = told[::2] + told[-1:] if name == "heun" and len(told) % 2 else told[::2] if name == "heun" else told
        known = list(dict.fromkeys(known)) if name == "heun" else known
        assert np.allclose(sampler.targets(schedule), known, rtol=0, atol=1e-6)


def test_fresh_noise_is_refused_with_the_ways_out():
    for sampler in ("ctm", "tcd"):
        card = replace(TOLD, sampler=sampler, eta=0.3)
        with pytest.raises(ValueError, match=r"without fresh noise, and this one is sampled with eta 0\.3\.$"):
            refuse_fresh_noise(card)
        refuse_fresh_noise(replace(card, eta=0.0))
        why = obstacle(replace(card, prediction_type="epsilon"), VP, {}, StableDiffusion)
        assert "Remedy: sample.eta=0, no fresh noise between the steps, or sample.sampler=renoise" in why
        assert obstacle(replace(card, prediction_type="epsilon", eta=0.0), VP, {}, StableDiffusion) == ""
        refuse_fresh_noise(replace(card, extra_inputs=()))


def test_other_times_than_those_of_the_weights_are_refused():
    own = sampler_of(TOLD)
    card = replace(TOLD, target_times=tuple(own.targets(VP)))
    refuse_other_times(card, own, VP)
    refuse_other_times(card, make_sampler("ddim", timesteps=[999, 749, 499, 249], final="end"), VP)  # the same jumps
    refuse_other_times(card, replace(own, strength=0.5), VP)  # the last two of its steps
    for changes in ({"num_inference_steps": 8}, {"num_inference_steps": 2}, {"eta": 0.5}):
        with pytest.raises(ValueError, match="target times of its own 4 steps and are right for these alone"):
            refuse_other_times(card, sampler_of(TOLD, **changes), VP)
        refuse_other_times(TOLD, sampler_of(TOLD, **changes), VP)


FAMILIES = (
    "scenes-64", "sd15", "sd2v", "sdxl", "sd3", "flux", "pixart", "sana", "sana_sprint", "klein_base", "flux2_dev",
    "chroma", "qwen_image", "qwen_image21", "z_image", "krea2",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name):
    """`benchmarks/folding.py` has the figures of all numbers of steps.

    Sana-Sprint's sinusoids of its times, 0 ... pi/2, tell no more than four apart: eight are refused.
    """
    sprint = name == "sana_sprint"
    assert max(error for error, _ in family_errors(name, (1, 4) if sprint else (1, 4, 8))) <= LIMIT
    if sprint:
        with pytest.raises(ValueError, match="The target times of 8 steps cannot be fixed"):
            family_errors(name, (8,))


@torch.no_grad()
def family_errors(name, steps):
    """(error as a part of what the target times change, that change) of a family's network in float64, for each n.

    Its student has a LoRA on the layer itself, whether its family has one there or not. An odd n is folded into the
    ranks, an even one into the weight.
    """
    teacher = load_teacher("scenes-64") if name == "scenes-64" else as_teacher(build(name))
    schedule, kind = teacher.denoiser.schedule, teacher.denoiser.prediction_type
    cond, base = teacher.encode_prompts(["a red circle"]), copy.deepcopy(teacher.denoiser.network).double()
    x = torch.randn(1, *teacher.latent_shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    layer = first_layer(base)
    network = copy.deepcopy(base)
    network.lora_targets = (layer, "to_q")
    student, tensors = trained(Denoiser(network, schedule, kind))
    weights = dict(base.named_parameters())
    weight, kept = weights[f"{layer}.weight"], weights[f"{layer}.weight"].clone()
    merge(weights, {key: t for key, t in tensors.items() if not key.startswith(layer)})
    found = []
    for n in steps:
        sampler = make_sampler("ddim" if schedule.family == "vp" else "euler", num_inference_steps=n)
        fold = fold_end(student, sampler, x, cond)
        if n % 2:
            ranks = fold.as_ranks(tensors, kept.float())
            folded = kept.float().double() + _product(ranks, layer)
            assert len(ranks[f"{layer}.lora_A.weight"]) <= 3 + n and fold.left.shape[1] == n
        else:
            folded = fold.folded((kept + _product(tensors, layer)).float()).double()
        t, s = (np.asarray(times) for times in zip(*fold.targets, strict=True))
        many, conds = x.expand(n, *x.shape[1:]), cond[[0] * n]
        told = student(many, t, conds, end=s).output
        weight.copy_(folded)
        gap = float((Denoiser(base, schedule, kind)(many, t, conds).output - told).abs().max())
        change = float((student(many, t, conds).output - told).abs().max())
        found.append((gap / change, change))
    return found


def _product(lora, layer):
    up, down = (lora[f"{layer}.lora_{part}.weight"].double() for part in "BA")
    return up @ down


def first_layer(network):
    """The name of the first linear layer in its time embedding."""
    layer = next(part for part in network.time_embedder.modules() if isinstance(part, nn.Linear))
    return next(name for name, part in network.named_modules() if part is layer)
