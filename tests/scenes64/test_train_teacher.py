"""Training of the teacher: its losses, and that an interrupted run ends in the same weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewstep.diffusion.schedule import Schedule
from fewstep.methods.base import Progress
from fewstep.scenes64 import architecture as scenes64
from fewstep.scenes64 import train_teacher
from fewstep.scenes64.autoencoder import CROWDED, Autoencoding, RenderedScenes, as_tensor, edge_error
from fewstep.scenes64.denoise import LESSONS, CaptionedUNet, Denoise, encode_scenes, encoded_scenes
from fewstep.scenes64.labels import Labels, detection_loss
from fewstep.scenes64.linear_code import fit_linear_code
from fewstep.scenes64.random import ScenesRng as Rng
from fewstep.scenes64.scenes import ATTRIBUTES, WORDS, Scenes
from fewstep.scenes64.stage import averaged
from fewstep.scenes64.train_teacher import TeacherSettings, export, train_unet, train_vae
from fewstep.training import checkpoint
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import seconds_per_step
from tests.training.several import spawn

torch.set_num_threads(1)
TINY = TrainingSettings(steps=4, batch_size=4, learning_rate=1e-3, warmup_steps=2, ema_decay=0.9, log_every=2)


@pytest.fixture(scope="module")
def tokenizer():
    return scenes64.build_tokenizer(WORDS)


@pytest.fixture(scope="module")
def pool(tokenizer):
    torch.manual_seed(0)
    return encode_scenes(scenes64.build_vae().eval(), tokenizer, seed=3, size=12, tellings=2)


@pytest.fixture(scope="module")
def code():
    return fit_linear_code(as_tensor(Scenes(3).render(range(64)).images), 16)


def vae_trainer(code, settings=TINY, folder=None, seed=0):
    torch.manual_seed(1)
    source = RenderedScenes(Scenes(0, numbers=CROWDED))
    return Autoencoding(scenes64.build_vae((8, 8, 8, 8)), source, code).trainer(settings, seed, folder)


def denoise(pool, tokenizer, *times_of_lesson):
    torch.manual_seed(1)
    unet = scenes64.build_unet((48, 32), text_width=32)
    network = CaptionedUNet(unet, scenes64.build_text_encoder(tokenizer, width=32, layers=1))
    empty = torch.tensor(tokenizer([""], padding="max_length", max_length=scenes64.TOKENS).input_ids)
    return Denoise(
        network, encoded_scenes(pool), Schedule.from_diffusers(scenes64.build_scheduler()), empty, *times_of_lesson
    )


def unet_trainer(pool, tokenizer, settings=TINY, folder=None, seed=0):
    return denoise(pool, tokenizer).trainer(settings, seed, folder)


def train_steps(trainer, count):
    """Loss and its terms after each of ``count`` steps."""
    found = []
    for _ in range(count):
        trainer.step(trainer.done)
        trainer.done += 1
        found.append(trainer.meter.read())
    return found


@pytest.mark.parametrize("kind", ["vae", "unet"])
def test_an_interrupted_run_ends_in_the_same_weights(kind, tmp_path, pool, tokenizer, code):
    def trainer(name):
        folder = tmp_path / name
        return vae_trainer(code, folder=folder) if kind == "vae" else unet_trainer(pool, tokenizer, folder=folder)

    whole = trainer("whole")
    whole.run()
    first = trainer("parts")
    train_steps(first, 2)
    first.save()
    second = trainer("parts")
    second.resume()
    assert second.done == 2
    second.run()
    assert any(key.startswith("roles/ema/") for key in whole.tensors())
    assert checkpoint.same(whole.tensors(), second.tensors())


def test_another_seed_or_shape_is_refused(tmp_path, pool, tokenizer):
    trainer = unet_trainer(pool, tokenizer, folder=tmp_path)
    train_steps(trainer, 1)
    trainer.save()
    with pytest.raises(ValueError, match="another method or seed"):
        unet_trainer(pool, tokenizer, folder=tmp_path, seed=1).resume()


def test_measuring_the_speed_changes_nothing(pool, tokenizer):
    """It is done with a trainer of its own, which leaves the network that it was given as it was."""
    stage = denoise(pool, tokenizer)
    before = {name: p.clone() for name, p in stage.start.named_parameters()}
    assert seconds_per_step(stage.trainer(TINY, 0), steps=1, warm_up=0) > 0
    assert checkpoint.same(before, dict(stage.start.named_parameters()))


def test_minutes_become_steps_once(tmp_path, tokenizer, pool):
    """A run that is continued keeps its number of steps, whatever is asked for then."""
    stage, options = denoise(pool, tokenizer), (replace(TINY, steps=100), tmp_path, 0)
    trained = stage.train(*options, minutes=1e-6)
    assert json.loads((tmp_path / "plan.json").read_text())["steps"] == 1
    log = (tmp_path / "log.jsonl").read_text()
    again = stage.train(*options, minutes=0.02)
    assert (tmp_path / "log.jsonl").read_text() == log and len(log.splitlines()) == 1
    assert checkpoint.same(dict(trained.named_parameters()), dict(again.named_parameters()))


def test_the_average_spans_no_more_than_the_run(tmp_path, tokenizer, pool):
    """Of weights that start at random little must be left in the average of a short run."""
    one = unet_trainer(pool, tokenizer, replace(TINY, steps=20, ema_decay=0.9999))
    assert one.settings.ema_decay == pytest.approx(21 / 30) and one.settings.ema_decay**20 < 1e-3
    assert unet_trainer(pool, tokenizer, replace(TINY, steps=20000)).settings.ema_decay == TINY.ema_decay
    plain = unet_trainer(pool, tokenizer, replace(TINY, ema_decay=0.0))
    assert averaged(plain) is plain.roles.student.network.network


def test_a_lesson_shows_single_things_and_their_times(pool, tokenizer):
    for name, (low, high, often) in (("places", (900, 1000, 1.0)), ("patterns", (350, 850, 0.75))):
        lesson = LESSONS[name]
        scenes = [lesson.scenes(3).scene(i) for i in range(300)]
        assert {len(scene.things) for scene in scenes} == {1}
        plain = sum(scene.things[0].fill == "plain" for scene in scenes) / 300
        assert plain == pytest.approx(lesson.fills["plain"], abs=0.08)
        times = denoise(pool, tokenizer, lesson.times).times(Rng(0, 1, 4000)).double()
        inside = ((times >= low) & (times < high)).double().mean()  # those of the whole task lie there too, at times
        assert inside == pytest.approx(often, abs=0.03), name
        assert times.max() <= 999 and (often == 1.0 or times.min() < 100)
    assert denoise(pool, tokenizer).times(Rng(0, 1, 4000)).double().mean() == pytest.approx(499.5, abs=1)


def test_a_lesson_is_taught_in_a_folder_of_its_own(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(train_teacher, "encode_scenes", lambda *_, **__: asked.update(lesson=_[-1]) or {})
    monkeypatch.setattr(train_teacher, "kept", lambda path, make: asked.update(path=path, made=make()))
    monkeypatch.setattr(train_teacher, "encoded_scenes", lambda tensors: None)
    monkeypatch.setattr(Denoise, "train", lambda self, settings, folder, *_: (folder, self.times_of_lesson))
    for name, folder in (("patterns", "unet-patterns"), ("", "unet")):
        done = train_unet(tmp_path, TeacherSettings(lesson=name), None)
        assert done == (tmp_path / folder, LESSONS[name].times if name else (0.0, 1.0, 0.0))
        assert asked["path"] == tmp_path / folder / "latents.safetensors" and asked["lesson"] == LESSONS.get(name)


def test_the_autoencoder_learns(code):
    trainer = vae_trainer(code, replace(TINY, steps=30, learning_rate=5e-3))
    losses = [line["student/loss"] for line in train_steps(trainer, 30)]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


def test_edge_error_sees_edges_only():
    a = torch.rand(2, 3, 16, 16)
    assert edge_error(a, a + 0.3) == pytest.approx(0.0, abs=1e-6)
    sharp = torch.zeros(1, 1, 8, 8)
    sharp[..., 4:] = 1.0
    # one column of seven differs by 1 horizontally, none vertically, 7 of 49 diagonally
    assert edge_error(sharp, torch.zeros_like(sharp), scales=1) == pytest.approx((1 / 7 + 0 + 1 / 7) / 3)


def test_the_pool_is_the_scenes_encoded(pool, tokenizer):
    assert pool["mean"].shape == (12, 16, 8, 8) and pool["mean"].dtype == torch.float16
    assert pool["tokens"].shape == (12, 2, scenes64.TOKENS)
    torch.manual_seed(0)
    again = encode_scenes(scenes64.build_vae().eval(), tokenizer, seed=3, size=5, tellings=2)
    assert torch.equal(again["tokens"], pool["tokens"][:5])
    assert torch.allclose(again["mean"].float(), pool["mean"][:5].float(), atol=2e-3)


def test_times_cover_all_and_captions_are_dropped(pool, tokenizer):
    stage, rng = denoise(pool, tokenizer), Rng(0, 0, 2000)
    stage.caption_dropout, batch = 0.25, stage.source.batch(rng)
    draws = stage.draw(batch, rng, Progress(0, 4))
    assert torch.bincount(draws.times, minlength=1000).tolist() == [2] * 1000
    tokens = stage.prepare(None, batch, draws, {"student"})["tokens"]
    assert (tokens == stage.empty).all(1).float().mean() == pytest.approx(0.25, abs=0.12)
    kept = ~draws.dropped
    told = batch.cond["tokens"][torch.arange(2000), draws.telling].long()
    assert torch.equal(tokens[kept], told[kept]) and set(draws.telling.tolist()) == {0, 1}


def test_errors_of_x0_are_weighted_like_v_up_to_a_bound(pool, tokenizer):
    stage = denoise(pool, tokenizer)
    stage.max_weight = 5.0
    t = torch.tensor([0, 100, 500, 999])
    snr = (stage.schedule.alpha(t) / stage.schedule.sigma(t)) ** 2
    of_x0 = stage.weights(t) * snr
    assert torch.allclose(of_x0, torch.minimum(snr + 1, torch.tensor(5.0)))
    assert of_x0[0] == pytest.approx(5.0) and of_x0[-1] == pytest.approx(1.005, abs=0.003)


def test_both_stages_to_a_folder(tmp_path):
    """The whole way at full size, two steps each: trained, exported, continued without doing anything twice."""
    tiny = replace(TINY, steps=2, batch_size=2)
    settings = TeacherSettings(vae=tiny, unet=tiny, pool=8, tellings=1)
    vae = train_vae(tmp_path, settings)
    network = train_unet(tmp_path, settings, vae)
    average = {name: p.clone() for name, p in network.named_parameters()}
    assert export(network, vae, tmp_path / "teacher") <= 10e6
    assert (tmp_path / "teacher" / "model_index.json").is_file()
    log = (tmp_path / "unet" / "log.jsonl").read_text()
    again = train_unet(tmp_path, settings, train_vae(tmp_path, settings))
    assert checkpoint.same(dict(again.named_parameters()), average)
    assert (tmp_path / "unet" / "log.jsonl").read_text() == log
    assert checkpoint.latest(tmp_path / "unet" / "checkpoints").name == "step-0000002"


def test_stage_two_can_go_on_from_a_pipeline(tmp_path):
    """Its weights are where training starts, and its autoencoder is the one that is exported."""
    settings = TeacherSettings(unet=replace(TINY, steps=1, learning_rate=1e-6, ema_decay=0.0), pool=8, tellings=1)
    pipeline = scenes64.build_pipeline(WORDS, seed=5)
    network = train_unet(tmp_path / "run", settings, pipeline.vae, init=pipeline)
    for name in ("unet", "text_encoder"):
        before, after = getattr(pipeline, name).state_dict(), getattr(network, name).state_dict()
        assert all(torch.allclose(after[key], before[key], atol=1e-5) for key in before)
    assert not torch.equal(network.unet.conv_in.bias, pipeline.unet.conv_in.bias)
    other = train_unet(tmp_path / "other", settings, pipeline.vae)
    assert not torch.allclose(other.unet.conv_in.bias, pipeline.unet.conv_in.bias)


def test_the_encoder_is_taught_the_code_and_the_decoder_draws_from_it(code):
    """The encoder's error falls, and the decoder is never shown what the encoder gives instead."""
    trainer = vae_trainer(code, replace(TINY, batch_size=8, learning_rate=5e-3, steps=30))
    errors = [line["student/code"] for line in train_steps(trainer, 30)]
    assert errors[-1] < 0.5 * errors[0]
    stage, vae, rng = trainer.method, trainer.roles.student.network.network, Rng(0, 0, 8)
    batch = trainer.source.batch(rng)
    draws = stage.draw(batch, rng, Progress(0, 30))
    terms = stage.terms(vae, batch.x0, draws)
    decoder = [p for n, p in vae.named_parameters() if n.startswith(("decoder", "post_quant"))]
    encoder = vae.encoder.conv_in.weight
    assert all(g is None for g in torch.autograd.grad(terms["code"], decoder, allow_unused=True, retain_graph=True))
    with torch.no_grad():
        vae.quant_conv.weight[16:] = 0.0  # a posterior of fixed width: then pixels tell the encoder nothing
    terms = stage.terms(vae, batch.x0, draws)
    (gradient,) = torch.autograd.grad(terms["pixels"], encoder, allow_unused=True)
    assert gradient is None or gradient.abs().max() == 0


def test_the_second_task_is_told_from_inside_and_fades(pool, tokenizer):
    """Labels are those of the rows, the text is read through it, and at the last step nothing of it is left."""
    trainer = unet_trainer(pool, tokenizer, replace(TINY, steps=10))
    stage, roles, source = trainer.method, trainer.roles, trainer.source
    network = stage.trained(roles)
    for step, share in ((0, 1.0), (5, 0.5), (9, 0.1)):
        rng = Rng(0, step, 4)
        batch = source.batch(rng)
        draws = stage.draw(batch, rng, Progress(step, 10))
        loss = stage.student(roles, batch, draws, stage.prepare(roles, batch, draws, {"student"}))
        assert loss.total.item() == pytest.approx(
            loss.parts["weighted"].item() + share * stage.detection * loss.parts["detection"].item(), rel=1e-5
        )
    with torch.no_grad():  # residual branches start at zero: let something through
        for parameter in network.unet.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    roles.student(batch.x0, draws.times, stage.prepare(roles, batch, draws, {"student"}))
    told = detection_loss(network.cells, Labels.from_cond(batch.cond))["loss"]
    (gradient,) = torch.autograd.grad(told, network.text_encoder.get_input_embeddings().weight)
    assert gradient.abs().sum() > 0
    assert pool["classes"].shape == (12, 4, len(ATTRIBUTES))
    things = Scenes(3).scene(7).things
    assert pool["present"][7].sum() == len(things)
    assert pool["centres"][7, 0].tolist() == pytest.approx([things[0].x, things[0].y])
    batch = source.batch(Rng(0, 0, 12))  # every scene once: its labels go with its captions
    for tokens, centres in zip(batch.cond["tokens"], batch.cond["centres"], strict=True):
        (row,) = [i for i in range(12) if torch.equal(pool["tokens"][i], tokens)]
        assert torch.equal(centres, pool["centres"][row])


def _train_a_part(folder, tensors):
    """One of two processes; the first leaves its weights."""
    unet_trainer(tensors, scenes64.build_tokenizer(WORDS), folder=Path(folder)).run()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, pool, tokenizer):
    """Each takes half of every batch; weights agree but for rounding, and one of them writes."""
    alone = unet_trainer(pool, tokenizer, folder=tmp_path / "one")
    alone.run()
    spawn(_train_a_part, str(tmp_path / "two"), pool)
    newest = checkpoint.latest(tmp_path / "two" / "checkpoints")
    together, weights = checkpoint.split(checkpoint.load(newest)[0], "roles/student"), alone.roles.tensors_of("student")
    assert together.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.allclose(together[name], weight, atol=2e-4), name
    assert len((tmp_path / "two" / "log.jsonl").read_text().splitlines()) == 2
