"""Verification: methods trained on closed-form teachers and held against what they must converge to."""

from fewstep.verification.report import Report, Row
from fewstep.verification.verify import verify

__all__ = ["Report", "Row", "verify"]
