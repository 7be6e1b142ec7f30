"""The contract of a method: randomness first, computation after, one loss for each player.

A method is one file. It declares its players (`players`), the roles it needs (`roles`) and the data it reads
(`streams`), draws all random numbers of a step at once, and returns a loss per player. It knows nothing of
devices, files, optimisers, logging, or whether a role is a LoRA.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.guidance import Guidance
from fewstep.models.roles import Roles


@dataclass(frozen=True)
class Player:
    """Who updates, and how often.

    Attributes:
        name: the method's attribute that returns this player's loss.
        every: the player is due at steps start, start + every, start + 2 every, ...
        owns: the roles whose weights it trains; its own name by default.
        start: its first step; until then the others learn alone.
        rate: of its learning, in units of training.learning_rate, where training.critic_learning_rate does not say.
    """

    name: str
    every: int = 1
    owns: tuple[str, ...] = ()
    start: int = 0
    rate: float = 1.0

    @property
    def roles(self) -> tuple[str, ...]:
        return self.owns or (self.name,)

    def due(self, step: int) -> bool:
        return step >= self.start and (step - self.start) % self.every == 0


@dataclass(frozen=True)
class RoleSpec:
    """A role that a method needs beside the teacher.

    Attributes:
        name: how the method calls it: ``roles.<name>``.
        extra_inputs: inputs that it is conditioned on: "end", "guidance_embed".
        follows: the role it trails by an EMA (it is not trained then).
        decay: of that EMA; 0 makes it the followed role itself, 1 what that one was at the start of training.
        prediction_type: what it predicts, where that is not what the teacher does.
        features_only: a discriminator's backbone. It starts from the model that the teacher came from, past all
            students in between, and has no decoder.
        weights: "full" or "lora", where that is not the student's choice.
        init_from: whose first weights it has: "teacher", or "student", which a run's ``init`` may have moved.
        pulled_to: the role of the same kind towards which it moves by the share ``pull`` of the difference, after
            every update of that one (`Roles.pull`). It is trained, too.
        bank: N + 1 decreasing native times: it has N last layers in place of its network's own, one for each interval,
            read in mixtures (`Denoiser.mixtures`), or by the end of a step. Empty: it has its network's own.
        bank_rate: how fast these learn, as a share of the role's rate; None: `fewstep.models.bank.usual_rate`.
    """

    name: str
    extra_inputs: tuple[str, ...] = ()
    follows: str | None = None
    decay: float = 0.0
    prediction_type: str | None = None
    features_only: bool = False
    weights: Literal["full", "lora"] | None = None
    init_from: Literal["teacher", "student"] = "teacher"
    pulled_to: str | None = None
    pull: float = 0.0
    bank: tuple[float, ...] = ()
    bank_rate: float | None = None


@dataclass(frozen=True)
class HeadSpec:
    """Trainable heads that a method needs: weights of a player that are no view of the teacher.

    Attributes:
        name: how the method calls them: ``roles.heads[name]``.
        build: from the channels of every tap of the backbone's network to the heads.
        backbone: the role whose features they read, or "encoder" (`Roles.encoder`).
        conditioned: ``build`` is given `fewstep.models.helpers.Helpers` too, for heads that see their vectors.
        squares: whether they end in one logit of a 4x4 map, and so have no use for elongated images.
    """

    name: str
    build: Callable[..., nn.Module]
    backbone: str = "teacher"
    conditioned: bool = False
    squares: bool = False


@dataclass(frozen=True)
class Sampling:
    """The sampling inputs for the students of a method, by its ``sampler``.

    Attributes:
        num_inference_steps: steps. no_other_steps: whether any other number is off what was trained, but those of
        other_steps: numbers that it was trained for too.
        timesteps: their native times, where they are not the sampler's own.
        eta: share of fresh noise, where the sampler has it.
        guidance_scale: classifier-free guidance; 1 is off, as it should be where the teacher's is built in.
    """

    num_inference_steps: int = 4
    eta: float = 0.0
    guidance_scale: float = 1.0
    no_other_steps: bool = False
    other_steps: tuple[int, ...] = ()
    timesteps: tuple[float, ...] = ()

    @property
    def trained_steps(self) -> tuple[int, ...]:
        """Every number of steps that was trained for, its own first."""
        return (self.num_inference_steps, *self.other_steps)

    def others_among(self, usual: Collection[int]) -> tuple[int, ...]:
        """The other numbers at which a student is measured: all where they are few, else those among the ``usual``."""
        few = len(self.other_steps) <= len(usual)
        return self.other_steps if few else tuple(n for n in self.other_steps if n in usual)


@dataclass(frozen=True)
class Progress:
    """Where training stands.

    Attributes:
        step: counts from 0. total: steps in this stage.
        due: the players that learn at this step; None for all. What the others alone would use need not be drawn.
    """

    step: int
    total: int
    stage: str = ""
    due: Collection[str] | None = None

    def plays(self, player: str) -> bool:
        """Whether ``player`` learns at this step."""
        return self.due is None or player in self.due


@dataclass(frozen=True)
class Balanced:
    """A term of a loss whose gradient gets the norm of the total's (Esser et al. 2021, arXiv 2012.09841, eq. 7).

    It is added with the weight ``scale clamp(|gradient of the total| / (|gradient of the term| + 1e-4), low, high)``,
    both gradients those of the whole batch at one weight of the player, `Roles.probe`. Nothing flows into the weight.

    Attributes:
        term: scalar with a graph.
        scale, low, high: of the weight.
    """

    term: Tensor
    scale: float = 1.0
    low: float = 0.0
    high: float = 1e4


@dataclass
class Loss:
    """What a player minimises.

    Attributes:
        total: scalar with a graph.
        parts: named terms, unweighted, detached scalars.
        stats: anything else worth a line in the log, detached: scalars, or vectors of ten (`parts.statistics.by_time`).
        balanced: named terms beside the total, whose weights follow from gradients.
        then: makes what is minimised beside it, once this has gone backward and its graph is gone: of several large
            terms one is held at a time.
    """

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)
    balanced: dict[str, Balanced] = field(default_factory=dict)
    then: Callable[[], Loss] | None = None

    def terms(self) -> Iterator[Loss]:
        """This loss and those that follow it, each made when it is asked for."""
        yield self
        if self.then is not None:
            yield from self.then().terms()


class Method:
    """Base of all methods.

    ``streams`` names what a batch must hold: "data", "pairs" where the method learns from the teacher's samples, and
    "prompts" where it reads captions.
    Subclasses define a frozen dataclass `Settings` and the functions below, and one function per player, named
    like it: ``def student(self, roles, batch, draws, shared) -> Loss``.

    Args:
        schedule: of the teacher.
        settings: a `Settings`, or its fields as keywords.

    Raises:
        ValueError: for a setting that does not exist or makes no sense.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    players: tuple[Player, ...] = (Player("student"),)
    streams: tuple[str, ...] = ("data",)
    sampler: str = "ddim"  # the default sampler of its students
    converts: bool = False  # whether the student's prediction type differs from the teacher's
    continues: ClassVar[bool] = False  # whether the teacher is a few-step student, sampled in the same way
    needs_precision: ClassVar[bool] = False  # whether its loss is a small difference of predictions: float32 alone
    reads_clean_data: ClassVar[bool] = False  # whether losses compare clean data as predicted at every time
    chosen_start: str = ""  # the setting that chooses where its students start
    default_times: tuple[float, ...] = ()  # the student's times where its schedule chose them (`diffusion.well_posed`)
    gan: Any = None  # the discriminator of its losses (`parts.discriminators.Discriminator`), if it has one
    encoder: str = ""  # the frozen image encoder of its losses: "scenes-64", a folder or a hub name
    rewards: tuple[str, ...] = ()  # the reward models of its losses (`fewstep.models.rewards`)
    measures: tuple[str, ...] = ()  # reward models that are only logged
    renamed: ClassVar[dict[str, str]] = {}  # settings of older recipes: old name -> new name
    truth_settings: ClassVar[dict[str, Any]] = {}  # settings for which `fewstep verify` knows the fixed point
    truth_cases: ClassVar[tuple[dict[str, Any], ...]] = ({},)  # more settings: the command makes one report of each

    @dataclass(frozen=True)
    class Settings:
        """No settings."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "needs_pictures" in vars(cls):  # an override that nobody calls any more would be ignored in silence
            raise ValueError(f"{cls.__name__}.needs_pictures is called needs_images now.")

    def __init__(self, schedule: Schedule, settings: Any = None, **overrides: Any) -> None:
        self.schedule = schedule
        base = self.Settings() if settings is None else settings
        for name in overrides.keys() - set(self.setting_names()):
            if name in self.renamed:
                raise ValueError(f"The setting '{name}' of {self.name} is called '{self.renamed[name]}' now.")
            known = ", ".join(sorted(self.setting_names()))
            raise ValueError(f"{type(self).__name__} has no setting '{name}': it has {known}.")
        self.settings: Any = dataclasses.replace(base, **overrides)
        self.streams = self.streams_of(self.settings)

    def roles(self) -> tuple[RoleSpec, ...]:
        """The roles this method needs beside the teacher."""
        return (RoleSpec("student"),)

    def heads(self) -> tuple[HeadSpec, ...]:
        """The heads this method trains beside its roles: by default those of ``gan``."""
        return (self.gan.spec(),) if self.gan else ()

    @classmethod
    def sampling(cls, settings: Any) -> Sampling:
        """How a student trained under ``settings`` is sampled by default; a recipe may change it."""
        return Sampling()

    @classmethod
    def teacher_guidance(cls, settings: Any) -> Guidance | None:
        """The teacher's guidance in training: by default the setting ``guidance_scale``; None without that setting."""
        scale = cls._named(settings, "guidance_scale")
        return None if scale is None else Guidance.of(scale)

    @classmethod
    def original_inference_steps(cls, settings: Any) -> int | None:
        """Solver steps of the training grid, from which LCM's and TCD's samplers take theirs.

        By default the setting ``num_grid_steps``; None without that setting.
        """
        steps: int | None = cls._named(settings, "num_grid_steps")
        return steps

    @classmethod
    def num_teacher_steps(cls, settings: Any) -> int | None:
        """Steps that the teacher takes where it is a few-step student itself.

        By default the setting ``num_teacher_steps``; None without that setting: any teacher will do.
        """
        steps: int | None = cls._named(settings, "num_teacher_steps")
        return steps

    @classmethod
    def depends_on_length(cls, settings: Any) -> bool:
        """Whether a step depends on the number of all steps (`Progress.total`), beyond the learning rate."""
        return False

    @property
    def head_needs_squares(self) -> bool:
        """Whether a discriminator's head takes square images only (`HeadSpec`)."""
        return any(spec.squares for spec in self.heads())

    @property
    def title(self) -> str:
        """The method's name in a report, with its variant where it has several."""
        return self.name or type(self).__name__

    @classmethod
    def setting_names(cls) -> list[str]:
        """Names of the settings."""
        return [field.name for field in dataclasses.fields(cls.Settings)]

    @staticmethod
    def _named(settings: Any, name: str) -> Any:
        return getattr(settings, name, None)

    @classmethod
    def streams_of(cls, settings: Any) -> tuple[str, ...]:
        """What a batch must hold under ``settings``: by default ``streams``."""
        return cls.streams

    @classmethod
    def needs_images(cls, settings: Any) -> bool:
        """Whether training under ``settings`` looks at data; otherwise prompts alone will do."""
        return True

    def draw(self, batch: Batch, rng: Rng, progress: Progress) -> Any:
        """All random numbers of the step, as a dataclass of documented fields."""
        raise NotImplementedError

    def prepare(self, roles: Roles, batch: Batch, draws: Any, due: Collection[str]) -> Any:
        """What the players share, made once; carries a graph only if "student" is due and needs it."""
        return None

    def calls_per_step(self) -> Mapping[str, float]:
        """Network calls of one step by role, with every player due; docs and tests hold the method to it.

        Where the number is drawn at random it is the mean, and `calls` knows it for each step.
        """
        raise NotImplementedError

    def calls(self, draws: Any) -> Mapping[str, float]:
        """Network calls of the step with these draws."""
        return self.calls_per_step()
