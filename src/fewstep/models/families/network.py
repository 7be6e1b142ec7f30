"""Diffusers networks in this library's contract: what UNets and transformers have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.models.cond import Cond
from fewstep.models.denoiser import check_taps
from fewstep.models.sharding import is_spread

_TAPS = 4


def needed(cond: Cond | None) -> Cond:
    """``cond``, which no text-to-image network can do without.

    Raises:
        ValueError: there is none.
    """
    if cond is None:
        raise ValueError("This teacher needs a text condition (prompt_embeds).")
    return cond


class _Seen(Exception):
    """Everything that was wanted of a network has been seen."""


def leave(*_: Any) -> None:
    """A hook that ends the forward in which it is called (`watched`)."""
    raise _Seen


@contextmanager
def watched(blocks: dict[str, nn.Module], found: dict[str, Tensor], last: str | None, place: int = 0) -> Iterator[None]:
    """Within this block the outputs of ``blocks`` land in ``found``; the forward is left after ``last``, if any.

    Watching the network's own forward serves every kind of condition and embedding that it knows. ``place`` is where
    in a tuple of outputs the picture is.
    """

    def watcher(tap: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            found[tap] = output[place] if isinstance(output, tuple) else output
            if tap == last:
                leave()

        return look

    handles = [block.register_forward_hook(watcher(tap)) for tap, block in blocks.items()]
    try:
        yield
    except _Seen:
        pass
    finally:
        for handle in handles:
            handle.remove()


class TransformerNetwork(nn.Module):
    """A diffusers diffusion transformer in the network contract; families say how it is called.

    ``time_scale`` takes native times to the transformer's own.
    """

    lora_targets: ClassVar[tuple[str, ...]]
    extra_width = 256  # of the sinusoids that the time embedding reads, in all of diffusers' transformers
    stacks: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    place: ClassVar[int] = 0  # of the picture's tokens in what a block returns

    def __init__(self, transformer: nn.Module, time_scale: float = 1.0) -> None:
        super().__init__()
        self.transformer, self.time_scale = transformer, time_scale

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.transformer.parameters() if p.is_floating_point())

    @property
    def config(self) -> Any:
        return self.transformer.config

    @property
    def patch_size(self) -> int:
        """Side of the latents' square that is one token."""
        return int(self.config.patch_size)

    def _blocks(self) -> list[nn.Module]:
        return [block for stack in self.stacks for block in getattr(self.transformer, stack)]

    @property
    def tap_channels(self) -> dict[str, int]:
        """What a discriminator can look at: the picture's tokens after four blocks of the first half, as maps."""
        half = max(len(self._blocks()) // 2, 1)
        count = min(_TAPS, half)
        return {f"block{half * k // count - 1}": int(self.transformer.inner_dim) for k in range(1, count + 1)}  # type: ignore[arg-type]

    def features(self, x: Tensor, t: Tensor, cond: Cond | None, taps: Iterable[str]) -> list[Tensor]:
        """Tokens [B, C, h, w] at the taps, in their order; blocks after the last of them are not run.

        Spread over processes all are run: all processes must meet at them, too.

        Raises:
            ValueError: for a tap that is not there.
        """
        wanted, blocks = check_taps(taps, self.tap_channels), self._blocks()
        number = {tap: int(tap.removeprefix("block")) for tap in wanted}
        found: dict[str, Tensor] = {}
        whole = is_spread(self)
        watching = watched({tap: blocks[i] for tap, i in number.items()}, found, None, self.place)
        with watching, nullcontext() if whole else self._cut(max(number.values()) + 1):
            self(x, t, cond)
        height, width = (side // self.patch_size for side in x.shape[-2:])
        return [found[tap].transpose(1, 2).unflatten(2, (height, width)) for tap in wanted]

    @contextmanager
    def _cut(self, count: int) -> Iterator[None]:
        """Within this block the transformer has its first ``count`` blocks only, and is left behind them.

        Left *inside* a block, a checkpointed one would never learn that its forward has ended.
        """
        transformer: Any = self.transformer
        kept = {stack: getattr(transformer, stack) for stack in self.stacks}
        handle = transformer.norm_out.register_forward_pre_hook(leave)
        try:
            for stack, blocks in kept.items():
                setattr(transformer, stack, blocks[:count])
                count = max(count - len(blocks), 0)
            yield
        finally:
            for stack, blocks in kept.items():
                setattr(transformer, stack, blocks)
            handle.remove()

    def _time_embedder(self) -> nn.Module:
        return self.transformer.time_text_embed.timestep_embedder  # type: ignore[union-attr,return-value]

    @contextmanager
    def _told(self, extra: Tensor | None) -> Iterator[None]:
        """Within this block ``extra`` [B, width] is added to what the time embedding reads."""
        if extra is None:
            yield
            return
        embedder = self._time_embedder()
        handle = embedder.register_forward_pre_hook(lambda _, args: (args[0] + extra.to(args[0].dtype), *args[1:]))
        try:
            yield
        finally:
            handle.remove()
