"""A model that fewstep has never seen: a flow network, its pipeline as diffusers would have it, and its family.

The first two stand for a release of diffusers, the family for the one file that fewstep would need.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from fewstep.models.families import Family
from fewstep.models.families.network import needed
from tests.models.pipelines import vae

WIDTH = 16


class NovelNetwork(ModelMixin, ConfigMixin):
    """Flow of latents [B, 4, h, w] at times from 0 to 1, with a prompt [B, WIDTH]."""

    @register_to_config
    def __init__(self, in_channels: int = 4, sample_size: int = 16, patch_size: int = 1) -> None:
        super().__init__()
        self.inlet, self.outlet = nn.Linear(in_channels, WIDTH), nn.Linear(WIDTH, in_channels)
        self.clock, self.middle = nn.Linear(1, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, t, prompt):
        h = self.inlet(x.movedim(1, -1)) + (self.clock(t[:, None]) + prompt)[:, None, None]
        return self.outlet(self.middle(h.tanh()).tanh()).movedim(-1, 1)


def embedded(prompts):
    """A vector [B, WIDTH] for each prompt."""
    return torch.stack([torch.sin(torch.arange(1.0, WIDTH + 1) * len(prompt)) for prompt in prompts])


class NovelPipeline(DiffusionPipeline):
    """Euler steps over the levels that its scheduler lays."""

    def __init__(self, backbone, vae, scheduler):
        super().__init__()
        self.register_modules(backbone=backbone, vae=vae, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, prompt, num_inference_steps=50, height=64, width=64, generator=None, output_type="pil", strength=1.0
    ):
        x = torch.randn(len(prompt), 4, height // 4, width // 4, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            flow = self.backbone(x, (t / 1000).expand(len(x)), strength * embedded(prompt))
            x = self.scheduler.step(flow, t, x).prev_sample
        assert output_type == "latent"
        return type("Output", (), {"images": x})


for _cls in (NovelNetwork, NovelPipeline):
    _cls.__module__ = "diffusers"


def build():
    """The whole pipeline, random."""
    torch.manual_seed(3)
    made = NovelPipeline(NovelNetwork(), vae(4), FlowMatchEulerDiscreteScheduler(shift=2.0))
    made.set_progress_bar_config(disable=True)
    return made


# ---------------------------------------------------------------- what fewstep needs: one file


class Network(nn.Module):
    """`NovelNetwork` in the contract of `fewstep.models.denoiser`."""

    lora_targets = ("inlet", "middle", "outlet")

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.dtype

    def forward(self, x, t, cond):
        return self.backbone(x, t, needed(cond)["prompt_embeds"][:, 0].to(x.dtype))


class Novel(Family):
    """The family of `NovelPipeline`."""

    title = "Novel"
    names = ("novel",)
    part = "backbone"
    network_class = "NovelNetwork"
    text_encoders = ()
    licences: ClassVar[dict[str, str]] = {"me/novel": "mit"}

    @property
    def architecture(self) -> str:
        return "novel-1"

    def network(self) -> nn.Module:
        return Network(self.base)

    def guidance_arguments(self, scale: float, embedded: float | None) -> dict[str, float]:
        return {"strength": scale}

    def encode(self, prompts: Any) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": embedded(prompts)[:, None]}

    def shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (1, WIDTH)}
