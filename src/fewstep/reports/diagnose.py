"""`fewstep diagnose`: what is wrong with a run, in words, from its log alone.

    print(diagnose(Path("runs/mine")))

Rules and their limits are in `rules`; the names they look for are a contract with methods (docs/training.md).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from fewstep.reports.history import ENOUGH, History, read_history
from fewstep.reports.rules import RULES, Rule


@dataclass(frozen=True)
class Finding:
    """One thing that stands out.

    Attributes:
        name: of the rule. fatal: whether it is wrong, or only worth knowing.
        sentence: what is wrong, the figures, and what to do.
        first, last: the steps between which it holds.
    """

    name: str
    fatal: bool
    sentence: str
    first: int
    last: int


@dataclass(frozen=True)
class Diagnosis:
    """What was found in a run's folder, the likeliest cause first.

    Attributes:
        run: the folder. step: steps done.
        findings: causes before what follows from them, what is only worth knowing last.
        checked: rules that were applied and found nothing.
        unchecked: rule -> the statistics it lacks, or that there are too few lines of them.
        missing: what the folder lacks, in sentences.
    """

    run: str
    step: int
    findings: tuple[Finding, ...]
    checked: tuple[str, ...]
    unchecked: dict[str, str]
    missing: tuple[str, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong; what is only worth knowing does not count."""
        return not any(finding.fatal for finding in self.findings)

    def as_json(self) -> str:
        """Everything, for programs."""
        return json.dumps({**dataclasses.asdict(self), "healthy": self.healthy}, indent=1)

    def sentences(self) -> list[str]:
        """Everything, for people."""
        said = [] if not self.healthy else [self._nothing()]
        for finding in self.findings:
            kind = finding.name if finding.fatal else f"{finding.name} (worth knowing, not wrong)"
            said.append(f"{kind[0].upper()}{kind[1:]}: {finding.sentence}")
        said += self.missing
        if self.checked:
            said.append(f"Checked without a finding: {', '.join(self.checked)}.")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.unchecked.items():
            reasons.setdefault(reason, []).append(name)
        said += [f"Could not be checked ({reason}): {', '.join(names)}." for reason, names in reasons.items()]
        return said

    def _nothing(self) -> str:
        if not self.checked:
            return "Nothing can be said of this run yet."
        return f"Nothing stands out in the {self.step} steps of this run."

    def __str__(self) -> str:
        return "\n".join([f"{self.run}, {self.step} steps", *self.sentences()])


def diagnose(run: Path) -> Diagnosis:
    """Apply every rule to the run in the folder ``run``.

    Raises:
        ValueError: it is no run directory.
    """
    history = read_history(run)
    return examine(history, str(run))


def examine(history: History, run: str = "") -> Diagnosis:
    """Apply every rule to a history."""
    findings, checked, unchecked = [], [], {}
    for rule in RULES:
        seen = rule.see(history, rule.limit)
        lacks = _lacks(history, rule)
        if seen is not None:
            figures, first, last = seen
            held = f"at step {last}" if first == last else f"steps {first} to {last}"
            sentence = f"{rule.wrong}: {figures} ({held}). {rule.advice[0].upper()}{rule.advice[1:]}."
            findings.append(Finding(rule.name, rule.fatal, sentence, first, last))
        elif lacks:
            unchecked[rule.name] = lacks
        else:
            checked.append(rule.name)
    findings.sort(key=lambda finding: not finding.fatal)
    return Diagnosis(run, history.step, tuple(findings), tuple(checked), unchecked, tuple(history.missing))


def _lacks(history: History, rule: Rule) -> str:
    """Why a rule cannot be applied, in words; empty where it can."""
    settings = {"ema_decay": "ema_decay", "steps": "steps"}
    absent, few = [], []
    for name in rule.looks_at:
        if name in settings:
            absent += [] if history.setting("training", name) is not None else [f"training.{name}"]
        elif name == "learning_rate":
            few += [] if len(history.series(name)) >= 3 else [name]
        elif not history.names(name):
            absent.append(name)
        elif not any(history.series(found).enough for found in history.names(name)):
            few.append(name)
    if absent:
        return f"not logged: {', '.join(absent)}"
    return f"fewer than {ENOUGH} lines in the log" if few else ""
