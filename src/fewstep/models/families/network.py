"""Diffusers networks in the contract of `fewstep.models.denoiser`: what UNets and transformers have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.models.cond import Cond
from fewstep.models.denoiser import check_taps
from fewstep.models.sharding import is_spread

_TAPS = 4


def needed(cond: Cond | None) -> Cond:
    """``cond``, without which no text-to-image network can be called.

    Raises:
        ValueError: it is None.
    """
    if cond is None:
        raise ValueError("This teacher needs a text condition (prompt_embeds).")
    return cond


def real_tokens(cond: Cond, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """(prompt_embeds [B, tokens, width], their mask [B, tokens]), no longer than the longest text of the batch.

    The mask is True for the tokens that ``prompt_length`` calls real, and None where no text is padded.

    Args:
        like: whose dtype the embeddings take, and whose device the mask.
    """
    lengths = cond["prompt_length"]  # on the host: nothing waits for the device
    longest = int(lengths.max())
    embeds = cond["prompt_embeds"][:, :longest].to(like.dtype)
    if int(lengths.min()) == longest:
        return embeds, None
    mask = torch.arange(longest) < lengths[:, None]
    return embeds, mask.to(like.device, non_blocking=True)


def from_squares(tokens: Tensor, height: int, width: int, side: int) -> Tensor:
    """Tokens [B, n, s s C], of which h w are the image's -> [B, C, s h, s w]: squares of side s, channels last.

    Args:
        height, width: h and w, in tokens.
    """
    squares = tokens[:, : height * width].unflatten(2, (side, side, -1)).unflatten(1, (height, width))
    return squares.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class _Seen(Exception):
    """All wanted activations of a network have been recorded."""


def leave(*_: Any) -> None:
    """A hook that ends the forward in which it is called (`watched`)."""
    raise _Seen


@contextmanager
def watched(blocks: dict[str, nn.Module], found: dict[str, Tensor], last: str | None, place: int = 0) -> Iterator[None]:
    """Within this block the outputs of ``blocks`` are put into ``found``; the forward ends after ``last``, if any.

    Hooks on the network's own forward work with every kind of condition and embedding that it has. ``place`` is the
    position of the image's activations where a block returns a tuple.
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


@contextmanager
def added_to_time(embedder: nn.Module, extra: Tensor | None) -> Iterator[None]:
    """Within this block ``extra`` [B, width], if any, is added to the first input of a time embedder."""
    if extra is None:
        yield
        return
    handle = embedder.register_forward_pre_hook(lambda _, args: (args[0] + extra.to(args[0].dtype), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


class TransformerNetwork(nn.Module):
    """A diffusers diffusion transformer in the network contract; subclasses define how it is called.

    Args:
        time_scale: native times are multiplied by it: 1 where the transformer takes them as they are.

    Attributes:
        lora_targets: suffixes of the layers that a LoRA adapts.
        extra_width: width of the sinusoids that the time embedding reads, 256 in all of diffusers' transformers.
        stacks: attributes of the transformer that hold its blocks, in the order of the forward.
        place: position of the image's tokens in the tuple that a block returns.
        end: the module behind the last block, where a forward for features ends.
        last_layer: the last layer with weights, which a bank stands for (`fewstep.models.bank`).
        casts_inputs: it gives its weights inputs of their own dtype, and needs no autocast for it.
    """

    lora_targets: ClassVar[tuple[str, ...]]
    extra_width = 256
    stacks: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    place: ClassVar[int] = 0
    end: ClassVar[str] = "norm_out"
    last_layer: ClassVar[str] = "transformer.proj_out"
    casts_inputs: ClassVar[bool] = True

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
        """Side in latents of the square that is one token."""
        return int(self.config.patch_size)

    def _blocks(self) -> list[nn.Module]:
        return [block for stack in self.stacks for block in getattr(self.transformer, stack)]

    @property
    def tap_channels(self) -> dict[str, int]:
        """Features for a discriminator: the image's tokens, as maps, after four blocks of the first half."""
        half = max(len(self._blocks()) // 2, 1)
        count = min(_TAPS, half)
        return {f"block{half * k // count - 1}": self.width for k in range(1, count + 1)}

    @property
    def width(self) -> int:
        """Channels of a token within the blocks."""
        return int(self.config.num_attention_heads * self.config.attention_head_dim)

    def image_tokens(self, tokens: Tensor, count: int) -> Tensor:
        """The ``count`` tokens of the image among those [B, tokens, C] that a block returns: here the last ones.

        A block that returns one sequence of text and image has them behind the text, or (Z-Image) before it.
        """
        return tokens[:, -count:]

    def features(self, x: Tensor, t: Tensor, cond: Cond | None, taps: Iterable[str]) -> list[Tensor]:
        """Tokens [B, C, h, w] at the taps, in their order; blocks after the last of them are not run.

        A network that is sharded over processes runs all its blocks: all processes must reach each of them.

        Raises:
            ValueError: for an unknown tap.
        """
        wanted, blocks = check_taps(taps, self.tap_channels), self._blocks()
        number = {tap: int(tap.removeprefix("block")) for tap in wanted}
        found: dict[str, Tensor] = {}
        whole = is_spread(self)
        watching = watched({tap: blocks[i] for tap, i in number.items()}, found, None, self.place)
        with watching, nullcontext() if whole else self._cut(max(number.values()) + 1):
            self(x, t, cond)
        height, width = (side // self.patch_size for side in x.shape[-2:])
        of_image = (self.image_tokens(found[tap], height * width) for tap in wanted)
        return [tokens.transpose(1, 2).unflatten(2, (height, width)) for tokens in of_image]

    @contextmanager
    def _cut(self, count: int) -> Iterator[None]:
        """Within this block the transformer has its first ``count`` blocks only, and its forward ends after them.

        It must not end *inside* a block: gradient checkpointing would never see that block's forward return.
        """
        transformer: Any = self.transformer
        kept = {stack: getattr(transformer, stack) for stack in self.stacks}
        handle = transformer.get_submodule(self.end).register_forward_pre_hook(leave)
        try:
            for stack, blocks in kept.items():
                setattr(transformer, stack, blocks[:count])
                count = max(count - len(blocks), 0)
            yield
        finally:
            for stack, blocks in kept.items():
                setattr(transformer, stack, blocks)
            handle.remove()

    @property
    def time_embedder(self) -> Any:
        """The module that turns sinusoids of the time [B, `extra_width`] into its embedding, a linear layer first."""
        return self.transformer.time_text_embed.timestep_embedder  # type: ignore[union-attr]

    def _with_extra(self, extra: Tensor | None) -> AbstractContextManager[None]:
        """Within this block ``extra`` [B, `extra_width`] is added to the time embedder's input."""
        return added_to_time(self.time_embedder, extra)


class EmbedsGuidance(TransformerNetwork):
    """A transformer that has an embedding of the guidance scale where ``guidance_embeds`` of its config is true.

    Attributes:
        guidance_embed: the embedded guidance scale of callers that give none.
    """

    guidance_embed: float

    @property
    def accepts(self) -> frozenset[str]:
        return frozenset({"guidance_embed"} if self.config.guidance_embeds else ())

    def embedded_scale(self, t: Tensor, given: Tensor | None) -> Tensor | None:
        """The scale [B] to embed, by default `guidance_embed`; None where there is no embedding."""
        if given is None and self.config.guidance_embeds:
            return torch.full_like(t, self.guidance_embed)
        return given
