"""Losses on fixed batches are those of commit 14e21aa, where these parts had a training loop of their own.

The numbers were printed in a checkout of that commit, with today's ``content.py`` of the scenes, by
``PYTHONPATH=src OMP_NUM_THREADS=1 python FILE``, where FILE is ``losses_of_14e21aa.txt`` beside this one: the same
networks, and the ``loss`` of each stage for one `Rng`. Here the same random streams are handed over as a batch and its
draws.
"""

from __future__ import annotations

import pytest
import torch

from fewstep.data.batch import Batch
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.base import Progress
from fewstep.models.cond import Cond
from fewstep.models.detector import DetectorNetwork
from fewstep.models.encoders import load_encoder
from fewstep.models.rewards import About, RewardNetwork
from fewstep.scenes64 import architecture as scenes64
from fewstep.scenes64 import autoencoder
from fewstep.scenes64.autoencoder import CROWDED, Autoencoding, RenderedScenes, as_tensor
from fewstep.scenes64.denoise import CaptionedUNet, Denoise, encode_scenes, encoded_scenes, token_ids
from fewstep.scenes64.labels import Labels
from fewstep.scenes64.linear_code import fit_linear_code
from fewstep.scenes64.random import ScenesRng
from fewstep.scenes64.scenes import ATTRIBUTES, WORDS, Scenes
from fewstep.scenes64.train_detector import Detection, DetectorImages
from fewstep.scenes64.train_rewards import BradleyTerry, PairFeatures
from fewstep.training.settings import TrainingSettings

torch.set_num_threads(1)
SETTINGS = TrainingSettings(steps=10, batch_size=4)


def stirred(*networks):
    """Residual branches start at zero: let something through."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for network in networks:
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def loss_of(stage, batch, draws=None):
    """The loss that the trainer would go backward through."""
    trainer = stage.trainer(SETTINGS, 0)
    assert trainer.rng is ScenesRng  # training it again ends in the weights that are shipped
    roles = trainer.roles
    return stage.student(roles, batch, draws, stage.prepare(roles, batch, draws, {"student"}))


def check(loss, total, **terms):
    assert loss.total.item() == pytest.approx(total, abs=1e-6)
    for name, term in terms.items():
        assert (loss.parts | loss.stats)[name].item() == pytest.approx(term, abs=1e-6), name


def test_autoencoder():
    code = fit_linear_code(as_tensor(Scenes(3).render(range(64)).images), 16)
    torch.manual_seed(1)
    vae, rng = scenes64.build_vae((8, 8, 8, 8)), ScenesRng(0, 2, 4)
    stirred(vae)
    width = rng.sample.uniform("wobble", -0.4, 0.4).clamp_min(0)
    draws = autoencoder.Draws(rng.sample.normal("posterior", scenes64.LATENT_SHAPE), width)
    stage = Autoencoding(vae, RenderedScenes(Scenes(0, numbers=CROWDED)), code)
    loss = loss_of(stage, stage.source.batch(rng), draws)
    check(loss, 1.704410076, pixels=0.635314822, edges=0.303175479, code=1.832518101, kl=2.4969244)


def test_denoising():
    tokenizer = scenes64.build_tokenizer(WORDS)
    torch.manual_seed(0)
    pool = encode_scenes(scenes64.build_vae().eval(), tokenizer, seed=3, size=12, tellings=2)
    torch.manual_seed(1)
    unet = scenes64.build_unet((48, 32), text_width=32)
    network = CaptionedUNet(unet, scenes64.build_text_encoder(tokenizer, width=32, layers=1))
    stirred(unet, network.text_encoder, network.head)
    schedule, rng = Schedule.from_diffusers(scenes64.build_scheduler()), ScenesRng(0, 5, 4)
    stage = Denoise(network, encoded_scenes(pool), schedule, token_ids(tokenizer, [""]))
    picked = {name: t[rng.sample.integers("rows", 0, 12)] for name, t in pool.items()}
    mean, std = picked.pop("mean").float(), picked.pop("std").float()
    batch = Batch(torch.addcmul(mean, std, rng.sample.normal("posterior", mean.shape[1:])), Cond(picked))
    draws = stage.draw(batch, rng, Progress(5, 10))
    loss = loss_of(stage, batch, draws)
    check(loss, 36.474746704, weighted=35.134109497, mse=1.364949346, detection=26.812782288,
          detection_shape=1.89394784)  # fmt: skip


def test_detection():
    torch.manual_seed(1)
    levels = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)
    network = DetectorNetwork({name: len(values) for name, values in ATTRIBUTES.items()}, (8, 8, 8))
    stirred(network)
    source = DetectorImages(0, (levels, Labels.of([Scenes(2).scene(i) for i in range(6)])))
    loss = loss_of(Detection(network, source), source.batch(ScenesRng(0, 2, 8)))
    check(loss, 24.703996658, near=16.380563736, geometry=1.583667755, shape=1.91161716, colour=2.379852772,
          fill=1.633102179, size=0.815193892)  # fmt: skip


def test_preferences():
    torch.manual_seed(1)
    network = RewardNetwork(About("encoder", load_encoder().heads))
    mean, std = 0.5 + torch.rand(network.usual.shape)
    seen = PairFeatures(*((torch.randn(9, 43) - mean) / std for _ in range(2)))
    check(loss_of(BradleyTerry(network.taste, seen), seen.batch(ScenesRng(0, 3, 8))), 0.808692932, accuracy=0.25)
