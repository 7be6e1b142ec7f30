"""The bench that methods are verified on: an exact teacher, endless data, a small student, fixed starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.data.pairs import PairSource, WithPairs, noise_of
from fewstep.data.random import Rng, stream_key
from fewstep.data.sources import MixtureSource, Source
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.base import Method, Progress
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.helpers import Helpers, PointEncoder, PointReward, one_hot_labels
from fewstep.models.mlp import MLP
from fewstep.models.roles import Roles
from fewstep.sampling import HeunSampler, sample
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import Trainer, follow

STARTS = 4096


@dataclass(frozen=True)
class Bench:
    """A closed-form teacher and what is needed to distil it.

    Attributes:
        mixture: the data, in closed form; its classes, if any, are the condition.
        schedule: the forward process.
        seed: of data, student and starts.
        guidance_scale: of the teacher (1.0 is off); other values need classes.
        prediction_type: what students predict, where their method does not say.
    """

    mixture: GaussianMixture
    schedule: Schedule
    seed: int = 0
    guidance_scale: float = 1.0
    prediction_type: str = "sample"

    def __post_init__(self) -> None:
        if self.guidance_scale != 1.0 and not self.mixture.num_classes:
            raise ValueError("Guidance needs a mixture with class_weights: add them, or set guidance_scale to 1.")

    @cached_property
    def teacher(self) -> Denoiser:
        """The exact teacher; it predicts clean data."""
        return Denoiser(self.mixture.network(self.schedule, "sample"), self.schedule, "sample")

    @cached_property
    def source(self) -> MixtureSource:
        """Samples of the mixture, class after class at random."""
        return MixtureSource(self.mixture, range(self.mixture.num_classes) if self.mixture.num_classes else None)

    @cached_property
    def pairs(self) -> PairSource:
        """Pairs (unit noise, the exact teacher's sample after 50 steps of Heun's solver), with the bench's guidance."""
        noise = torch.stack([noise_of(self.seed, i, (self.mixture.dim,)) for i in range(STARTS)]).double()
        cond = self.starts[1]
        x0 = sample(self.teacher.uncounted(), HeunSampler(num_inference_steps=50), noise, cond, self.guidance_scale).x0
        return PairSource(x0, cond, self.seed)

    def source_of(self, method: Method) -> Source:
        """Batches of what ``method`` consumes."""
        return WithPairs(self.source, self.pairs) if "pairs" in method.streams else self.source

    def draw(
        self,
        method: Method,
        size: int,
        step: int = 0,
        progress: Progress = Progress(0, 1),
    ) -> tuple[Batch, Any]:
        """A batch of ``size`` for ``method`` in float64, and the method's random numbers at ``step``."""
        rng = Rng(self.seed, step, size, dtype=torch.float64)
        batch = self.source_of(method).batch(rng)
        return batch, method.draw(batch, rng, progress)

    @cached_property
    def starts(self) -> tuple[Tensor, Cond | None]:
        """Start states x_T from the teacher's own p_T (not N(0, 1), which differs), [n, D], float64, and conditions."""
        generator = torch.Generator().manual_seed(stream_key(self.seed, "starts"))
        if not self.mixture.num_classes:
            return self.mixture.sample_at(STARTS, self.schedule, self.schedule.start, generator), None
        label = torch.arange(STARTS) % self.mixture.num_classes
        x = self.mixture.sample_at(STARTS, self.schedule, self.schedule.start, generator, label)
        return x, Cond({"label": label}, null={"label": torch.tensor([-1])})

    def data(self, name: str) -> Tensor:
        """As many draws of the data as there are starts, of their classes, from the stream ``name``."""
        x, cond = self.starts
        generator = torch.Generator().manual_seed(stream_key(self.seed, name))
        return self.mixture.sample(len(x), generator=generator, label=None if cond is None else cond["label"])

    def flow(self, x: Tensor, t: float, s: float, cond: Cond | None) -> Tensor:
        """The exact flow map from t to s."""
        label = None if cond is None else cond["label"]
        return self.mixture.flow_map(x, self.schedule, t, s, label=label, guidance_scale=self.guidance_scale)

    @cached_property
    def width(self) -> float:
        """Root mean square size of a component, over all dimensions together."""
        variances = self.mixture.components.variances.expand(-1, self.mixture.dim)  # isotropic ones are [K, 1]
        return float((self.mixture.weights @ variances).sum().sqrt())

    def roles(self, method: Method, dtype: torch.dtype = torch.float32) -> Roles:
        """The exact teacher with a small network for every role that ``method`` trains."""
        classes = self.mixture.num_classes
        liked = dict.fromkeys((*method.rewards, *method.measures), PointReward())
        encoder = PointEncoder(self.mixture.dim)
        roles = Roles(self.teacher, helpers=Helpers(encoder=encoder, rewards=liked, **one_hot_labels(classes)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_key(self.seed, "student") % 2**63)
            for spec in method.roles():
                if spec.follows is None:
                    kind = spec.prediction_type or self.prediction_type
                    network = self.network(spec.extra_inputs, kind)
                    if spec.features_only:
                        network.drop_decoder()
                    roles.add_network(spec.name, network.to(dtype), kind, spec.bank)
            for heads in method.heads():
                roles.add_heads(heads.name, heads.build, heads.backbone, heads.conditioned).to(dtype)
        return roles

    def network(self, extra_inputs: Iterable[str] = (), prediction_type: str = "sample") -> MLP:
        """A small network with random weights, whose input states and predictions have the mixture's dimension."""
        classes, accepts = self.mixture.num_classes, frozenset(extra_inputs)
        if prediction_type != "sample":  # noise and slopes are not centred where the data are
            return MLP(self.schedule, self.mixture.dim, num_classes=classes, accepts=accepts)
        centre = self.mixture.weights @ self.mixture.means
        spread = (self.mixture.weights[:, None] * (self.mixture.means - centre) ** 2).sum() + self.width**2
        std = float((spread / self.mixture.dim).sqrt())
        return MLP(self.schedule, self.mixture.dim, num_classes=classes, accepts=accepts, mean=centre, std=std)

    def train(
        self, method: Method, settings: TrainingSettings, show_progress: bool = False, roles: Roles | None = None
    ) -> Trainer:
        """Train ``method``, from scratch without ``roles``; the trainer holds the roles and the last log record."""
        roles = self.roles(method, settings.dtype) if roles is None else roles
        follow(roles, method, settings)
        trainer = Trainer(method, roles, self.source_of(method), settings, seed=self.seed, show_progress=show_progress)
        trainer.run()
        return trainer


def training_settings(steps: int, **others: Any) -> TrainingSettings:
    """How verification trains its small students, with ``others`` for some of the settings."""
    warmup, log_every = min(100, steps // 10), max(1, min(250, steps))
    usual: dict[str, Any] = {"batch_size": 512, "learning_rate": 3e-3, "warmup_steps": warmup, "lr_schedule": "cosine"}
    return TrainingSettings(steps=steps, log_every=log_every, **usual | others)
