"""`fewstep diagnose`: the problems of a run, in words, from its log alone.

    print(diagnose(Path("runs/mine")))

The checks and their limits are in `checks`; methods log the statistics that they need (docs/diagnosing.md).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep.reports.checks import CHECKS, Check, Evidence, not_finite
from fewstep.reports.history import ENOUGH, History, read_history

EARLY = 25
"""Steps below which a run that goes on is not judged."""


@dataclass(frozen=True)
class Finding:
    """A problem that a check has found.

    Attributes:
        name: of the check. fatal: whether it is wrong, or only worth knowing.
        sentence: the problem, the figures, and what to do.
        first, last: the steps between which it holds.
    """

    name: str
    fatal: bool
    sentence: str
    first: int
    last: int


@dataclass(frozen=True)
class Diagnosis:
    """The findings in a run's folder, the likeliest cause first.

    Attributes:
        run: the folder. step: the last logged step.
        findings: causes before their consequences, those that are only worth knowing last.
        checked: checks without a finding.
        unchecked: check -> why it could not be made: statistics that are missing, or too few lines of them.
        missing: sentences about what the folder lacks.
        early: a sentence where the run has done too little for most checks.
    """

    run: str
    step: int
    findings: tuple[Finding, ...]
    checked: tuple[str, ...]
    unchecked: dict[str, str]
    missing: tuple[str, ...]
    early: str = ""

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong; findings that are only worth knowing do not count."""
        return not any(finding.fatal for finding in self.findings)

    def as_json(self) -> str:
        """Everything, for programs."""
        return json.dumps({**dataclasses.asdict(self), "healthy": self.healthy}, indent=1)

    def sentences(self) -> list[str]:
        """Everything, for people."""
        lines = [self.early] if self.early else []
        if self.healthy and not self.early:
            nothing = f"Nothing stands out in the {self.step} steps of this run."
            lines.append(nothing if self.checked else "This run has logged too little to be checked.")
        for finding in self.findings:
            kind = finding.name if finding.fatal else f"{finding.name} (worth knowing, not wrong)"
            lines.append(f"{_capital(kind)}: {finding.sentence}")
        lines += self.missing
        if self.checked:
            lines.append(f"Checked without a finding: {', '.join(self.checked)}.")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.unchecked.items():
            reasons.setdefault(reason, []).append(name)
        return [*lines, *(f"Could not be checked ({reason}): {', '.join(found)}." for reason, found in reasons.items())]

    def __str__(self) -> str:
        return "\n".join([f"{self.run}, {self.step} steps", *self.sentences()])


def diagnose(run: Path) -> Diagnosis:
    """Apply every check to the run in the folder ``run``.

    Raises:
        ValueError: it is no run directory.
    """
    return examine(read_history(run), str(run))


def examine(history: History, run: str = "") -> Diagnosis:
    """Apply every check to a history."""
    found: list[tuple[Check, Evidence]] = []
    checked, unchecked, early = [], {}, _too_early(history)
    for check in CHECKS:
        lacks = _lacks(history, check)
        if early and not check.early:
            unchecked[check.name] = lacks or "too early"
        elif (evidence := check(history)) is not None:
            found.append((check, evidence))
        elif lacks:
            unchecked[check.name] = lacks
        else:
            checked.append(check.name)
    found.sort(key=lambda pair: not pair[0].fatal)
    findings = tuple(_findings(found))
    return Diagnosis(run, history.step, findings, tuple(checked), unchecked, tuple(history.missing), early)


def _findings(found: Sequence[tuple[Check, Evidence]]) -> Iterator[Finding]:
    """Findings with their advice, causes first: what would undo the advice on a likelier cause is not advised."""
    advised: list[Check] = []
    for check, (figures, first, last) in found:
        cause = next((other for other in advised if check.opposes(other)), None)
        if cause is None:
            advised.append(check)
            advice = _capital(check.advice)
        else:
            advice = f"See to '{cause.name}' first, whose remedy is the opposite"
        steps = f"at step {last}" if first == last else f"steps {first} to {last}"
        yield Finding(check.name, check.fatal, f"{check.problem}: {figures} ({steps}). {advice}.", first, last)


def _too_early(history: History) -> str:
    """A sentence where a run that goes on has too few steps or lines for a trend to be distinguished from noise."""
    lines = len(history.records)
    if not lines or (history.step >= EARLY and lines >= ENOUGH) or not_finite(history):
        return ""
    return (
        f"It is too early for a diagnosis: {history.step} steps are done and {lines} lines logged, and it takes "
        f"{EARLY} steps and {ENOUGH} lines (training.log_every)."
    )


def _lacks(history: History, check: Check) -> str:
    """Why a check cannot be made, in words; empty where it can."""
    absent, few = [], []
    for name in check.needs:
        if "." in name:  # a key of the recipe
            absent += [name] if history.setting(*name.split(".")) is None else []
        elif name == "learning_rate":
            few += [name] if len(history.series(name)) < 3 else []
        elif not history.names(name):
            absent.append(name)
        elif not any(history.series(found).enough for found in history.names(name)):
            few.append(name)
    if absent:
        return f"not logged: {', '.join(absent)}"
    return f"fewer than {ENOUGH} lines in the log" if few else ""


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
