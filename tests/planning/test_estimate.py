"""What a run will need, against what it then needs: memory by hand, known parameter counts, PyTorch's profiler."""

import json
import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fewstep.methods.base import Balanced
from fewstep.methods.dmd import DMD
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.lcm import LCM
from fewstep.methods.tcd import TCD
from fewstep.models.families import UNET_LORA_TARGETS
from fewstep.models.lora import matching
from fewstep.models.meta_pipeline import MetaPipeline, outline
from fewstep.models.roles import Weights
from fewstep.planning import memory_trace
from fewstep.planning.estimate import _data, _latents, _on_meta, estimate, fill
from fewstep.planning.memory_trace import DeviceRules, MemoryTracker
from fewstep.planning.rehearsal import rehearse
from fewstep.recipe.load import parse_recipe
from fewstep.recipe.schema import EvaluateConfig
from fewstep.runs.measured_on import prompt_set
from fewstep.runs.plan import describe, plan
from fewstep.runs.setup import setup
from fewstep.runs.validation import Validation, validation_prompts
from fewstep.training.machine import asked_for, in_words, is_out_of_memory, memory
from fewstep.training.optimizers import moment_bytes
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import Trainer, build_roles
from tests.models.pipelines import build

SDXL = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def meta(*shape, **options):
    return torch.empty(*shape, device="meta", **options)


# ------------------------------------------------------------------ the memory tracker, by hand


def test_the_tracker_counts_from_birth_to_death():
    """100 floats are 400 bytes; views and in-place operations make none."""
    given = meta(100)
    with MemoryTracker("cpu", [given]) as tracker:
        a = given + 1  # 400
        b = a * 2  # 800
        a.mul_(3)
        c = a.view(10, 10)[2:]
        assert (tracker.live, tracker.peak) == (800, 800)
        del a
        assert tracker.live == 800  # c looks at it
        del c
        assert tracker.live == 400
        d = b.double()  # 400 + 800
        del b, d
        given.t_()
        assert (tracker.live, tracker.peak) == (0, 1200)


def test_the_tracker_holds_what_backward_needs():
    x = meta(8, 8, requires_grad=True)  # 256 bytes each
    with MemoryTracker("cpu", [x]) as tracker:
        y = x.sin().sin()  # the inner one is saved: 512
        assert tracker.live == 512
        total = y.sum()
        del y
        assert tracker.live == 256 + 4
        total.backward()
        del total
        assert tracker.live == 256  # the gradient
        x.grad = None
        assert tracker.live == 0


def test_an_accelerator_rounds_up_to_512_bytes():
    with MemoryTracker("cuda") as tracker:
        kept = [meta(1), meta(129)]
        assert tracker.live == 512 + 1024
        del kept


@pytest.mark.parametrize("autocast, size", [(None, 4), (torch.bfloat16, 2)])
def test_attention_keeps_no_matrix_of_queries_and_keys(autocast, size):
    """4096 queries and keys: the matrix would be 67 MB. Kept are the answer and a number per query."""
    q = meta(1, 2, 4096, 8)
    with DeviceRules("cpu", autocast), MemoryTracker("cpu", [q]) as tracker:
        answer = F.scaled_dot_product_attention(q, q, q)
    n = 2 * 4096
    assert tracker.live == n * 8 * size
    assert tracker.peak <= n * 8 * size * (1 if autocast is None else 4) + n * 4
    assert answer.dtype == autocast or autocast is None


@pytest.mark.parametrize("device, normalised", [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_autocast_is_that_of_the_device(device, normalised):
    with DeviceRules(device, torch.bfloat16):
        y = F.linear(meta(4, 8), meta(6, 8))
        assert y.dtype == torch.bfloat16
        assert F.layer_norm(y, (6,)).dtype == F.group_norm(y, 2).dtype == normalised
        assert F.conv2d(meta(1, 2, 4, 4), meta(3, 2, 1, 1)).dtype == torch.bfloat16
    if device == "cpu":  # and so does the real one
        with torch.autocast("cpu", torch.bfloat16):
            y = F.linear(torch.zeros(4, 8), torch.zeros(6, 8))
            assert F.layer_norm(y, (6,)).dtype == F.group_norm(y, 2).dtype == normalised


FUNCTIONS = [
    lambda x: x + 1,
    lambda x: x + 1.5,
    lambda x: ((x > 0) + 1, (x > 0) + 1.0),
    lambda x: torch.ops.aten._unsafe_view(x, [x.numel()]),
    lambda x: F.layer_norm(x, x.shape[-1:]),
    lambda x: x.transpose(0, 1) * 2,
    lambda x: torch.cat([x, x[:1]]),
    lambda x: x.to(torch.bfloat16),
    lambda x: x.max(dim=1),
    lambda x: x.unbind(),
    lambda x: torch.where(x > 0, 1, x),
    lambda x: (x > 0).sum() + (2 if x.dtype.is_floating_point else 2.5),
    lambda x: F.conv2d(x[None], torch.empty(5, x.shape[0], 1, 1, device=x.device, dtype=x.dtype)),
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_call_made_before_gives_what_the_operator_gives(function):
    """Twice, of three layouts in two number formats each, against PyTorch without the tracker."""

    def layouts():
        for dtype in (torch.float32, torch.float64):
            x = meta(3, 4, 6, dtype=dtype)
            yield from (x, meta(3, 6, 4, dtype=dtype).transpose(1, 2), meta(4, 6, dtype=dtype).expand(3, 4, 6))

    def told(found):
        return [(t.shape, t.stride(), t.dtype, t.device) for t in (found if isinstance(found, tuple) else (found,))]

    for _ in range(2):
        for x in layouts():
            if not x.is_contiguous() and function is FUNCTIONS[3]:
                continue  # PyTorch itself refuses
            wanted = function(x)
            with MemoryTracker("cpu", [x]):
                found = function(x)
                again = function(x)
            assert told(found) == told(again) == told(wanted)

            def storages(result):
                return [t.untyped_storage()._cdata for t in (result if isinstance(result, tuple) else (result,))]

            shared = [key == x.untyped_storage()._cdata for key in storages(wanted)]
            assert [key == x.untyped_storage()._cdata for key in storages(again)] == shared
            assert any(shared) or not set(storages(found)) & set(storages(again))


def test_operations_are_those_that_pytorch_counts():
    """A product [4, 8] [8, 6], a convolution, attention with its backward: by hand, and twice."""
    x, w = meta(4, 8, requires_grad=True), meta(6, 8)
    q = meta(1, 2, 16, 8, requires_grad=True)
    product, attention = 2 * 4 * 8 * 6, 2 * (2 * 2 * 16 * 16 * 8)
    for times in (1, 2):
        with DeviceRules("cpu", None), MemoryTracker("cpu", [x, w, q]) as tracker:
            for _ in range(times):
                F.linear(x, w).sum().backward()
                F.conv2d(meta(1, 3, 9, 9), meta(5, 3, 3, 3))
                F.scaled_dot_product_attention(q, q, q).sum().backward()
        convolution = 2 * 3 * 3 * 3 * 5 * 7 * 7
        assert tracker.flops == times * (2 * product + convolution + attention + 5 * attention // 2)


# ------------------------------------------------------------------ full-size models


def unet_folder(folder, config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.slow
def test_stable_diffusion_has_859_520_964_parameters(tmp_path):
    config = {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 768, "sample_size": 64}
    sketch = outline(unet_folder(tmp_path / "unet", config))
    assert sum(p.numel() for p in sketch.base.parameters()) == 859_520_964
    assert all(p.is_meta and p.dtype == torch.float32 for p in sketch.base.parameters())
    settings = TrainingSettings(batch_size=1)
    found = estimate(sketch, TCD, TCD.Settings(), settings, Weights(rank=64), 1)
    # The public LCM-LoRA of this model, rank 64: 278 layers, 67,252,224 parameters, a file of 134.5 MB in fp16.
    assert (found.lora_layers, found.trainable) == (278, {"student": 67_252_224})
    assert found.training["the teacher's network"] == 4 * 859_520_964
    assert found.encoding == found.sampling == 0  # no autoencoder there
    assert sum(p.numel() for p in sketch.base.parameters()) == 859_520_964  # no adapters left behind


@pytest.mark.slow
def test_sdxl_has_788_layers_to_adapt(tmp_path):
    sketch = outline(unet_folder(tmp_path / "unet", SDXL), dtype=torch.bfloat16)
    assert sum(p.numel() for p in sketch.base.parameters()) == 2_567_463_684
    assert len(matching(sketch.base, UNET_LORA_TARGETS)) == 788  # files of 787 MB in fp32, 394 MB in fp16
    found = estimate(sketch, TCD, TCD.Settings(), TrainingSettings(batch_size=1), Weights(rank=64), 1)
    assert (found.lora_layers, found.trainable) == (788, {"student": 196_751_360})
    assert found.training["the teacher's network"] == 2 * 2_567_463_684
    shapes = {name: tuple(t.shape[1:]) for name, t in sketch.prompts(2, torch.float16).tensors.items()}
    assert shapes == {"prompt_embeds": (77, 2048), "pooled_embeds": (1280,), "time_ids": (6,)}


SD3 = {
    "_class_name": "SD3Transformer2DModel", "sample_size": 128, "num_layers": 24, "attention_head_dim": 64,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 192, "in_channels": 16, "out_channels": 16, "patch_size": 2,
}  # fmt: skip
FLUX = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}


@pytest.mark.parametrize("config, parameters, layers, conditions", [
    (SD3, 2_028_328_000, 340, {"prompt_embeds": (333, 4096), "pooled_embeds": (2048,)}),
    (FLUX, 11_901_408_320, 504, {"prompt_embeds": (512, 4096), "pooled_embeds": (768,)}),
])  # fmt: skip
def test_transformers_have_every_linear_layer_adapted(config, parameters, layers, conditions, tmp_path):
    """The counts of SD3-medium and FLUX.1-dev; and of other programs' LoRAs of them."""
    sketch = outline(unet_folder(tmp_path / "transformer", config))
    assert sum(p.numel() for p in sketch.base.parameters()) == parameters
    linear = [name for name, layer in sketch.base.named_modules() if isinstance(layer, torch.nn.Linear)]
    names = matching(sketch.base, sketch.denoiser().network.lora_targets)
    assert len(linear) == layers and set(names) == set(linear)
    assert {n: tuple(t.shape[1:]) for n, t in sketch.prompts(1, torch.float16).tensors.items()} == conditions
    assert sketch.latent_shape == (16, 128, 128)


@pytest.mark.parametrize("content, says", [
    ({}, "cannot be built"), ({"_class_name": "Nonsense"}, "cannot be built"), ([], "cannot be built"),
])  # fmt: skip
def test_a_folder_without_sense_is_one_sentence(content, says, tmp_path):
    with pytest.raises(ValueError, match=says) as caught:
        outline(unet_folder(tmp_path / "unet", content))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="holds no diffusers pipeline"):
        outline(str(tmp_path))
    with pytest.raises(ValueError, match="There is no teacher"):
        outline("/no/such")


# ------------------------------------------------------------------ estimate against a real run


@pytest.fixture(scope="module")
def small():
    return outline("scenes-64")


def trainer_of(sketch: MetaPipeline, method, settings, weights):
    """The real thing on random weights: what the estimate is about."""
    teacher = sketch.denoiser()
    fill(teacher.network.to_empty(device="cpu"))
    roles = build_roles(teacher, method, settings, weights)
    return Trainer(method, roles, _latents(sketch, 8, "cpu"), settings)


def peak_of_a_step(trainer):
    """Bytes that a step allocates at its peak, by PyTorch's profiler: every allocation of the process."""
    return peak_of(lambda: trainer.step(1), before=lambda: trainer.step(0))


def peak_of(call, before=None):
    """Bytes that a call allocates at its peak; ``before`` or the call itself has warmed up."""
    (before or call)()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    held = peak = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += size
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("method, kind, changes", [
    pytest.param(TCD, "lora", {}, id="lora"),
    pytest.param(TCD, "full", {"ema_decay": 0.9}, id="full", marks=pytest.mark.slow),
    pytest.param(TCD, "lora", {"gradient_checkpointing": True, "precision": "bf16"}, id="checkpointing in bf16",
                 marks=pytest.mark.slow),
    pytest.param(LCM, "full", {"accumulation": 4, "precision": "fp64"}, id="accumulation in fp64",
                 marks=pytest.mark.slow),
])  # fmt: skip
def test_estimate_and_measurement_agree(method, kind, changes, small):
    settings = TrainingSettings(batch_size=8, **changes)
    weights = Weights(kind, rank=8)
    found = estimate(small, method, method.Settings(), settings, weights, 8)
    teacher = small.denoiser()
    trainer = trainer_of(small, method(teacher.schedule), settings, weights)
    assert found.step == pytest.approx(peak_of_a_step(trainer), rel=0.02)
    mine = {name: sum(t.nbytes for key, t in trainer.roles.tensors().items() if key.startswith(name))
            for name in ("student", "ema")}  # fmt: skip
    assert found.training["student's own weights"] == mine["student"]
    assert found.training.get("ema (moving average)", 0) == mine["ema"]
    moments = [t for key, t in trainer.players[0].tensors().items() if not key.endswith("step")]
    assert found.training["optimiser"] == sum(t.nbytes for t in moments)
    assert found.training["gradients"] == sum(p.nbytes for p in trainer.roles.parameters("student"))
    assert found.training["encoded data"] == sum(
        t.nbytes for t in (trainer.source.mean, trainer.source.std, trainer.source.cond["prompt_embeds"])
    )
    cost = trainer.roles.cost()
    assert found.equivalents == cost.forward_equivalents / (2 * settings.batch_size)  # it made two steps
    assert found.calls == {"student": 1, "teacher": 1, "target": 1}
    assert found.peak == max(sum(found.training.values()), found.encoding, found.sampling)


@pytest.mark.parametrize("kind, changes, copies", [
    ("full", {"ema_decay": 0.9}, 4), ("full", {"async_checkpoints": False}, 0), ("full", {"fsdp": False}, 0),
    ("lora", {}, 0),
])  # fmt: skip
def test_the_copy_of_a_checkpoint_in_the_background_is_counted(kind, changes, copies, small):
    """Student, two moments of it, and its average; what stays whole is small and written at once."""
    settings = TrainingSettings(batch_size=4, **{"fsdp": True, **changes})
    found = estimate(small, TCD, TCD.Settings(target_decay=0.0), settings, Weights(kind, rank=4), 8, memory_alone=True)
    assert found.checkpoint == copies * 4 * found.parameters


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_copies_of_trained_weights_in_bf16_are_counted(precision, small):
    """Two bytes for each of a LoRA's four-byte weights."""
    settings = TrainingSettings(batch_size=4, precision=precision)
    found = estimate(small, TCD, TCD.Settings(), settings, Weights("lora", rank=4), 8).training
    wanted = found["student's own weights"] / 2 if precision == "bf16" else None
    assert found.get("bf16 copies of trained weights") == wanted


@pytest.mark.slow
def test_pairs_are_counted_where_a_method_learns_from_them(small):
    settings, weights = TrainingSettings(batch_size=4), Weights("lora", rank=4)
    found = estimate(small, DMD, DMD.Settings(), settings, weights, 8, pairs=6)
    teacher, method = small.denoiser(), DMD(small.denoiser().schedule)
    fill(teacher.network.to_empty(device="cpu"))
    source, _ = _data(small, DMD.streams_of(DMD.Settings()), 8, 6, "cpu")
    trainer = Trainer(method, build_roles(teacher, method, settings, weights), source, settings)
    assert found.step == pytest.approx(peak_of_a_step(trainer), rel=0.02)
    data, pairs = source.data, source.pairs
    sizes = [
        data.mean.nbytes,
        data.std.nbytes,
        pairs.mean.nbytes,
        *(s.cond["prompt_embeds"].nbytes for s in (data, pairs)),
    ]
    assert len(data.mean) == 8 and len(pairs.mean) == 6 and found.training["encoded data"] == sum(sizes)
    assert found.equivalents == trainer.roles.cost().forward_equivalents / 8 == 12


@pytest.mark.slow
def test_a_player_that_plays_seldom_costs_its_share(small):
    settings, weights = TrainingSettings(batch_size=4), Weights("lora", rank=4)
    own = DMD2.Settings(num_inference_steps=1, student_every=3, adversarial_weight=0.0)
    found = estimate(small, DMD2, own, settings, weights, 8)
    teacher = small.denoiser()
    method = DMD2(teacher.schedule, own)
    fill(teacher.network.to_empty(device="cpu"))
    source, _ = _data(small, DMD2.streams_of(own), 8, 0, "cpu")
    trainer = Trainer(method, build_roles(teacher, method, settings, weights), source, settings)
    for step in range(3):
        trainer.step(step)
    assert found.equivalents == trainer.roles.cost().forward_equivalents / (3 * settings.batch_size)


@pytest.mark.slow
def test_a_loss_that_differentiates_on_its_own_is_traced_under_checkpointing(small):
    """DMD2's game asks for its own gradient: what checkpointing recomputes there must be what ran forward."""
    settings = TrainingSettings(batch_size=4, gradient_checkpointing=True)
    own = DMD2.Settings(num_inference_steps=1, student_every=1, adversarial_weight=0.1, head="residual")
    found = estimate(small, DMD2, own, settings, Weights("lora", rank=4), 8)
    teacher = small.denoiser()
    method = DMD2(teacher.schedule, own)
    fill(teacher.network.to_empty(device="cpu"))
    source, _ = _data(small, DMD2.streams_of(own), 8, 0, "cpu")
    trainer = Trainer(method, build_roles(teacher, method, settings, Weights("lora", rank=4)), source, settings)
    assert found.step == pytest.approx(peak_of_a_step(trainer), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_computes_what_pytorch_counts_in_a_real_one(small, accumulation, monkeypatch):
    """Without attention, which its counter does not know on a CPU."""
    known = {op: count for op, count in memory_trace._FLOPS.items() if "attention" not in str(op)}
    monkeypatch.setattr(memory_trace, "_FLOPS", known)
    monkeypatch.setattr(memory_trace, "_CALLS", {})
    settings, weights = TrainingSettings(batch_size=4, accumulation=accumulation), Weights("lora", rank=4)
    found = estimate(small, TCD, TCD.Settings(guidance_scale=3.0), settings, weights, 8)
    teacher = small.denoiser()
    trainer = trainer_of(small, TCD(teacher.schedule, guidance_scale=3.0), settings, weights)
    with FlopCounterMode(display=False) as counter:
        trainer.step(0)
    assert found.rehearsal.flops == pytest.approx(counter.get_total_flops(), rel=1e-3)  # it also counts clipping


class Balancing(TCD):
    """TCD with its loss once more as a balanced term."""

    def student(self, roles, batch, draws, shared):
        loss = super().student(roles, batch, draws, shared)
        return replace(loss, balanced={"again": Balanced(2 * loss.total)})


def rehearsed(small, method, processes=1):
    settings = TrainingSettings(batch_size=1)
    built, roles, source, _ = _on_meta(small, method, TCD.Settings(), settings, Weights("full"), 2, 0)
    with patch("fewstep.training.distributed.count", lambda: processes):
        return rehearse(built, roles, source, settings), sum(p.nbytes for p in roles.parameters("student"))


def test_balanced_terms_hold_gradients_of_their_own(small):
    """During the second backward the first one's gradients are there, all of them."""
    plain, size = rehearsed(small, TCD)
    more, _ = rehearsed(small, Balancing)
    assert more.peak >= 3 * size and more.peak - plain.peak > 0.5 * size


def test_several_processes_copy_the_gradients(small):
    alone, size = rehearsed(small, TCD)
    together, _ = rehearsed(small, TCD, 2)
    assert together.peak > alone.peak and together.peak == pytest.approx(2 * size, rel=1e-3)  # activations are gone


@pytest.mark.parametrize("metrics", [(), ("perceptual",)], ids=["features", "perceptual"])
@pytest.mark.slow
def test_validation_is_counted_where_students_are_measured(metrics, tmp_path):
    """The peak of one measurement of 12 prompts, and what stays held for it, by PyTorch's profiler and by tensors."""
    build("sd15").save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("".join(f"a red circle {i}\n" for i in range(12)))
    recipe = parse_recipe({
        "method": "tcd", "teacher": str(tmp_path / "model"), "training": {"batch_size": 2}, "student": {"rank": 2},
        "sample": {"teacher_steps": 2, "num_inference_steps": 2},
        "evaluate": {"every": 1, "count": 12, "prompts": str(tmp_path / "prompts.txt"), "metrics": list(metrics)},
    })  # fmt: skip
    found = plan(recipe, timed=False).estimate
    run = setup(recipe, tmp_path / "run")
    prompts = prompt_set(recipe, run.teacher, run.folder)
    run.teacher.make_room(validation_prompts(recipe))
    validation = Validation(run, prompts, lambda: 0.0)
    cond = run.teacher.encode_prompts(prompts.captions)
    kept = [*prompts.features.network.parameters(), *prompts.features.network.buffers(), *cond.flat().values()]
    assert found.training["validation"] == sum(t.nbytes for t in (*kept, prompts.noise, prompts.teacher))
    between = sum(found.training.values()) - found.step
    assert found.validating - between == pytest.approx(peak_of(lambda: validation._measure(1)), rel=0.05)
    assert found.peak >= found.validating and "while the student is measured" in "\n".join(describe(plan(recipe)))
    assert plan(recipe.model_copy(update={"evaluate": EvaluateConfig()}), timed=False).estimate.validating == 0


def test_moments_of_8_bits_are_a_byte_and_a_scale():
    """Below 4096 elements they stay in float32; a scale per 256 elements, two moments."""
    tensors = [meta(4095), meta(4096), meta(1000, 257)]
    assert moment_bytes(tensors[:1], "adamw8bit") == 8 * 4095
    assert moment_bytes(tensors[1:2], "adamw8bit") == 2 * 4096 + 8 * 16
    assert moment_bytes(tensors[2:], "adamw8bit") == 2 * 257_000 + 8 * math.ceil(257_000 / 256)
    assert moment_bytes(tensors, "adamw") == 8 * (4095 + 4096 + 257_000)


# ------------------------------------------------------------------ the machine


@pytest.mark.parametrize("size, words", [
    (12, "12 bytes"), (9e3, "9.0 kB"), (5_014_528, "5.0 MB"), (136_766_700, "137 MB"), (3.438e9, "3.44 GB"),
    (128e9, "128 GB"),
])  # fmt: skip
def test_sizes_in_words(size, words):
    assert in_words(size) == words


def test_errors_of_memory_are_known_as_such():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert is_out_of_memory(caught.value) and asked_for(caught.value) == 4 * 10**15
    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has 24 GiB")
    assert is_out_of_memory(cuda) and asked_for(cuda) == 2.5 * 2**30
    assert is_out_of_memory(MemoryError()) and asked_for(MemoryError()) is None
    for other in (RuntimeError("shape mismatch"), ValueError("out of memory"), KeyboardInterrupt()):
        assert not is_out_of_memory(other)


def test_memory_of_this_machine():
    free, total = memory("cpu")
    assert 0 < free <= total
    assert memory("mps") is None
