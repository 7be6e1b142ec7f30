"""A quantised base: near the plain one, untouched by training, as small as the plan says; adapters learn on it."""

from __future__ import annotations

import copy
import sys

import pytest
import torch

from fewstep.data.sources import LatentSource
from fewstep.methods.lcm import LCM
from fewstep.models.families import as_teacher, load_teacher
from fewstep.models.lora_files import read_lora
from fewstep.models.meta_pipeline import outline
from fewstep.models.quantize import is_quantized, plain, quantizable, quantize, saved_bytes
from fewstep.models.roles import Weights
from fewstep.recipe.load import load_recipe, parse_recipe
from fewstep.recipe.validate import RecipeError
from fewstep.students.card import Card
from fewstep.students.lineage import open_teacher
from fewstep.students.student import load_student, save_student
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import Trainer, build_roles
from tests.cases.lora_inputs import write
from tests.models.pipelines import PROMPTS, SIZE, build

KINDS = [
    pytest.param(kind, marks=pytest.mark.needs(library))
    for kind, library in (("int8", "torchao"), ("nf4", "bitsandbytes"))
]
FAMILIES = ["sdxl", "sd3", "flux"]


def teacher_of(family, kind=None):
    pipeline = copy.copy(build(family))
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    network = copy.deepcopy(getattr(pipeline, part))
    if kind is not None:
        quantize(network, kind)
    pipeline.register_modules(**{part: network})
    return as_teacher(pipeline, family, size=SIZE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_quantised_network_is_near_the_plain_one(family, kind):
    teacher, plain_one = teacher_of(family, kind), teacher_of(family)
    x = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    cond = teacher.encode_prompts(PROMPTS)
    mine, theirs = (t.denoiser(x, t.denoiser.schedule.start, cond).output for t in (teacher, plain_one))
    off = float((mine - theirs).norm() / theirs.norm())
    assert 0 < off < {"int8": 0.02, "nf4": 0.2}[kind]
    assert mine.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_it_holds_as_many_bytes_as_the_plan_says(kind):
    network, quantised = (copy.deepcopy(build("sd3").transformer) for _ in range(2))
    count = sum(1 for _ in quantizable(network))
    assert 0 < count < sum(isinstance(m, torch.nn.Linear) for m in network.modules())
    quantize(quantised, kind)
    assert is_quantized(quantised) and not is_quantized(network)
    size = sum(held(p) for p in quantised.parameters())
    assert sum(p.nbytes for p in network.parameters()) - size == pytest.approx(saved_bytes(network, kind), rel=0.005)
    weights = [(a, b) for (n, a), (_, b) in zip(network.named_parameters(), quantised.named_parameters(), strict=True)]
    assert all(torch.dist(a, plain(b)) < 0.2 * a.norm() + 1e-6 for a, b in weights)


def held(p):
    """Bytes behind a parameter, scales included."""
    if getattr(p, "quant_state", None) is not None:
        return p.nbytes + p.quant_state.absmax.nbytes
    return sum(getattr(p, name).nbytes for name in p.tensor_data_names) if hasattr(p, "qdata") else p.nbytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_adapters_learn_on_it_and_go_onto_the_plain_base(family, kind, tmp_path):
    settings = TrainingSettings(steps=4, batch_size=2, learning_rate=1e-2)
    losses = {}
    for how in (None, kind):
        teacher = teacher_of(family, how)
        method = LCM(teacher.denoiser.schedule, num_grid_steps=4, guidance_scale=1.0)
        roles = build_roles(teacher.denoiser, method, settings, Weights(rank=4))
        mean = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
        cond = teacher.encode_prompts(PROMPTS)
        trainer = Trainer(method, roles, LatentSource(mean, torch.zeros_like(mean), cond), settings)
        x, t = mean, teacher.denoiser.schedule.start
        with torch.no_grad():
            before = roles.teacher(x, t, cond).output
            assert torch.equal(roles.student(x, t, cond).output, before)
        trainer.run()
        losses[how] = trainer.last_record["student/loss"]
        with torch.no_grad():
            assert torch.equal(roles.teacher(x, t, cond).output, before)
            after = roles.student(x, t, cond).output
    assert (after - before).abs().max() > 1e-3 and all(p.isfinite().all() for p in roles.parameters("student"))
    assert losses[kind] == pytest.approx(losses[None], rel=0.1)
    save_student(tmp_path, roles, Card("lcm", "lcm", 4, "lora", family, rank=4))
    with torch.no_grad():
        elsewhere = load_student(teacher_of(family), tmp_path)(x, t, cond).output
        moved = [float((a - b).norm()) for a, b in ((elsewhere, after), (after, before))]
    assert moved[0] < {"int8": 0.05, "nf4": 0.5}[kind] * float(before.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_is_loaded_quantised_and_not_copied(kind, tmp_path):
    build("sd15").save_pretrained(tmp_path / "model")
    teacher = load_teacher(str(tmp_path / "model"), quantization=kind, size=SIZE)
    assert is_quantized(teacher.denoiser.network)
    method = LCM(teacher.denoiser.schedule)
    with pytest.raises(ValueError, match="A quantised teacher has no weights that could be trained whole"):
        build_roles(teacher.denoiser, method, TrainingSettings(), Weights("full"))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_finished_run_is_quantised_with_its_student_in_it(kind, tmp_path):
    build("sd15").save_pretrained(tmp_path / "model")
    teacher = load_teacher(str(tmp_path / "model"), size=SIZE)
    roles = build_roles(teacher.denoiser, LCM(teacher.denoiser.schedule), TrainingSettings(), Weights(rank=4))
    for parameter in roles.parameters("student"):
        parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    card = Card("lcm", "lcm", 4, "lora", str(tmp_path / "model"), rank=4, image_size=SIZE)
    save_student(tmp_path / "student", roles, card)
    mine, whole = (open_teacher(str(tmp_path / "student"), quantization=how) for how in (kind, None))
    x, cond = torch.randn(1, *whole.latent_shape), whole.encode_prompts(PROMPTS[:1])
    answers = [t.denoiser(x, 999, cond).output for t in (mine, whole, teacher)]
    apart, moved = (float((answers[i] - answers[1]).norm()) for i in (0, 2))
    assert is_quantized(mine.denoiser.network) and 0 < apart < {"int8": 0.05, "nf4": 0.5}[kind] * moved


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_file_is_read_for_it_as_for_the_plain_network(kind, tmp_path):
    """As a start of a student: nf4 holds a weight in a tensor of another shape."""
    layer, quantised, whole = "transformer_blocks.0.attn.to_q", teacher_of("sd3", kind), teacher_of("sd3")
    rows, columns = whole.family.base.get_submodule(layer).weight.shape
    pair = {f"transformer.{layer}.lora_A.weight": torch.rand(2, columns)}
    path = write(tmp_path / "x.safetensors", {**pair, f"transformer.{layer}.lora_B.weight": torch.rand(rows, 2)})
    mine, theirs = (read_lora(teacher.family.lora_parts, path) for teacher in (quantised, whole))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_what_does_not_go_together_is_refused(monkeypatch):
    for more, says in (("student.weights=full", "student.weights full"), ("training.fsdp=true", "training.fsdp")):
        with pytest.raises(RecipeError, match=f"teacher.quantize does not go with {says}"):
            load_recipe("scenes-64-lcm", ["teacher.quantize=int8", more])
    with pytest.raises(RecipeError, match=r"teacher\.quantize"):
        parse_recipe({"method": "lcm", "teacher": {"quantize": "int3"}})
    for kind, library in (("int8", "torchao.quantization"), ("nf4", "bitsandbytes")):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(ValueError, match=rf"teacher\.quantize {kind} needs \w+: pip install 'fewstep\[lowmem\]'"):
            quantize(torch.nn.Linear(2, 2), kind)


@pytest.mark.slow
def test_a_plan_knows_of_it():
    from fewstep.runs.plan import plan

    sizes = {}
    for kind in (None, "nf4"):
        more = [] if kind is None else [f"teacher.quantize={kind}"]
        sizes[kind] = plan(load_recipe("scenes-64-lcm", more), timed=False).estimate.training["the teacher's network"]
    base = outline("scenes-64").base
    assert sizes[None] - sizes["nf4"] == saved_bytes(base, "nf4") > saved_bytes(base, "int8") > 0
