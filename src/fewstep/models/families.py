"""Teachers through diffusers: a pipeline becomes a Denoiser plus what turns prompts and pictures into tensors.

diffusers and transformers are imported inside functions: `fewstep --help` must not wait for them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewstep.diffusion.schedule import Schedule, working
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser, check_taps
from fewstep.models.encoders import open_encoder
from fewstep.models.helpers import Helpers, pooled_prompt
from fewstep.models.sharding import is_spread

# The layers that LCM-LoRA adapts in a UNet (latent-consistency LoRA report; 788 layers of SDXL).
UNET_LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


class UNetNetwork(nn.Module):
    """A diffusers UNet2DConditionModel in the network contract; cond holds ``prompt_embeds`` [B, tokens, width].

    ``time_scale`` takes native times to the UNet's own: 1 for table indices, 1,000 for flow's [0, 1].
    """

    lora_targets = UNET_LORA_TARGETS

    def __init__(self, unet: nn.Module, time_scale: float = 1.0) -> None:
        super().__init__()
        self.unet, self.time_scale = unet, time_scale

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @property
    def extra_width(self) -> int:
        """Width of the vector that extra inputs add to the time embedding's input."""
        return int(self.unet.config.block_out_channels[0])  # type: ignore[union-attr,index]

    @property
    def tap_channels(self) -> dict[str, int]:
        """What a discriminator can look at: the output of every down block and of the middle, with its channels."""
        widths: Any = self.unet.config.block_out_channels  # type: ignore[union-attr]
        return {**{f"down{i}": int(c) for i, c in enumerate(widths)}, "mid": int(widths[-1])}

    def features(self, x: Tensor, t: Tensor, cond: Cond | None, taps: Iterable[str]) -> list[Tensor]:
        """Activations [B, C, h, w] at the taps, in their order; the UNet is left at the last of them.

        Spread over processes it runs to its end: all of them must meet at its last layers, too.

        Raises:
            ValueError: for a tap that is not there.
        """
        wanted = check_taps(taps, self.tap_channels)
        blocks: dict[str, nn.Module] = {f"down{i}": b for i, b in enumerate(self.unet.down_blocks)}  # type: ignore[arg-type]
        blocks["mid"] = self.unet.mid_block  # type: ignore[assignment]
        last = None if is_spread(self) else max(wanted, key=list(blocks).index)
        found: dict[str, Tensor] = {}
        with _watched({tap: blocks[tap] for tap in wanted}, found, last):
            self(x, t, cond)
        return [found[tap] for tap in wanted]

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None, *, extra: Tensor | None = None) -> Tensor:
        if cond is None:
            raise ValueError("This teacher needs a text condition (prompt_embeds).")
        if extra is not None and self.unet.time_embedding.cond_proj is None:  # type: ignore[union-attr]
            # diffusers adds cond_proj(timestep_cond) to the time embedding; ours arrives projected.
            self.unet.time_embedding.cond_proj = _AsGiven()  # type: ignore[union-attr]
        if self.time_scale != 1:
            t = t * self.time_scale
        embeds = cond["prompt_embeds"].to(x.dtype)
        output = self.unet(x, t, encoder_hidden_states=embeds, timestep_cond=extra, return_dict=False)
        return cast(Tensor, output[0])


class _Seen(Exception):
    """Everything that was wanted of a network has been seen."""


@contextmanager
def _watched(blocks: dict[str, nn.Module], found: dict[str, Tensor], last: str | None) -> Iterator[None]:
    """Within this block the outputs of ``blocks`` land in ``found``; the forward is left after ``last``, if any.

    Watching the UNet's own forward serves every kind of condition and embedding that it knows.
    """

    def watcher(tap: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            found[tap] = output[0] if isinstance(output, tuple) else output  # down blocks give their skips too
            if tap == last:
                raise _Seen

        return look

    handles = [block.register_forward_hook(watcher(tap)) for tap, block in blocks.items()]
    try:
        yield
    except _Seen:
        pass
    finally:
        for handle in handles:
            handle.remove()


class _AsGiven(nn.Module):
    """Stands where diffusers would project timestep_cond."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@dataclass
class Teacher:
    """A text-to-image teacher.

    Attributes:
        denoiser: the network with its schedule and prediction kind; frozen.
        pipeline: the diffusers pipeline it came from.
        name: where it was loaded from.
        origin: the model whose VAE and text encoders these are; differs from ``name`` when it is somebody's student.
    """

    denoiser: Denoiser
    pipeline: Any
    name: str
    origin: str = ""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the latents at the model's own size."""
        config = self.pipeline.unet.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, height, width

    @property
    def image_size(self) -> int:
        """Side of the pictures in pixels, at the model's own size."""
        return int(self.latent_shape[1] * 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1))

    @property
    def latent_scale(self) -> tuple[float, float]:
        """(factor, shift): latents = (encoded - shift) * factor."""
        config = self.pipeline.vae.config
        return float(config.scaling_factor), float(getattr(config, "shift_factor", None) or 0.0)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], batch_size: int = 64) -> Cond:
        """prompt_embeds [B, tokens, width], with the encoded empty prompt as the null condition."""
        pieces = [self._embed(list(prompts[i : i + batch_size])) for i in range(0, len(prompts), batch_size)]
        return Cond({"prompt_embeds": torch.cat(pieces)}, null={"prompt_embeds": self._embed([""])})

    def _embed(self, prompts: list[str]) -> Tensor:
        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        tokens = tokenizer(
            prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        return cast(Tensor, encoder(tokens.input_ids.to(encoder.device))[0])

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] in [-1, 1] -> posterior (mean, standard deviation) of the scaled latents."""
        vae = self.pipeline.vae
        posterior = vae.encode(images.to(vae.device, vae.dtype)).latent_dist
        factor, shift = self.latent_scale
        return (posterior.mean - shift) * factor, posterior.std * factor

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 32) -> Tensor:
        """Scaled latents [B, C, h, w] -> images [B, 3, H, W] in [0, 1], float32."""
        pieces = [self.pictures(part) for part in latents.split(batch_size)]
        return (torch.cat(pieces).float() / 2 + 0.5).clamp(0, 1)

    def pictures(self, latents: Tensor) -> Tensor:
        """As `decode`, but with a graph to the latents, from -1 to 1 and not clamped: for losses."""
        vae = self.pipeline.vae
        factor, shift = self.latent_scale
        x = vae.decode(latents.to(vae.device, vae.dtype) / factor + shift, return_dict=False)[0]
        return cast(Tensor, x.to(working(latents).dtype))

    def helpers(self, encoder: str = "", gradient_checkpointing: bool = False) -> Helpers:
        """What losses look through (`Helpers`), with the encoder of that name (`open_encoder`) if any.

        Args:
            gradient_checkpointing: decode picture by picture, and once more in the backward, for memory.

        Raises:
            ValueError: there is no such encoder.
        """
        vae, text_encoder = self.pipeline.vae, self.pipeline.text_encoder
        seen = open_encoder(encoder, str(vae.device)) if encoder else None
        behind = [vae, *([seen.network] if seen is not None else [])]
        decode = self._one_by_one if gradient_checkpointing else self.pictures
        return Helpers(decode, seen, pooled_prompt, int(text_encoder.config.hidden_size), tuple(behind))

    def _one_by_one(self, latents: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and latents.requires_grad):
            return torch.cat([self.pictures(part) for part in latents.split(1)])
        return torch.cat([checkpoint(self.pictures, part, use_reentrant=False) for part in latents.split(1)])


def load_teacher(
    name: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", loras: Sequence[str] = ()
) -> Teacher:
    """A teacher from ``scenes-64`` (shipped), a diffusers folder, or a hub name.

    Args:
        loras: LoRA files or hub names that become part of it, by diffusers' own loader.

    Raises:
        ValueError: one sentence when there is no such model or its family is not supported yet.
    """
    from diffusers import DiffusionPipeline

    source = str(shipped(name) or name)
    if not Path(source).is_dir() and (source.startswith((".", "/", "~")) or source.count("/") != 1):
        raise ValueError(f"There is no teacher '{name}': give scenes-64, a diffusers folder, or a hub name.")
    if Path(source).is_dir() and not (Path(source) / "model_index.json").is_file():
        raise ValueError(f"The folder {name} holds no diffusers pipeline (model_index.json is missing).")
    try:
        with _quiet():
            pipeline = DiffusionPipeline.from_pretrained(source, torch_dtype=dtype, use_safetensors=True)
    except Exception as error:  # three libraries read these files, each with errors of its own
        raise ValueError(f"The teacher '{name}' cannot be loaded: {first_sentence(error)}") from error
    for lora in loras:
        _fuse(pipeline, lora)
    teacher = as_teacher(pipeline.to(device), "+".join([name, *loras]))
    try:
        _try(teacher)
    except Exception as error:
        raise ValueError(f"The teacher '{name}' is loaded but does not work: {first_sentence(error)}") from error
    return teacher


@torch.no_grad()
def _try(teacher: Teacher) -> None:
    """Ask every part once, at a small size: configs can be wrong in ways that only show when they are used."""
    config = teacher.pipeline.unet.config
    side = min(teacher.latent_shape[1], 2 ** len(config.block_out_channels))
    like = next(teacher.pipeline.unet.parameters())
    x = torch.zeros(1, teacher.latent_shape[0], side, side, device=like.device, dtype=like.dtype)
    teacher.denoiser.network(x, torch.full((1,), 1.0, device=like.device), teacher.encode_prompts(["a"]))
    teacher.decode(x)


def _fuse(pipeline: Any, lora: str) -> None:
    """Merge a LoRA into the pipeline's weights."""
    before = _weight_sum(pipeline.unet)
    try:
        with _quiet():
            pipeline.load_lora_weights(lora, use_safetensors=True)
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
    except Exception as error:
        raise ValueError(f"The teacher's LoRA '{lora}' cannot be loaded: {first_sentence(error)}") from error
    if _weight_sum(pipeline.unet) == before:
        raise ValueError(f"The teacher's LoRA '{lora}' changes nothing in this teacher: it is of another model.")


def _weight_sum(network: nn.Module) -> float:
    return sum(float(p.detach().double().sum()) for p in network.parameters())


def as_teacher(pipeline: Any, name: str = "pipeline") -> Teacher:
    """A `Teacher` around a loaded diffusers pipeline; its parts are frozen and set to eval.

    Raises:
        ValueError: for families other than Stable Diffusion 1/2 style UNets.
    """
    if not hasattr(pipeline, "unet") or hasattr(pipeline, "text_encoder_2"):
        raise ValueError(
            f"{type(pipeline).__name__} is not supported as a teacher yet: use a Stable Diffusion 1.x or 2.x pipeline."
        )
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.eval().requires_grad_(False)
    schedule = Schedule.from_diffusers(pipeline.scheduler)
    if schedule.family == "edm":
        raise ValueError(
            "Pipelines with an EDM scheduler are not supported as teachers yet: wrap the network in edm_precondition."
        )
    flow = schedule.family == "flow"
    kind = "flow" if flow else pipeline.scheduler.config.get("prediction_type", "epsilon")
    network = UNetNetwork(pipeline.unet, schedule.num_train_timesteps if flow else 1.0)
    return Teacher(Denoiser(network, schedule, kind), pipeline, name, name)


def shipped(name: str) -> Path | None:
    """The folder of a model that comes with the package, or None."""
    folder = Path(__file__).parent.parent / "assets" / name
    return folder if name and "/" not in name and ".." not in name and folder.is_dir() else None


def first_sentence(error: BaseException) -> str:
    """The first line of an error's text, at most 200 characters."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]


@contextmanager
def _quiet() -> Any:
    """Loading without diffusers' and transformers' remarks about missing extras."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers_logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])
