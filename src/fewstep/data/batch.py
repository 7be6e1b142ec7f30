"""A batch: the data of one training step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewstep.models.cond import Cond


@dataclass
class Pairs:
    """Noise and the sample that the teacher's own solver makes of it in many steps.

    Attributes:
        noise: [B, ...] unit normals.
        x0: [B, ...] the sample.
        cond: its condition, or None.
    """

    noise: Tensor
    x0: Tensor
    cond: Cond | None = None


@dataclass
class Batch:
    """Clean data and its condition, and the other streams that a method needs (`Method.streams`); batch size B.

    Attributes:
        x0: [B, ...] data or latents, at the scale the teacher was trained on.
        cond: its condition, or None.
        pairs: the stream "pairs", shuffled by itself: its row i is unrelated to row i of the data.
        has_data: False where there are prompts alone; x0 then has the latents' shape and holds NaN.
        prompts: the stream "prompts": the captions of the rows as text; empty where the data have none.
    """

    x0: Tensor
    cond: Cond | None = None
    pairs: Pairs | None = None
    has_data: bool = True
    prompts: tuple[str, ...] = ()

    def needed_pairs(self, method: str, instead: str = "") -> Pairs:
        """The pairs, for a method that learns from them.

        Args:
            method: how the sentence names it. instead: what else would help.

        Raises:
            ValueError: the data have none.
        """
        if self.pairs is None:
            raise ValueError(
                f"{method} learns from pairs of the teacher, and this data has none: give a source that has them, as "
                f"fewstep.data.pairs.WithPairs{instead}."
            )
        return self.pairs
