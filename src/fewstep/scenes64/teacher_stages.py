"""The two stages of scenes-64's training: first the autoencoder, then UNet and text encoder on its latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.data.random import Rng
from fewstep.diffusion.schedule import Schedule
from fewstep.scenes64.labels import ANSWERS, Labels, reading_loss
from fewstep.scenes64.linear_code import LinearCode
from fewstep.scenes64.scenes import Scenes
from fewstep.training.settings import TrainingSettings

CROWDED = (0.1, 0.2, 0.3, 0.4)
"""How often 1, 2, 3, 4 things stand in the autoencoder's pictures: things are what is hard to draw."""


STATED = (0.5, 0.9)
"""How much captions of stage two state, by turns: full ones teach the words sooner, and all captions stay true."""


class AutoencoderStage:
    """Trains a VAE on rendered scenes: the encoder to give a linear code, the decoder to draw from it.

    Args:
        code: what the posterior's mean must be (`fewstep.scenes64.linear_code`).
        edges: weight of the differences' error, which keeps edges and patterns crisp.
        kl: of the posterior's width, per latent element; the means are those of the code.
        wobble: the most noise on latents before they are decoded, beside the posterior's own; half of the pictures get
            none. The decoder must forgive a generator's errors.
    """

    name = "vae"

    def __init__(
        self,
        vae: Any,
        code: LinearCode,
        settings: TrainingSettings,
        seed: int,
        edges: float = 0.5,
        kl: float = 5e-4,
        wobble: float = 0.4,
    ) -> None:
        self.networks: dict[str, nn.Module] = {"vae": vae}
        self.vae, self.code, self.settings = vae, code, settings
        self.edges, self.kl, self.wobble = edges, kl, wobble
        self.scenes = Scenes(seed, numbers=CROWDED)

    def loss(self, rng: Rng) -> dict[str, Tensor]:
        first = rng.step * rng.batch_size
        indices = range(first, first + rng.batch_size)[rng.rows]
        images = as_tensor(self.scenes.render(indices).images).to(rng.device)
        latents = self.code.encode(images)
        posterior = self.vae.encode(images).latent_dist
        wobble = rng.sample.uniform("wobble", -self.wobble, self.wobble).clamp_min(0).to(latents)[:, None, None, None]
        spread = (posterior.var + wobble.square()).sqrt()
        decoded = self.vae.decode(latents + spread * rng.sample.normal("posterior", latents.shape[1:])).sample
        pixels = (decoded - images).abs().mean()
        edges = edge_error(decoded, images)
        code = (posterior.mean - latents).square().mean()
        kl = 0.5 * (posterior.var - 1 - posterior.logvar).mean()
        total = pixels + self.edges * edges + 0.5 * code + self.kl * kl
        return {"loss": total, "pixels": pixels, "edges": edges, "code": code, "kl": kl}


def edge_error(a: Tensor, b: Tensor, scales: int = 3) -> Tensor:
    """Mean absolute error of horizontal, vertical and diagonal differences at full, half, quarter ... size."""
    total = a.new_zeros(())
    difference = a - b
    for scale in range(scales):
        if scale:
            difference = F.avg_pool2d(difference, 2)
        total = total + difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
        total = total + (difference[..., 1:, 1:] - difference[..., :-1, :-1]).abs().mean()
    return total / (3 * scales)


def as_tensor(images: np.ndarray) -> Tensor:
    """uint8 [n, h, w, 3] -> float32 [n, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32).contiguous() / 127.5 - 1


@dataclass
class LatentPool:
    """Encoded scenes, kept in memory.

    Attributes:
        mean, std: float16 [N, C, h, w] of the scaled latents' posterior.
        tokens: int16 [N, tellings, length], several captions of each picture.
        labels: what is drawn.
    """

    mean: Tensor
    std: Tensor
    tokens: Tensor
    labels: Labels

    def tensors(self) -> dict[str, Tensor]:
        """As a file keeps it."""
        return {"mean": self.mean, "std": self.std, "tokens": self.tokens, **self.labels._asdict()}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> LatentPool:
        """From what `tensors` gave."""
        labels = Labels(**{name: tensors[name] for name in Labels._fields})
        return cls(tensors["mean"], tensors["std"], tensors["tokens"], labels)


@torch.no_grad()
def encode_pool(vae: Any, tokenizer: Any, seed: int, size: int, tellings: int, device: str = "cpu") -> LatentPool:
    """Render and encode scenes 0 ... size - 1 of set ``seed``."""
    scenes = Scenes(seed)
    factor = float(vae.config.scaling_factor)
    means, stds, tokens, labels = [], [], [], []
    for first in range(0, size, 64):
        indices = range(first, min(first + 64, size))
        rendered = scenes.render(indices)
        labels.append(Labels.of(rendered.scenes))
        posterior = vae.encode(as_tensor(rendered.images).to(device)).latent_dist
        means.append((posterior.mean * factor).to("cpu", torch.float16).contiguous())
        stds.append((posterior.std * factor).to("cpu", torch.float16).contiguous())
        captions = [
            scenes.scene(i, telling, STATED[telling % 2]).caption for i in indices for telling in range(tellings)
        ]
        tokens.append(token_ids(tokenizer, captions).to(torch.int16).unflatten(0, (len(indices), tellings)))
    return LatentPool(torch.cat(means), torch.cat(stds), torch.cat(tokens), Labels.cat(labels))


def token_ids(tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """int64 [n, length], padded to the model's length."""
    length = tokenizer.model_max_length
    encoded = tokenizer(list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids: Tensor = encoded.input_ids
    return ids


@torch.no_grad()
def latent_std(vae: Any, seed: int, size: int = 1024, device: str = "cpu") -> float:
    """Standard deviation of unscaled latents over ``size`` scenes; its inverse is the scaling factor."""
    scenes = Scenes(seed)
    count, total, squares = 0, 0.0, 0.0
    for first in range(0, size, 64):
        images = as_tensor(scenes.render(range(first, min(first + 64, size))).images).to(device)
        latents = vae.encode(images).latent_dist.mean.double()
        count += latents.numel()
        total += float(latents.sum())
        squares += float(latents.square().sum())
    return math.sqrt(squares / count - (total / count) ** 2)


class TextToImageStage:
    """Trains UNet and text encoder together to predict the noise in latents.

    Args:
        caption_dropout: how often a caption is replaced by the empty one, for classifier-free guidance.
        max_weight: the squared error of x0 is weighted min(SNR + 1, max_weight): as a v-prediction's where noise is
            high, so that composition and text count, and no more than that where noise is low.
        telling: weight of a second task, from the features inside the UNet to say what is drawn where, falling to 0 at
            the end. It has the text read and shapes told apart long before the noise's error alone would; its layer is
            left behind.
    """

    name = "unet"

    def __init__(
        self,
        unet: Any,
        text_encoder: Any,
        pool: LatentPool,
        empty: Tensor,
        schedule: Schedule,
        settings: TrainingSettings,
        caption_dropout: float = 0.1,
        max_weight: float = 10.0,
        telling: float = 0.1,
    ) -> None:
        self.teller = Teller(unet.config.block_out_channels[-1], unet.up_blocks[0]).to(unet.device)
        self.networks: dict[str, nn.Module] = {"unet": unet, "text_encoder": text_encoder, "teller": self.teller}
        self.unet, self.text_encoder = unet, text_encoder
        self.pool, self.empty, self.schedule, self.settings = pool, empty, schedule, settings
        self.caption_dropout, self.max_weight, self.telling = caption_dropout, max_weight, telling

    def loss(self, rng: Rng) -> dict[str, Tensor]:
        rows = rng.sample.integers("rows", 0, len(self.pool.mean))
        x0, tokens = self._draw(rng, rows)
        times = self._times(rng)
        noise = rng.sample.normal("noise", x0.shape[1:])
        noisy = self.schedule.add_noise(x0, noise, times)
        embeds = self.text_encoder(tokens)[0]
        predicted = self.unet(noisy, times.to(x0.device), encoder_hidden_states=embeds).sample
        errors = (predicted - noise).square().mean(dim=(1, 2, 3))
        weighted = (errors * self._weights(times).to(errors)).mean()
        told = reading_loss(self.teller(), Labels(*(t.to(x0.device) for t in self.pool.labels.rows(rows))))
        shape = {"telling": told["loss"], "telling_shape": told["shape"]}
        share = self.telling * (1 - rng.step / self.settings.steps)
        return {"loss": weighted + share * told["loss"], "weighted": weighted, "mse": errors.mean(), **shape}

    def _draw(self, rng: Rng, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Latents sampled from their posterior, and tokens, some of them the empty caption's."""
        pool = self.pool
        telling = rng.sample.integers("telling", 0, pool.tokens.shape[1])
        dropped = rng.sample.uniform("dropout") < self.caption_dropout
        tokens = torch.where(dropped[:, None], self.empty, pool.tokens[rows, telling].long()).to(rng.device)
        mean, std = (t[rows].to(rng.device, torch.float32) for t in (pool.mean, pool.std))
        return torch.addcmul(mean, std, rng.sample.normal("posterior", mean.shape[1:])), tokens

    def _times(self, rng: Rng) -> Tensor:
        """One time from each of B equal parts of 0 ... T-1, shuffled: fewer surprises than independent ones give."""
        shuffle = torch.Generator().manual_seed(rng.shared.integer("parts", 0, 2**31))
        parts = torch.randperm(rng.batch_size, generator=shuffle).to(torch.float64)[rng.rows]
        total = self.schedule.num_train_timesteps
        return ((parts + rng.sample.uniform("times")) / rng.batch_size * total).long().clamp_max(total - 1)

    def _weights(self, times: Tensor) -> Tensor:
        """Of epsilon's squared error, which is SNR times that of x0."""
        snr = (self.schedule.alpha(times) / self.schedule.sigma(times)).square()
        return (snr + 1).clamp_max(self.max_weight) / snr


class Teller(nn.Module):
    """Says what is drawn where, from the features that ``block`` gave at its latest call."""

    def __init__(self, channels: int, block: nn.Module) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.answers = nn.Conv2d(channels, sum(ANSWERS.values()), 1)
        self.features: Tensor | None = None
        block.register_forward_hook(lambda module, given, features: setattr(self, "features", features))

    def forward(self) -> dict[str, Tensor]:
        """`ANSWERS` of every cell of the features' grid."""
        features, self.features = self.features, None
        cells = self.answers(F.silu(self.norm(features))).permute(0, 2, 3, 1).split(list(ANSWERS.values()), dim=-1)
        told = dict(zip(ANSWERS, cells, strict=True))
        return {**told, "near": told["near"].squeeze(-1)}
