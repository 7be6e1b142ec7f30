"""Training of the teacher: its losses, and that an interrupted run ends in the same weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewstep.data.random import Rng
from fewstep.diffusion.schedule import Schedule
from fewstep.scenes64 import architecture as scenes64
from fewstep.scenes64.linear_code import fit_linear_code
from fewstep.scenes64.scenes import ATTRIBUTES, WORDS, Scenes
from fewstep.scenes64.teacher_stages import AutoencoderStage, TextToImageStage, as_tensor, edge_error, encode_pool
from fewstep.scenes64.train_teacher import Fit, TeacherSettings, export, train_unet, train_vae
from fewstep.training import checkpoint
from fewstep.training.settings import TrainingSettings
from tests.training.several import spawn

torch.set_num_threads(1)
TINY = TrainingSettings(steps=4, batch_size=4, learning_rate=1e-3, warmup_steps=2, ema_decay=0.9, log_every=2)


@pytest.fixture(scope="module")
def tokenizer():
    return scenes64.build_tokenizer(WORDS)


@pytest.fixture(scope="module")
def pool(tokenizer):
    torch.manual_seed(0)
    return encode_pool(scenes64.build_vae().eval(), tokenizer, seed=3, size=12, tellings=2)


@pytest.fixture(scope="module")
def code():
    return fit_linear_code(as_tensor(Scenes(3).render(range(64)).images), 16)


def vae_stage(code, settings=TINY):
    torch.manual_seed(1)
    return AutoencoderStage(scenes64.build_vae((8, 8, 8, 8)), code, settings, seed=0)


def unet_stage(pool, tokenizer, settings=TINY, **options):
    torch.manual_seed(1)
    unet = scenes64.build_unet((48, 32), text_width=32)
    encoder = scenes64.build_text_encoder(tokenizer, width=32, layers=1)
    schedule = Schedule.from_diffusers(scenes64.build_scheduler())
    empty = torch.tensor(tokenizer([""], padding="max_length", max_length=scenes64.TOKENS).input_ids)
    return TextToImageStage(unet, encoder, pool, empty, schedule, settings, **options)


@pytest.mark.parametrize("kind", ["vae", "unet"])
def test_an_interrupted_run_ends_in_the_same_weights(kind, tmp_path, pool, tokenizer, code):
    def stage():
        return vae_stage(code) if kind == "vae" else unet_stage(pool, tokenizer)

    whole = Fit(stage(), tmp_path / "whole", seed=0)
    whole.run()
    first = Fit(stage(), tmp_path / "parts", seed=0)
    first.step()
    first.step()
    first.save()
    second = Fit(stage(), tmp_path / "parts", seed=0)
    assert second.done == 2
    second.run()
    assert checkpoint.same(whole.weights, second.weights)
    assert checkpoint.same(whole.ema, second.ema)


def test_another_seed_or_shape_is_refused(tmp_path, pool, tokenizer):
    fit = Fit(unet_stage(pool, tokenizer), tmp_path, seed=0)
    fit.step()
    fit.save()
    with pytest.raises(ValueError, match="another seed"):
        Fit(unet_stage(pool, tokenizer), tmp_path, seed=1)


def test_measuring_the_speed_changes_nothing(tmp_path, pool, tokenizer):
    measured, plain = (Fit(unet_stage(pool, tokenizer), tmp_path / name, seed=0) for name in "ab")
    assert measured.seconds_per_step(steps=1) > 0
    measured.step()
    plain.step()
    assert checkpoint.same(measured.weights, plain.weights)


def test_the_autoencoder_learns(tmp_path, code):
    fit = Fit(vae_stage(code, replace(TINY, steps=30, learning_rate=5e-3)), tmp_path, seed=0)
    losses = [float(fit.step()["loss"]) for _ in range(30)]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


def test_edge_error_sees_edges_only():
    a = torch.rand(2, 3, 16, 16)
    assert edge_error(a, a + 0.3) == pytest.approx(0.0, abs=1e-6)
    sharp = torch.zeros(1, 1, 8, 8)
    sharp[..., 4:] = 1.0
    # one column of seven differs by 1 horizontally, none vertically, 7 of 49 diagonally
    assert edge_error(sharp, torch.zeros_like(sharp), scales=1) == pytest.approx((1 / 7 + 0 + 1 / 7) / 3)


def test_the_pool_is_the_scenes_encoded(pool, tokenizer):
    assert pool.mean.shape == (12, 16, 8, 8) and pool.mean.dtype == torch.float16
    assert pool.tokens.shape == (12, 2, scenes64.TOKENS)
    torch.manual_seed(0)
    again = encode_pool(scenes64.build_vae().eval(), tokenizer, seed=3, size=5, tellings=2)
    assert torch.equal(again.tokens, pool.tokens[:5])
    assert torch.allclose(again.mean.float(), pool.mean[:5].float(), atol=2e-3)


def test_times_cover_all_and_captions_are_dropped(pool, tokenizer):
    stage = unet_stage(pool, tokenizer, replace(TINY, batch_size=2000), caption_dropout=0.25)
    rng = Rng(0, 0, 2000)
    times = stage._times(rng)
    assert torch.bincount(times, minlength=1000).tolist() == [2] * 1000
    _, tokens = stage._draw(rng, torch.arange(2000) % 12)
    assert (tokens == stage.empty).all(1).float().mean() == pytest.approx(0.25, abs=0.12)


def test_errors_of_x0_are_weighted_like_v_up_to_a_bound(pool, tokenizer):
    stage = unet_stage(pool, tokenizer, max_weight=5.0)
    t = torch.tensor([0, 100, 500, 999])
    snr = (stage.schedule.alpha(t) / stage.schedule.sigma(t)) ** 2
    of_x0 = stage._weights(t) * snr
    assert torch.allclose(of_x0, torch.minimum(snr + 1, torch.tensor(5.0)))
    assert of_x0[0] == pytest.approx(5.0) and of_x0[-1] == pytest.approx(1.005, abs=0.003)


def test_both_stages_to_a_folder(tmp_path):
    """The whole way at full size, two steps each: trained, exported, continued without doing anything twice."""
    tiny = replace(TINY, steps=2, batch_size=2)
    settings = TeacherSettings(vae=tiny, unet=tiny, pool=8, tellings=1)
    vae = train_vae(tmp_path, settings)
    fit = train_unet(tmp_path, settings, vae)
    assert export(fit, vae, tmp_path / "teacher") <= 10e6
    assert (tmp_path / "teacher" / "model_index.json").is_file()
    log = (tmp_path / "unet" / "log.jsonl").read_text()
    again = train_unet(tmp_path, settings, train_vae(tmp_path, settings))
    assert again.done == 2 and checkpoint.same(again.ema, fit.ema)
    assert (tmp_path / "unet" / "log.jsonl").read_text() == log


def test_stage_two_can_go_on_from_a_pipeline(tmp_path):
    """Its weights are where training starts, and its autoencoder is the one that is exported."""
    settings = TeacherSettings(unet=replace(TINY, steps=1, learning_rate=1e-6, ema_decay=0.0), pool=8, tellings=1)
    pipeline = scenes64.build_pipeline(WORDS, seed=5)
    fit = train_unet(tmp_path / "run", settings, pipeline.vae, init=pipeline)
    for name in ("unet", "text_encoder"):
        before, after = getattr(pipeline, name).state_dict(), fit.stage.networks[name].state_dict()
        assert all(torch.allclose(after[key], before[key], atol=1e-5) for key in before)
    assert not torch.equal(fit.stage.networks["unet"].conv_in.bias, pipeline.unet.conv_in.bias)
    other = train_unet(tmp_path / "other", settings, pipeline.vae)
    assert not torch.allclose(other.stage.networks["unet"].conv_in.bias, pipeline.unet.conv_in.bias)


def test_the_encoder_is_taught_the_code_and_the_decoder_draws_from_it(tmp_path, code):
    """The encoder's error falls, and the decoder is never shown what the encoder gives instead."""
    stage = vae_stage(code, replace(TINY, batch_size=8, learning_rate=5e-3))
    fit = Fit(stage, tmp_path, seed=0)
    errors = [float(fit.step()["code"]) for _ in range(30)]
    assert errors[-1] < 0.5 * errors[0]
    parts = stage.loss(Rng(0, 0, 8))
    decoder = [p for n, p in stage.vae.named_parameters() if n.startswith(("decoder", "post_quant"))]
    encoder = stage.vae.encoder.conv_in.weight
    assert all(g is None for g in torch.autograd.grad(parts["code"], decoder, allow_unused=True, retain_graph=True))
    stage.kl = 0.0
    with torch.no_grad():
        stage.vae.quant_conv.weight[16:] = 0.0  # a posterior of fixed width: then pixels tell the encoder nothing
    parts = stage.loss(Rng(0, 0, 8))
    (gradient,) = torch.autograd.grad(parts["pixels"], encoder, allow_unused=True)
    assert gradient is None or gradient.abs().max() == 0


def test_the_second_task_is_told_from_inside_and_fades(pool, tokenizer):
    """Labels are those of the rows, the text is read through it, and at the last step nothing of it is left."""
    stage = unet_stage(pool, tokenizer, replace(TINY, steps=10))
    for step, share in ((0, 1.0), (5, 0.5), (9, 0.1)):
        parts = stage.loss(Rng(0, step, 4))
        assert parts["loss"].item() == pytest.approx(
            parts["weighted"].item() + share * stage.telling * parts["telling"].item(), rel=1e-5
        )
    with torch.no_grad():  # residual branches start at zero: let something through
        for parameter in stage.unet.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    told = stage.loss(Rng(0, 0, 4))["telling"]
    words = stage.text_encoder.get_input_embeddings().weight
    (gradient,) = torch.autograd.grad(told, words)
    assert gradient.abs().sum() > 0
    assert pool.labels.classes.shape == (12, 4, len(ATTRIBUTES))
    things = Scenes(3).scene(7).things
    assert pool.labels.present[7].sum() == len(things)
    assert pool.labels.centres[7, 0].tolist() == pytest.approx([things[0].x, things[0].y])


def _train_a_part(folder, tensors):
    """One of two processes; the first leaves its weights."""
    from fewstep.scenes64.teacher_stages import LatentPool

    fit = Fit(unet_stage(LatentPool.of(tensors), scenes64.build_tokenizer(WORDS)), Path(folder), seed=0)
    fit.run()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, pool, tokenizer):
    """Each takes half of every batch; weights agree but for rounding, and one of them writes."""
    alone = Fit(unet_stage(pool, tokenizer), tmp_path / "one", seed=0)
    alone.run()
    spawn(_train_a_part, str(tmp_path / "two"), pool.tensors())
    newest = checkpoint.latest(tmp_path / "two" / "checkpoints")
    together = checkpoint.split(checkpoint.load(newest)[0], "weights")
    assert together.keys() == alone.weights.keys()
    for name, weight in alone.weights.items():
        assert torch.allclose(together[name], weight, atol=2e-4), name
    assert len((tmp_path / "two" / "log.jsonl").read_text().splitlines()) == 2
