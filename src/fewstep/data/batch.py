"""What one training step consumes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewstep.models.cond import Cond


@dataclass
class Pairs:
    """Where the teacher's own solver takes given noise, by many steps.

    Attributes:
        noise: [B, ...] unit normals it started from.
        x0: [B, ...] where it ended.
        cond: the condition it had, or None.
    """

    noise: Tensor
    x0: Tensor
    cond: Cond | None = None


@dataclass
class Batch:
    """Clean data and its condition, and whatever else a method's `streams` ask for; all of one batch size B.

    Attributes:
        x0: [B, ...] data or latents, at the scale the teacher was trained on.
        cond: its condition, or None.
        pairs: the stream "pairs", in an order of its own: row i has nothing to do with row i of the data.
        has_data: False where there are prompts alone; x0 has the latents' shape then, and holds NaN.
        prompts: the stream "prompts", the captions of the rows as they were written; empty where the data have none.
    """

    x0: Tensor
    cond: Cond | None = None
    pairs: Pairs | None = None
    has_data: bool = True
    prompts: tuple[str, ...] = ()
