"""The training loop: one step reads from top to bottom in `Trainer.step`."""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.random import Rng, stream_key
from fewstep.data.sources import Source, prefetch
from fewstep.methods.base import Loss, Method, Progress
from fewstep.models.denoiser import network_dtype
from fewstep.models.helpers import Helpers
from fewstep.models.hub import Remark
from fewstep.models.roles import Roles, Weights
from fewstep.models.sharding import Part, part, whole
from fewstep.training import checkpoint, distributed
from fewstep.training.logging import JsonLines, Meter, Speed
from fewstep.training.players import PlayerState
from fewstep.training.progress import doing, progress_bar
from fewstep.training.remarks import first_time_remark
from fewstep.training.run_files import RunFiles
from fewstep.training.settings import TrainingSettings
from fewstep.training.step import losses, trained_by
from fewstep.training.trackers import Tracker, open_trackers

Hook = Callable[[int], bool | None]


class TrainingStopped(Exception):
    """Training was interrupted, with everything saved.

    Attributes:
        step: steps done; when the run has a folder, a checkpoint of exactly this step exists.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class NotFinite(ArithmeticError):
    """A gradient became NaN or infinite; the weights are still those of the step before."""


def build_roles(
    teacher: Any,
    method: Method,
    settings: TrainingSettings,
    weights: Weights | None = None,
    seed: int = 0,
    init: Mapping[str, Tensor] | None = None,
    origin: Any = None,
    helpers: Helpers | None = None,
) -> Roles:
    """The roles that ``method`` needs, on one teacher `Denoiser`, plus the student's evaluation EMA.

    Args:
        init: weights that the student starts from (`Roles.start`), and roles with ``init_from="student"``; the
            teacher's by default.
        origin: the `Denoiser` that discriminators' backbones start from; the teacher by default.
        helpers: frozen networks that losses use; those of plain data by default.
    """
    roles = Roles(
        teacher,
        autocast=settings.autocast,
        gradient_checkpointing=settings.gradient_checkpointing,
        seed=seed,
        helpers=helpers,
        spread_later=settings.fsdp and distributed.count() > 1,
    )
    for spec in sorted(
        method.roles(), key=lambda spec: not spec.features_only
    ):  # copy the network before any adapter is added to it
        own = dataclasses.replace(weights or Weights(), kind=spec.weights) if spec.weights else weights
        if spec.features_only:
            roles.add_encoder(spec.name, own, origin)
        elif spec.follows is None and spec.name not in roles:
            roles.add(
                spec.name,
                own,
                extra_inputs=spec.extra_inputs,
                prediction_type=spec.prediction_type,
                bank=spec.bank,
                bank_rate=spec.bank_rate,
            )
    for heads in method.heads():
        roles.add_heads(heads.name, heads.build, heads.backbone, heads.conditioned)
    if init is not None:
        for spec in method.roles():
            if spec.name == "student" or spec.init_from == "student":
                roles.start(spec.name, init)
    follow(roles, method, settings)
    if settings.compile:
        roles.compile()
    return roles


def follow(roles: Roles, method: Method, settings: TrainingSettings) -> None:
    """Add the roles that are moving averages of another: the method's targets, and ``ema`` for evaluation.

    Trained roles that are pulled to another are connected to it.
    """
    for spec in method.roles():
        if spec.follows is not None:
            roles.follow(spec.name, spec.follows, spec.decay)
        if spec.pulled_to is not None:
            roles.pull(spec.name, spec.pulled_to, spec.pull)
    if settings.ema_decay > 0:
        roles.follow("ema", "student", settings.ema_decay, in_steps=False)


def check_batch(settings: TrainingSettings, processes: int | None = None) -> None:
    """Raises ValueError for a batch that cannot be split evenly over processes (None: those here) and micro-batches."""
    count = distributed.count() if processes is None else processes
    if settings.batch_size % (settings.accumulation * count):
        raise ValueError(
            f"training.batch_size ({settings.batch_size}) must be a multiple of training.accumulation times the number "
            f"of processes ({settings.accumulation} x {count})."
        )


def check_float32(method: Method, roles: Roles, settings: TrainingSettings) -> None:
    """Refuse a method that needs float32 in bf16, be it the arithmetic or the weights of any network.

    Raises:
        ValueError: one sentence.
    """
    why = f"{method.name} learns from small differences of predictions, of which bf16 leaves nothing"
    if settings.autocast is not None:
        raise ValueError(f"{why}: set training.precision to fp32.")
    for name in ("teacher", *(spec.name for spec in method.roles())):
        dtype = network_dtype(getattr(roles, name).network)
        if dtype is not None and torch.finfo(dtype).bits < 32:
            raise ValueError(f"{why}: the weights of '{name}' are {dtype}; load or make them in float32.")


@contextmanager
def exact_products() -> Iterator[None]:
    """Within this block no matrix product or convolution rounds float32 to TF32's 10 bits, as cuDNN does by default."""
    products: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [of.allow_tf32 for of in products]
    for of in products:
        of.allow_tf32 = False
    try:
        yield
    finally:
        for of, allowed in zip(products, before, strict=True):
            of.allow_tf32 = allowed


class Trainer:
    """Trains a method's players on batches of a source.

    Started by torchrun, several processes train as one, each on its rows of every batch; the first of them writes.

    Args:
        method, roles, source: what is learned, by which networks, from which data.
        settings: how to optimise.
        seed: key of all random numbers. rng: the class that draws them.
        run_dir: folder of the log and the checkpoints; None keeps nothing.
        hooks: ``(every, function)`` pairs; the function is called with the number of steps done, in every process,
            and returns True to end the run. A resumed run calls those of its checkpoint's step again.
        stage: name of this training in a run of several.
        show_progress: show a progress bar.
    """

    def __init__(
        self,
        method: Method,
        roles: Roles,
        source: Source,
        settings: TrainingSettings,
        *,
        seed: int = 0,
        run_dir: Path | str | None = None,
        hooks: tuple[tuple[int, Hook], ...] = (),
        show_progress: bool = False,
        stage: str = "",
        rng: type[Rng] = Rng,
    ) -> None:
        self.stage, self.rng = stage, rng
        self.method, self.roles, self.source = method, roles, source
        self.settings, self.seed = settings, seed
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.hooks, self.show_progress = hooks, show_progress and distributed.first()
        check_batch(settings)
        if method.needs_precision:
            check_float32(method, roles, settings)
        if settings.fsdp and distributed.count() > 1:
            roles.shard()
        self.players = [
            PlayerState(player, trained_by(player, roles), settings, roles.leaves, roles.probe(player.roles[0]))
            for player in method.players
        ]
        self.done = 0
        self._resumed = False
        self.spent = 0.0  # forward passes of this run before it was resumed
        self.meter = Meter()
        self.last_record: dict[str, Any] = {}
        self._writing: checkpoint.Writing | None = None  # the checkpoint that is being written while training goes on
        self._logs: list[Tracker] = []

    # ---------------------------------------------------------------- one step

    def step(self, step: int) -> None:
        """One training step: gradients of every due player over all micro-batches, then the updates.

        Nothing here waits for the device: losses, norms and guards stay there until `run` logs them.
        """
        with exact_products() if self.method.needs_precision else nullcontext():
            self._step(step)

    def _step(self, step: int) -> None:
        due = {p.player.name: p for p in self.players if p.player.due(step)}
        progress = Progress(step, self.settings.steps, self.stage, due.keys())
        # dropout draws from the global generator: each process has other rows, and so other masks
        torch.manual_seed(stream_key(self.seed, step, "dropout") + distributed.rank())
        parts = [*self._micro_batches(step)]
        after = next(self._micro_batches(step + 1)) if step + 1 < self.settings.steps else None
        for rng, following in zip(parts, [*parts[1:], after], strict=True):
            batch = self.source.batch(rng)
            if following is not None:
                prefetch(self.source, following)
            draws = self.method.draw(batch, rng, progress)
            for player, loss in losses(self.method, self.roles, batch, draws, due.keys()):
                self._note(player.name, due[player.name].learn(loss, self.settings.accumulation))
        # Only now does any weight move: every loss of a step sees the same weights, whatever the players' order.
        for name, state in due.items():
            state.update(step)
            self._note_update(name, state)
            for role in state.player.roles:
                self.roles.update_followers(role)

    def _micro_batches(self, step: int) -> Iterator[Rng]:
        """This process's rows of the batch, in as many parts as gradients are accumulated over."""
        own = distributed.rows(self.settings.batch_size)
        size = (own.stop - own.start) // self.settings.accumulation
        for i in range(self.settings.accumulation):
            rows = slice(own.start + i * size, own.start + (i + 1) * size)
            yield self.rng(self.seed, step, self.settings.batch_size, rows, self.settings.device, self.settings.dtype)

    def _note(self, player: str, loss: Loss) -> None:
        self.meter.add(f"{player}/loss", loss.total)
        for name, value in {**loss.parts, **loss.stats}.items():
            self.meter.add(f"{player}/{name}", value)

    def _note_update(self, player: str, state: PlayerState) -> None:
        self.meter.add(f"{player}/grad_norm", state.grad_norm)
        for name, weight in state.weights.items():
            self.meter.add(f"{player}/{name}_weight", weight)
        if self.settings.max_grad_norm > 0:
            clipped = (state.grad_norm > self.settings.max_grad_norm).to(state.grad_norm.dtype)
            self.meter.add(f"{player}/clipped", clipped)

    @property
    def _student(self) -> PlayerState:
        """The player whose rate a log calls the learning rate."""
        return next((p for p in self.players if p.player.name == "student"), self.players[0])

    # ---------------------------------------------------------------- the loop

    def run(self, resume: bool = False) -> None:
        """Train to the last step, from the newest checkpoint if ``resume``.

        Raises:
            TrainingStopped: on SIGINT or SIGTERM, at the end of the step, after saving.
            NotFinite: names the step, the player and the last good checkpoint.
            ValueError: the checkpoint belongs to another recipe, began with other random numbers, or is damaged.
        """
        if resume:
            self.resume()
        elif distributed.first():
            self._remark()
        distributed.wait()  # each has read its data and its checkpoint: from here no process may wait for long
        speed = Speed(self.done)
        settings = self.settings
        with self._open_logs(), _stop_requests() as stopping, self._bar() as advance:
            if self._resumed and self._call_hooks():  # the process may have died after the checkpoint, before its hooks
                return
            while self.done < settings.steps:
                self.step(self.done)
                self.done += 1
                # agreed on once a step, so that all processes stop, or complete a checkpoint, after the same one
                last, at_work = self.done == settings.steps, self._writing is not None and self._writing.at_work
                stop, at_work = distributed.agree(stopping.is_set(), at_work)
                if not at_work:
                    self.complete_checkpoint()
                if self.done % settings.log_every == 0 or last:
                    self._guard()
                    self._log(speed, advance)
                else:
                    advance(self.done)
                due = self.done % settings.checkpoint_every == 0 or last or stop
                if due:
                    self.save(wait=last or stop)
                if self._call_hooks() and not last:
                    self.complete_checkpoint() if due else self.save()
                    return
                if stop and not last:
                    raise TrainingStopped(f"Stopped after step {self.done} of {settings.steps}.", self.done)

    def _remark(self) -> None:
        """Say at the start of training what is ill-posed on this schedule, and what to do."""
        remark = first_time_remark(self.method, self.roles.student)
        if remark:
            warnings.warn(Remark(remark), stacklevel=3)

    def _call_hooks(self) -> bool:
        """Call the hooks that are due after the steps done; True when one of them ends the run."""
        last = self.done == self.settings.steps
        due = [hook for every, hook in self.hooks if self.done % every == 0 or last]
        ends = any([hook(self.done) for hook in due])
        if due:
            distributed.wait()  # the first process may have worked alone for longer than a step may wait
        return ends

    def _bar(self) -> Any:
        label = f"training {self.stage or self.method.name}".rstrip()
        return progress_bar(self.settings.steps, self.done, label, self.show_progress)

    @contextmanager
    def _open_logs(self) -> Iterator[None]:
        """Within this block, the log and the trackers are open, if the run has a folder."""
        if self.run_dir and distributed.first():
            lines = JsonLines(RunFiles(self.run_dir).log, self.done)
            self._logs = [lines, *open_trackers(self.settings.trackers, self.run_dir, self.done, lines.found_step)]
        try:
            yield
        finally:
            for log in self._logs:
                log.close()
            self._logs = []

    def _log(self, speed: Speed, advance: Any) -> None:
        record = {"step": self.done, **distributed.means(self.meter.read())}
        record["learning_rate"] = self._student.rate(self.done - 1)
        for player in (p for p in self.players if p.player.name != "student"):
            record[f"{player.player.name}/learning_rate"] = player.rate(self.done - 1)
        record["steps_per_second"] = speed.read(self.done)
        record["forward_equivalents"] = self.cost()
        self.last_record = record
        for log in self._logs:
            log.write(record)
        text = "  ".join(f"{p.player.name} {record[f'{p.player.name}/loss']:.4g}" for p in self.players
                         if f"{p.player.name}/loss" in record)  # fmt: skip
        advance(self.done, f"{text}  {record['steps_per_second']:.1f} steps/s")

    def cost(self) -> float:
        """Compute cost so far in forward passes (of one image; backward counts 2), over all processes and resumes."""
        return self.spent + self.roles.cost().forward_equivalents * distributed.count()

    def _guard(self) -> None:
        """Raise for a step whose gradient was not finite; waits for the device, at log and checkpoint steps alone."""
        for player in self.players:
            bad = player.first_bad_step.item()
            if bad != float("inf"):
                self.complete_checkpoint()
                for log in self._logs:
                    log.write(self._final_record(player.player.name, int(bad)))
                safe = checkpoint.latest(RunFiles(self.run_dir).checkpoints) if self.run_dir else None
                where = f"the last good checkpoint is {safe}" if safe else "no checkpoint was written yet"
                raise NotFinite(
                    f"Step {int(bad)}: the gradient of '{player.player.name}' is not finite; {where}. "
                    "Look for NaN in the data, or lower training.learning_rate, then continue with --resume."
                )

    def _final_record(self, player: str, bad: int) -> dict[str, Any]:
        """The log's line of a run that ends because ``player``'s gradient was not finite at step ``bad``."""
        record: dict[str, Any] = {"step": self.done, "not_finite": player, "first_bad_step": bad}
        return record | {"learning_rate": self._student.rate(bad), "forward_equivalents": self.cost()}

    # ---------------------------------------------------------------- checkpoints

    def tensors(self, gather: Any = whole) -> dict[str, Any]:
        """All tensors that training changes, by name. Every process must call this.

        Args:
            gather: `whole` for all rows of sharded ones, `part` for those of this process, which copies nothing.
        """
        tensors = {f"roles/{name}": gather(t.detach()) for name, t in self.roles.tensors().items()}
        for player in self.players:
            tensors |= {f"optimizer/{player.player.name}/{k}": t for k, t in player.tensors(gather).items()}
        return tensors

    def save(self, wait: bool = True) -> Path | None:
        """Write a checkpoint of the steps done; None when the run has no folder, or another process writes it.

        Args:
            wait: until it is complete; else sharded weights are written while training goes on, if the settings allow
                it, and the checkpoint is completed after a later step, or by the next call.

        Raises:
            OSError: it could not be written, or the one before could not.
        """
        if self.run_dir is None:
            return None
        with doing("writing a checkpoint"):
            path = self._save(RunFiles(self.run_dir).checkpoints, wait)
            distributed.wait()  # the others would wait in the next step, where patience is short
            return path

    def _save(self, folder: Path, wait: bool) -> Path | None:
        self._guard()
        self.complete_checkpoint()
        tensors = self.tensors(part)
        in_rows = any(isinstance(t, Part) for t in tensors.values())
        if not distributed.first() and not in_rows:
            return None
        state = {
            "seed": self.seed,
            "method": self.method.name,
            "random": self.rng.version,
            "torch": torch.__version__,
            "forward_equivalents": self.cost(),
        }
        background = in_rows and not wait and self.settings.async_checkpoints
        writing = checkpoint.Writing(folder, self.done, tensors, state, self.settings.keep_checkpoints, background)
        if background:
            self._writing = writing
            return None
        writing.write()
        path = writing.finish()
        return path if distributed.first() else None

    def complete_checkpoint(self) -> None:
        """Wait for the checkpoint that is being written, and give it its name. Every process must call this."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.finish()
            distributed.wait()  # the first process deletes old checkpoints, and a step does not wait for long

    def resume(self) -> None:
        """Continue from the newest checkpoint, if there is one; exact to the bit on the same kind of machine."""
        newest = distributed.from_first(checkpoint.latest(RunFiles(self.run_dir).checkpoints) if self.run_dir else None)
        if newest is None:
            return
        tensors, state = checkpoint.load(newest)
        if (state.get("seed"), state.get("method")) != (self.seed, self.method.name):
            raise ValueError(f"The checkpoint {newest} was made with another method or seed.")
        checkpoint.check_random(newest, self.rng.version, state)
        if not isinstance(state.get("forward_equivalents", 0), int | float):
            raise ValueError(f"The checkpoint {newest} is damaged (its cost is no number): delete it.")
        if state["step"] > self.settings.steps:
            raise ValueError(
                f"This run has done {state['step']} steps, more than training.steps = {self.settings.steps}: "
                "give as many or more, or start another run."
            )
        self.roles.load_tensors(checkpoint.split(tensors, "roles"))
        for player in self.players:
            moments = checkpoint.split(tensors, f"optimizer/{player.player.name}")
            if not moments and state["step"] > player.player.start:
                raise ValueError(f"The checkpoint {newest} lacks the optimiser state of '{player.player.name}'.")
            player.load_tensors(moments)
        self.done, self._resumed = int(state["step"]), True
        self.spent = float(state.get("forward_equivalents", 0)) - self.roles.cost().forward_equivalents * (
            distributed.count()
        )


def seconds_per_step(trainer: Trainer, steps: int, warm_up: int) -> float:
    """Mean duration of a step, measured on a trainer that is not used for anything else.

    Args:
        steps: number of steps that count, after ``warm_up`` others.
    """
    for i in range(warm_up + steps):
        if i == warm_up:
            start = time.perf_counter()
        trainer.step(i)
        trainer.players[0].grad_norm.item()  # wait for the device
    return (time.perf_counter() - start) / steps


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second one interrupts at once. Main thread only.

    Under torchrun the second one is ignored: a Ctrl-C arrives twice there, from the terminal and from torchrun, which
    kills processes that do not stop.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def request(number: int, frame: Any) -> None:
        if event.is_set() and distributed.count() == 1:
            raise KeyboardInterrupt
        event.set()

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
