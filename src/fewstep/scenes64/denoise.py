"""Stage two of the training of scenes-64: UNet and text encoder learn together to predict the noise in latents.

    x_t = alpha_t x0 + sigma_t eps          t stratified over the table, captions dropped at times
    loss = w(t) |eps_student(x_t, t, tokens) - eps|^2 + share * detection loss       w(t) = min(SNR + 1, w_max) / SNR

The second term trains a detection head on features inside the UNet, and fades out. The head is not exported.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.data.sources import LatentSource, Source
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.base import Loss, Progress
from fewstep.models.cond import Cond
from fewstep.models.families.network import needed, watched
from fewstep.models.roles import Roles
from fewstep.scenes64.autoencoder import as_tensor
from fewstep.scenes64.labels import CELL_CHANNELS, Labels, detection_loss
from fewstep.scenes64.scenes import Scenes
from fewstep.scenes64.scenes.content import FILLS
from fewstep.scenes64.stage import Stage

STATED = (0.5, 0.9)
"""Share of attributes that captions state, alternating: fuller ones teach the words sooner, and all are true."""
_BATCH = 64


@dataclass(frozen=True)
class Lesson:
    """An exercise before the whole task: scenes of one thing, and more of the times at which its subject is decided.

    What concerns few images, at few times, a small network learns so late that it seems never to: in 670,000 scenes it
    told no left from right. On such scenes alone it learns that in minutes, and keeps it.

    Attributes:
        fills: how often each kind of fill comes.
        times: (from, to), shares of the table, and the share of an image's times that are drawn there alone.
        stated: as `STATED`.
    """

    fills: Mapping[str, float]
    times: tuple[float, float, float]
    stated: tuple[float, float]

    def scenes(self, seed: int) -> Scenes:
        """The scenes of set ``seed``."""
        return Scenes(seed, numbers=(1, 0, 0, 0), fills=self.fills)


LESSONS: dict[str, Lesson] = {
    "places": Lesson(FILLS, (0.9, 1.0, 1.0), (0.9, 0.9)),
    "patterns": Lesson(
        {"plain": 0.2, "striped": 0.25, "checked": 0.25, "dotted": 0.25, "grainy": 0.05}, (0.35, 0.85, 0.5), STATED
    ),
}
"""Places first, for a network with random weights; then patterns."""


class CaptionedUNet(nn.Module):
    """UNet and text encoder as one network under the condition ``tokens``, int [B, length].

    Attributes:
        head: detects things from the features of the UNet's first up block.
        cells: the head's predictions at the latest call, as of `fewstep.models.detector.DetectorNetwork`.
    """

    def __init__(self, unet: Any, text_encoder: Any) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        width = unet.config.block_out_channels[-1]
        self.head = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, sum(CELL_CHANNELS.values()), 1))
        self.head.to(unet.device)
        self.cells: dict[str, Tensor] = {}

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        embeds = self.text_encoder(needed(cond)["tokens"])[0]
        found: dict[str, Tensor] = {}
        with watched({"up": self.unet.up_blocks[0]}, found, None):
            predicted: Tensor = self.unet(x, t, encoder_hidden_states=embeds).sample
        cells = self.head(found["up"]).permute(0, 2, 3, 1).split(list(CELL_CHANNELS.values()), dim=-1)
        self.cells = dict(zip(CELL_CHANNELS, cells, strict=True))
        self.cells["near"] = self.cells["near"].squeeze(-1)
        return predicted


@dataclass
class Draws:
    """Random numbers of one step.

    Attributes:
        noise: [B, C, h, w] unit normal.
        times: int64 [B], native times.
        telling: int64 [B], which of an image's captions.
        dropped: bool [B], whether the caption is replaced by the empty one.
        share: weight of the detection loss at this step.
    """

    noise: Tensor
    times: Tensor
    telling: Tensor
    dropped: Tensor
    share: float


class Denoise(Stage):
    """Trains a `CaptionedUNet` on `encoded_scenes`.

    Args:
        empty: tokens of the empty caption, [1, length].
        times_of_lesson: as `Lesson.times`; none without a lesson.
    """

    name = "unet"
    caption_dropout = 0.1  # probability of the empty caption, for classifier-free guidance
    # At high noise w is that of a v-prediction, so that composition and text count; at low noise it is bounded.
    max_weight = 10.0
    # Weight at the first step. This task makes the UNet use the text long before the denoising loss alone would.
    detection = 0.1

    def __init__(
        self,
        network: CaptionedUNet,
        source: Source,
        schedule: Schedule,
        empty: Tensor,
        times_of_lesson: tuple[float, float, float] = (0.0, 1.0, 0.0),
    ) -> None:
        super().__init__(network, source, schedule)
        self.empty, self.times_of_lesson = empty, times_of_lesson

    def draw(self, batch: Batch, rng: Rng, progress: Progress) -> Draws:
        assert batch.cond is not None
        return Draws(
            noise=rng.sample.normal("noise", batch.x0.shape[1:]),
            times=self.times(rng),
            telling=rng.sample.integers("telling", 0, batch.cond["tokens"].shape[1]),
            dropped=rng.sample.uniform("dropout") < self.caption_dropout,
            share=self.detection * (1 - progress.step / progress.total),
        )

    def times(self, rng: Rng) -> Tensor:
        """One time from each of B equal parts of 0 ... T - 1, shuffled: less variance than independent times."""
        shuffle = torch.Generator().manual_seed(rng.shared.integer("parts", 0, 2**31))
        parts = torch.randperm(rng.batch_size, generator=shuffle).to(torch.float64)[rng.rows]
        shares = (parts + rng.sample.uniform("times")) / rng.batch_size
        low, high, often = self.times_of_lesson
        if often:
            drawn = rng.sample.uniform("of the lesson") < often
            shares = torch.where(drawn, low + (high - low) * rng.sample.uniform("times of the lesson"), shares)
        total = self.schedule.num_train_timesteps
        return (shares * total).long().clamp_max(total - 1)

    def weights(self, times: Tensor) -> Tensor:
        """Weights of epsilon's squared error at ``times`` [B]; it is SNR times that of x0."""
        snr = (self.schedule.alpha(times) / self.schedule.sigma(times)).square()
        return (snr + 1).clamp_max(self.max_weight) / snr

    def prepare(self, roles: Roles, batch: Batch, draws: Draws, due: Collection[str]) -> Cond:
        """The tokens of the batch's captions, with some replaced by the empty caption."""
        assert batch.cond is not None
        tokens = batch.cond["tokens"].long()
        rows = torch.arange(len(tokens), device=tokens.device)
        picked = tokens[rows, draws.telling.to(tokens.device)]
        return Cond({"tokens": picked}, null={"tokens": self.empty}).drop(draws.dropped)

    def student(self, roles: Roles, batch: Batch, draws: Draws, shared: Cond) -> Loss:
        x_t = self.schedule.add_noise(batch.x0, draws.noise, draws.times)
        pred = roles.student(x_t, draws.times, shared)
        errors = (pred.epsilon - draws.noise).square().mean(dim=(1, 2, 3))
        weighted = (errors * self.weights(draws.times).to(errors)).mean()
        network = self.trained(roles)
        cells, network.cells = network.cells, {}  # the network must not keep the graph beyond this step
        detection = detection_loss(cells, Labels.from_cond(batch.cond))
        parts = {"weighted": weighted, "detection": detection["loss"]}
        stats = {"mse": errors.mean().detach(), "detection_shape": detection["shape"].detach()}
        return Loss(weighted + draws.share * detection["loss"], {n: t.detach() for n, t in parts.items()}, stats)


# ---------------------------------------------------------------- data


@torch.no_grad()
def encode_scenes(
    vae: Any, tokenizer: Any, seed: int, size: int, tellings: int, device: str = "cpu", lesson: Lesson | None = None
) -> dict[str, Tensor]:
    """Render and encode scenes 0 ... size - 1 of set ``seed`` (of a ``lesson``), with several captions of each.

    Returns:
        ``mean`` and ``std``, float16 [N, C, h, w] of the scaled latents' posterior; ``tokens``, int16 [N, tellings,
        length]; and the fields of `Labels`.
    """
    scenes, stated = (lesson.scenes(seed), lesson.stated) if lesson else (Scenes(seed), STATED)
    factor = float(vae.config.scaling_factor)
    means, stds, tokens, labels = [], [], [], []
    for first in range(0, size, _BATCH):
        indices = range(first, min(first + _BATCH, size))
        rendered = scenes.render(indices)
        labels.append(Labels.of(rendered.scenes))
        posterior = vae.encode(as_tensor(rendered.images).to(device)).latent_dist
        means.append((posterior.mean * factor).to("cpu", torch.float16).contiguous())
        stds.append((posterior.std * factor).to("cpu", torch.float16).contiguous())
        captions = [
            scenes.scene(i, telling, stated[telling % 2]).caption for i in indices for telling in range(tellings)
        ]
        tokens.append(token_ids(tokenizer, captions).to(torch.int16).unflatten(0, (len(indices), tellings)))
    encoded = {"mean": torch.cat(means), "std": torch.cat(stds), "tokens": torch.cat(tokens)}
    return encoded | Labels.cat(labels)._asdict()


def encoded_scenes(tensors: Mapping[str, Tensor]) -> LatentSource:
    """Batches of what `encode_scenes` returned: latents, with tokens and labels as their condition."""
    cond = Cond({name: t for name, t in tensors.items() if name not in ("mean", "std")})
    return LatentSource(tensors["mean"], tensors["std"], cond)


def token_ids(tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """int64 [n, length], padded to the model's length."""
    length = tokenizer.model_max_length
    encoded = tokenizer(list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids: Tensor = encoded.input_ids
    return ids
