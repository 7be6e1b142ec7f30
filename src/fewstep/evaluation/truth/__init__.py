"""Verification: methods trained on closed-form teachers and held against what they must converge to."""

from fewstep.evaluation.truth.report import Report, Row
from fewstep.evaluation.truth.verify import verify

__all__ = ["Report", "Row", "verify"]
