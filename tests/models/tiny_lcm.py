"""Four steps of LCM on a tiny pipeline, for tests that change how its network computes."""

import copy

import torch

from fewstep.models.roles import Weights
from fewstep.training.settings import TrainingSettings


def tiny_teacher(name):
    """(a tiny pipeline's teacher, four latents with their captions)"""
    from fewstep.data.sources import LatentSource
    from fewstep.models.families import as_teacher
    from tests.models import pipelines, pipelines_flow

    torch.manual_seed(0)
    teacher = as_teacher((getattr(pipelines, name, None) or getattr(pipelines_flow, name))(), size=64)
    mean = torch.randn(4, *teacher.latent_shape, generator=torch.Generator().manual_seed(1))
    return teacher, LatentSource(mean, torch.zeros_like(mean), teacher.encode_prompts(["a red circle"] * 4))


def four_steps(teacher, source, checkpointing, network=lambda network: None, roles=lambda roles: None):
    """(losses, the student's weights, the roles); ``network`` and ``roles`` change what they are given."""
    from fewstep.methods.lcm import LCM
    from fewstep.training.trainer import Trainer, build_roles

    denoiser = copy.copy(teacher.denoiser)
    denoiser.network = copy.deepcopy(teacher.denoiser.network)
    network(denoiser.network)
    method = LCM(denoiser.schedule)
    settings = TrainingSettings(
        steps=4, batch_size=2, learning_rate=1e-3, ema_decay=0.9, gradient_checkpointing=checkpointing
    )
    made = build_roles(denoiser, method, settings, Weights("lora", 2))
    roles(made)
    trainer, losses = Trainer(method, made, source, settings), []
    for step in range(settings.steps):
        trainer.step(step)
        losses.append(trainer.meter.read()["student/loss"])
    return losses, [t.detach() for t in made.tensors().values()], made
