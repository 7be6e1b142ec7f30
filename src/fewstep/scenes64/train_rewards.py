"""Training of the small reward model: which of two images is preferred, after Bradley and Terry (1952).

P(chosen beats rejected) = 1 / (1 + exp(r(rejected) - r(chosen))), and r maximises the likelihood of the choices: the
loss of every reward model of human preferences. The trunk is frozen, so its features of every image are computed once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.data import files
from fewstep.data.batch import Batch
from fewstep.data.images import CaptionedImage, pixels
from fewstep.data.preferences import Preference, Preferences, read_preferences
from fewstep.data.random import Rng, stream_key
from fewstep.methods.base import Loss
from fewstep.models.cond import Cond
from fewstep.models.detector import DetectorNetwork
from fewstep.models.encoders import EncoderNetwork
from fewstep.models.rewards import About, RewardNetwork, reward_file
from fewstep.models.roles import Roles
from fewstep.scenes64.architecture import LATENT_SHAPE
from fewstep.scenes64.random import ScenesRng
from fewstep.scenes64.scenes.render import Bytes
from fewstep.scenes64.stage import Stage
from fewstep.scenes64.train_detector import as_unit, autoencoder, through_vae
from fewstep.training.progress import progress_bar
from fewstep.training.settings import TrainingSettings

FILE = "reward.safetensors"
HELD_OUT = 0.2
"""Share of the pairs that the model is measured on and not trained on."""
_BATCH = 128

SETTINGS = TrainingSettings(
    steps=1000, batch_size=256, learning_rate=3e-3, warmup_steps=50, lr_schedule="cosine", weight_decay=0.1,
    ema_decay=0.99, log_every=50,
)  # fmt: skip


@dataclass(frozen=True)
class Agreement:
    """How often a reward model agrees with choices that it was not trained on.

    Attributes:
        trained, held_out: number of pairs. ties: number of pairs that were left out.
        accuracy: share of the held-out choices that the model makes too.
        expected: the same in the mean over the raters' noise; None where the raters state no probability.
        ceiling: the highest possible ``expected``, likewise.
    """

    trained: int
    held_out: int
    ties: int
    accuracy: float
    expected: float | None
    ceiling: float | None

    def __str__(self) -> str:
        measured = f"{100 * self.accuracy:.1f} % of {self.held_out} held-out choices are the model's too"
        if self.ceiling is None or self.expected is None:
            return f"{measured}."
        mean = f"in the mean over the raters' noise {100 * self.expected:.1f} %, where nobody can reach more than"
        return f"{measured}; {mean} {100 * self.ceiling:.1f} %."


@dataclass(frozen=True)
class PairFeatures:
    """A trunk's features of pairs of images, [N, F] each; as a source it gives random pairs.

    A batch's ``x0`` are the features of the chosen images; those of the rejected ones are its condition.
    """

    chosen: Tensor
    rejected: Tensor

    def rows(self, rows: Tensor) -> PairFeatures:
        return PairFeatures(self.chosen[rows], self.rejected[rows])

    def batch(self, rng: Rng) -> Batch:
        picked = self.rows(rng.sample.integers("rows", 0, len(self.chosen)))
        return Batch(picked.chosen, Cond({"rejected": picked.rejected}))


class BradleyTerry(Stage):
    """Trains a function of standardised features, [B, F] -> [B, 1], on `PairFeatures`."""

    name = "reward"

    def student(self, roles: Roles, batch: Batch, draws: None, shared: None) -> Loss:
        assert batch.cond is not None
        taste = self.trained(roles)
        margin = (taste(batch.x0) - taste(batch.cond["rejected"])).squeeze(1)
        return Loss(preference_loss(margin), stats={"accuracy": (margin.detach() > 0).float().mean()})


def preference_loss(margin: Tensor) -> Tensor:
    """Minus the mean log likelihood of choices with margins r(chosen) - r(rejected), [B]."""
    return F.softplus(-margin).mean()


def margins(network: RewardNetwork, seen: PairFeatures) -> Tensor:
    """r(chosen) - r(rejected), [N], before it is scaled."""
    return network.like(seen.chosen) - network.like(seen.rejected)


def train_reward(
    folder: Path,
    out: Path,
    trunk: EncoderNetwork | DetectorNetwork,
    seed: int = 0,
    settings: TrainingSettings = SETTINGS,
    show: bool = False,
) -> Agreement:
    """Learn the choices in ``folder``; a fifth of the pairs is held out. Writes ``out/reward.safetensors``.

    The same call continues an interrupted run.

    Args:
        trunk: frozen network whose features the reward model reads. With the detector's the model may only measure.
        seed: of weights, of the order, and of which pairs are held out.
        show: show progress bars.

    Raises:
        ValueError: something is wrong with the folder, or it holds too few pairs.
    """
    preferences = read_preferences(folder)
    choices = preferences.choices
    count = int(HELD_OUT * len(choices))
    if count < 1 or len(choices) - count < 2:
        raise ValueError(f"{folder} holds {len(choices)} choices, too few to learn from: give 10 or more.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_key(seed, "reward"))
        network = RewardNetwork(About("detector" if isinstance(trunk, DetectorNetwork) else "encoder", trunk.heads))
    network.trunk.load_state_dict(trunk.state_dict())
    network.trunk.eval().requires_grad_(False)
    with progress_bar(len(choices), 0, "features", show) as advance:
        seen = pair_features(network, choices, advance)
    order = torch.randperm(len(choices), generator=torch.Generator().manual_seed(stream_key(seed, "held out")))
    mine, held = seen.rows(order[count:]), order[:count]
    both = torch.cat([mine.chosen, mine.rejected])
    with torch.no_grad():
        network.usual.copy_(torch.stack([both.mean(dim=0), both.std(dim=0) + 1e-3]))
        mean, std = network.usual
        standard = PairFeatures((mine.chosen - mean) / std, (mine.rejected - mean) / std)
    network.taste = BradleyTerry(network.taste, standard).train(settings, out, seed, show=show)
    with torch.no_grad():
        rewards = network.like(both)
        network.scale.copy_(torch.stack([rewards.mean(), rewards.std().clamp_min(1e-6)]))
    result = measure(network, preferences, held, seen.rows(held))
    files.replace_tensors(out / FILE, *reward_file(network))
    files.replace_text(out / "measured.json", json.dumps(asdict(result), indent=1) + "\n")
    return result


@torch.no_grad()
def pair_features(
    network: RewardNetwork, choices: Sequence[Preference], advance: Callable[[int], None] | None = None
) -> PairFeatures:
    """Features of both images of every pair, by the network's trunk."""
    sides: list[list[Tensor]] = [[], []]
    for start in range(0, len(choices), _BATCH):
        part = choices[start : start + _BATCH]
        for side, paths in zip(sides, ([c.chosen for c in part], [c.rejected for c in part]), strict=True):
            side.append(network.seen(torch.stack([_read(path) for path in paths]).float() / 255))
        if advance is not None:
            advance(start + len(part))
    return PairFeatures(torch.cat(sides[0]), torch.cat(sides[1]))


def _read(path: Path) -> Tensor:
    """uint8 [3, 64, 64]."""
    try:
        return pixels(CaptionedImage(path.name, "", "", path.read_bytes), lambda height, width: (64, 64))
    except ValueError as error:
        raise ValueError(f"The image {path} cannot be learnt from: {error}.") from None


@torch.no_grad()
def measure(network: RewardNetwork, preferences: Preferences, rows: Tensor, seen: PairFeatures) -> Agreement:
    """The agreement of a network with the held-out choices ``rows``, whose features are ``seen``."""
    right = (margins(network, seen) > 0).double()
    likely = [preferences.choices[i].probability for i in rows.tolist()]
    expected = ceiling = None
    if None not in likely:
        p = torch.tensor(likely, dtype=torch.float64)
        expected, ceiling = float(torch.where(right > 0, p, 1 - p).mean()), float(torch.maximum(p, 1 - p).mean())
    trained = len(preferences.choices) - len(rows)
    return Agreement(trained, len(rows), preferences.ties, float(right.mean()), expected, ceiling)


def through_teacher(name: str, seed: int) -> Callable[[Bytes, int], Bytes]:
    """A function that passes uint8 images [n, 64, 64, 3] through a teacher's autoencoder.

    Its second argument is a number that keys the posterior's noise.

    Raises:
        ValueError: there is no such teacher.
    """
    vae = autoencoder(name)

    def decode(images: Bytes, number: int) -> Bytes:
        noise = ScenesRng(seed, number, len(images)).sample.normal("posterior", LATENT_SHAPE)
        passed = through_vae(vae, as_unit(images), noise)
        decoded: Bytes = (passed * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return decoded

    return decode
