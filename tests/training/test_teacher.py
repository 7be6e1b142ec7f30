"""Training of the teacher: its losses, and that an interrupted run ends in the same weights."""

from dataclasses import replace

import pytest
import torch

from fewstep.data.scenes import WORDS
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.random import Rng
from fewstep.models import scenes64
from fewstep.training import checkpoint
from fewstep.training.settings import TrainingSettings
from fewstep.training.teacher import Fit, TeacherSettings, export, train_unet, train_vae
from fewstep.training.teacher_stages import AutoencoderStage, TextToImageStage, edge_error, encode_pool

torch.set_num_threads(1)
TINY = TrainingSettings(steps=4, batch_size=4, learning_rate=1e-3, warmup_steps=2, ema_decay=0.9, log_every=2)


@pytest.fixture(scope="module")
def tokenizer():
    return scenes64.build_tokenizer(WORDS)


@pytest.fixture(scope="module")
def pool(tokenizer):
    torch.manual_seed(0)
    return encode_pool(scenes64.build_vae().eval(), tokenizer, seed=3, size=12, tellings=2)


def vae_stage(settings=TINY):
    torch.manual_seed(1)
    return AutoencoderStage(scenes64.build_vae((8, 8, 8, 8)), settings, seed=0)


def unet_stage(pool, tokenizer, settings=TINY, **options):
    torch.manual_seed(1)
    unet = scenes64.build_unet((48, 32), text_width=32)
    encoder = scenes64.build_text_encoder(tokenizer, width=32, layers=1)
    schedule = Schedule.from_diffusers(scenes64.build_scheduler())
    empty = torch.tensor(tokenizer([""], padding="max_length", max_length=scenes64.TOKENS).input_ids)
    return TextToImageStage(unet, encoder, pool, empty, schedule, settings, **options)


@pytest.mark.parametrize("kind", ["vae", "unet"])
def test_an_interrupted_run_ends_in_the_same_weights(kind, tmp_path, pool, tokenizer):
    def stage():
        return vae_stage() if kind == "vae" else unet_stage(pool, tokenizer)

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


def test_the_autoencoder_learns(tmp_path):
    fit = Fit(vae_stage(replace(TINY, steps=30, learning_rate=5e-3)), tmp_path, seed=0)
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
    _, tokens = stage._draw(rng)
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
