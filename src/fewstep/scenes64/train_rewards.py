"""Training of the small reward model: which of two pictures is liked, after Bradley and Terry (1952).

P(chosen beats rejected) = 1 / (1 + exp(r(rejected) - r(chosen))), and r maximises the likelihood of the choices: the
loss of every reward model of people's preferences. The trunk is frozen, so what it sees in every picture is computed
once. What prompts make one expect is read off the chosen pictures beforehand, by ridge regression from words to what
is seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.data import files
from fewstep.data.images import CaptionedImage, pixels
from fewstep.data.preferences import Preference, Preferences, read_preferences
from fewstep.data.random import Rng, stream_key
from fewstep.models.detector import DetectorNetwork
from fewstep.models.encoders import EncoderNetwork
from fewstep.models.rewards import About, RewardNetwork, reward_file
from fewstep.scenes64.fit import Fit
from fewstep.scenes64.scenes.render import Bytes
from fewstep.scenes64.train_detector import as_unit, autoencoder, through_vae
from fewstep.training.logging import progress_bar
from fewstep.training.settings import TrainingSettings

FILE = "reward.safetensors"
HELD_OUT = 0.2
_BATCH = 128

SETTINGS = TrainingSettings(
    steps=1000, batch_size=256, learning_rate=3e-3, warmup_steps=50, lr_schedule="cosine", weight_decay=0.1,
    ema_decay=0.99, log_every=50,
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """How well a reward model agrees with choices that it was not trained on.

    Attributes:
        trained, held_out: pairs. ties: pairs that were left out.
        accuracy: how many of the held-out choices it would have made too.
        expected: the same in the mean over what the raters might have chosen; None where they state no probability.
        ceiling: the most that any judge can reach in the mean, likewise.
    """

    trained: int
    held_out: int
    ties: int
    accuracy: float
    expected: float | None
    ceiling: float | None

    def __str__(self) -> str:
        said = f"{100 * self.accuracy:.1f} % of {self.held_out} held-out choices are the model's too"
        if self.ceiling is None or self.expected is None:
            return f"{said}."
        mean = f"in the mean over the raters' noise {100 * self.expected:.1f} %, where nobody can reach more than"
        return f"{said}; {mean} {100 * self.ceiling:.1f} %."


@dataclass(frozen=True)
class Seen:
    """Pairs as a trunk sees them: [N, F] of both pictures."""

    chosen: Tensor
    rejected: Tensor

    def rows(self, rows: Tensor) -> Seen:
        return Seen(self.chosen[rows], self.rejected[rows])


class RewardStage:
    """What `Fit` trains: all of a `RewardNetwork` but its trunk."""

    name = "reward"

    def __init__(self, network: RewardNetwork, settings: TrainingSettings, seen: Seen) -> None:
        self.networks: dict[str, nn.Module] = {"taste": network.taste}
        self.network, self.settings, self.seen = network, settings, seen

    def loss(self, rng: Rng) -> dict[str, Tensor]:
        rows = rng.sample.integers("rows", 0, len(self.seen.chosen))
        margin = margins(self.network, self.seen.rows(rows))
        return {"loss": preference_loss(margin), "accuracy": (margin.detach() > 0).float().mean()}


def preference_loss(margin: Tensor) -> Tensor:
    """Minus the mean log likelihood of choices with margins r(chosen) - r(rejected), [B]."""
    return F.softplus(-margin).mean()


def margins(network: RewardNetwork, seen: Seen) -> Tensor:
    """r(chosen) - r(rejected), [N], before it is scaled."""
    return network.like(seen.chosen) - network.like(seen.rejected)


def train_reward(
    folder: Path,
    out: Path,
    trunk: EncoderNetwork | DetectorNetwork,
    seed: int = 0,
    settings: TrainingSettings = SETTINGS,
    show: bool = False,
) -> Result:
    """Learn the choices in ``folder``; a fifth of the pairs is held out. Writes ``out/reward.safetensors``.

    The same call continues an interrupted run.

    Args:
        trunk: what looks at the pictures, frozen. The detector's makes a model that measures and nothing else.
        seed: of weights, of the order, and of which pairs are held out.
        show: progress bars.

    Raises:
        ValueError: one sentence: what is wrong with the folder, or too few pairs.
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
    with progress_bar(len(choices), 0, "looking", show) as advance:
        seen = look(network, choices, advance)
    order = torch.randperm(len(choices), generator=torch.Generator().manual_seed(stream_key(seed, "held out")))
    mine, held = seen.rows(order[count:]), order[:count]
    with torch.no_grad():
        both = torch.cat([mine.chosen, mine.rejected])
        network.usual.copy_(torch.stack([both.mean(dim=0), both.std(dim=0) + 1e-3]))
    fit = Fit(RewardStage(network, settings, mine), out, seed)
    fit.run(show_progress=show)
    fit.use_average()
    with torch.no_grad():
        said = network.like(both)
        network.scale.copy_(torch.stack([said.mean(), said.std().clamp_min(1e-6)]))
    result = measure(network, preferences, held, seen.rows(held))
    files.replace_tensors(out / FILE, *reward_file(network))
    files.replace_text(out / "measured.json", json.dumps(asdict(result), indent=1) + "\n")
    return result


@torch.no_grad()
def look(network: RewardNetwork, choices: Sequence[Preference], advance: Callable[[int], None] | None = None) -> Seen:
    """What the network's trunk sees in both pictures of every pair."""
    sides: list[list[Tensor]] = [[], []]
    for start in range(0, len(choices), _BATCH):
        part = choices[start : start + _BATCH]
        for side, paths in zip(sides, ([c.chosen for c in part], [c.rejected for c in part]), strict=True):
            side.append(network.seen(torch.stack([_read(path) for path in paths]).float() / 255))
        if advance is not None:
            advance(start + len(part))
    return Seen(torch.cat(sides[0]), torch.cat(sides[1]))


def _read(path: Path) -> Tensor:
    """uint8 [3, 64, 64]."""
    try:
        return pixels(CaptionedImage(path.name, "", "", path.read_bytes), lambda height, width: (64, 64))
    except ValueError as error:
        raise ValueError(f"The picture {path} cannot be learnt from: {error}.") from None


@torch.no_grad()
def measure(network: RewardNetwork, preferences: Preferences, rows: Tensor, seen: Seen) -> Result:
    """A network on the held-out choices ``rows``."""
    right = (margins(network, seen) > 0).double()
    likely = [preferences.choices[i].probability for i in rows.tolist()]
    expected = ceiling = None
    if None not in likely:
        p = torch.tensor(likely, dtype=torch.float64)
        expected, ceiling = float(torch.where(right > 0, p, 1 - p).mean()), float(torch.maximum(p, 1 - p).mean())
    trained = len(preferences.choices) - len(rows)
    return Result(trained, len(rows), preferences.ties, float(right.mean()), expected, ceiling)


def through_teacher(name: str, seed: int) -> Callable[[Bytes, int], Bytes]:
    """What takes uint8 pictures [n, 64, 64, 3] through a teacher's autoencoder; its number keys the posterior's noise.

    Raises:
        ValueError: there is no such teacher.
    """
    vae = autoencoder(name)

    def decode(images: Bytes, number: int) -> Bytes:
        noise = Rng(seed, number, len(images)).sample.normal("posterior", (16, 8, 8))
        passed = through_vae(vae, as_unit(images), noise)
        seen: Bytes = (passed * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return seen

    return decode


def with_steps(steps: int | None) -> TrainingSettings:
    """The settings, perhaps for another number of steps."""
    return SETTINGS if steps is None else replace(SETTINGS, steps=steps)
