"""A family's latents: how the autoencoder makes and decodes them, and their sizes."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

_DOWN = 8  # pixels along a side of one latent, where there is no autoencoder to ask


class Latents:
    """What `Family` says of images, latents and tokens, by the configs of its network and autoencoder.

    Attributes:
        pipeline: with its parts as attributes. base: the network. part: that one's name.
        size: side of the images in pixels; None takes the model's own.
        usual_side: side in latents of its pipeline's default image, where no config gives the model's own.
    """

    usual_side: ClassVar[int | None] = None
    pipeline: Any
    size: int | None
    part: ClassVar[str]
    _sides: tuple[int, int] | None

    @property
    def base(self) -> Any:
        raise NotImplementedError

    @property
    def _vae_config(self) -> Any:
        return getattr(getattr(self.pipeline, "vae", None), "config", None)

    @property
    def latent_channels(self) -> int:
        return int(self.base.config.in_channels)

    @property
    def latent_scale(self) -> tuple[Any, Any]:
        """(factor, shift): latents = (encoded - shift) * factor; [1, C, 1, 1] each where channels differ."""
        config = self._vae_config
        return float(config.scaling_factor), float(getattr(config, "shift_factor", None) or 0.0)

    def per_channel(self, values: Any) -> Tensor:
        """A number for every channel, as `latent_scale` has it: [1, C, 1, 1] beside the autoencoder."""
        vae = self.pipeline.vae
        return torch.as_tensor(values, dtype=vae.dtype, device=vae.device).view(1, -1, 1, 1)

    def to_encoder(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] as the autoencoder takes them: with an axis of frames, or with alpha."""
        return images

    def from_encoder(self, encoded: Tensor) -> Tensor:
        """What the autoencoder makes of images -> latents [B, C, h, w] before `latent_scale`."""
        return encoded

    def to_decoder(self, latents: Tensor) -> Tensor:
        """The inverse of `from_encoder`: what the autoencoder decodes."""
        return latents

    def from_decoder(self, decoded: Tensor) -> Tensor:
        """The inverse of `to_encoder`: images [B, 3, H, W]."""
        return decoded

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] in [-1, 1] -> posterior (mean, standard deviation) of their latents.

        An autoencoder without a posterior (AutoencoderTiny, AutoencoderDC) has the standard deviation 0.
        """
        encoded = self.pipeline.vae.encode(self.to_encoder(images))
        if hasattr(encoded, "latent_dist"):
            mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
        else:
            mean = encoded.latents if hasattr(encoded, "latents") else encoded.latent
            std = torch.zeros_like(mean)
        factor, shift = self.latent_scale
        return (self.from_encoder(mean) - shift) * factor, self.from_encoder(std) * factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> images [B, 3, H, W], from -1 to 1 but not clamped, with a graph to the latents."""
        factor, shift = self.latent_scale
        decoded: Tensor = self.pipeline.vae.decode(self.to_decoder(latents / factor + shift), return_dict=False)[0]
        return self.from_decoder(decoded)

    def output_latents(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] in the form that the pipeline returns for ``output_type="latent"``."""
        return latents

    @property
    def patch(self) -> int:
        """Side in latents of the square that is one token."""
        return int(self.base.config.patch_size)

    @property
    def down(self) -> int:
        """Side in pixels of one latent."""
        config = self._vae_config
        return _DOWN if config is None else int(2 ** (len(config.block_out_channels) - 1))

    def own_size(self) -> tuple[int, int]:
        """(height, width) in latents of the images that the model was trained on."""
        size = self.usual_side or self.base.config.sample_size
        if size is None:
            raise ValueError(
                f"The {self.part} of this model has no sample_size in its config: write it there, or give teacher.size."
            )
        height, width = (size, size) if isinstance(size, int) else size
        return height, width

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of the latents; of video (channels, frames, height, width).

        Raises:
            ValueError: neither the network's config nor ``size`` gives the height and width.
        """
        own = self._sides or (self.own_size() if self.size is None else (self.size // self.down,) * 2)
        return self.latent_channels, *own

    def at(self, height: int, width: int) -> Self:
        """The same family for images of ``height`` x ``width`` pixels.

        Raises:
            ValueError: the network has no such size.
        """
        step, found = self.side_step, copy.copy(self)
        if height % step or width % step or not height or not width:
            raise ValueError(
                f"height and width must be multiples of {step} pixels for this model, not {height} and {width}."
            )
        found._sides = (height // self.down, width // self.down)
        return found

    @property
    def side_step(self) -> int:
        """The sides of images must be multiples of so many pixels."""
        return self.down * self.patch

    @property
    def multiple(self) -> int:
        """The sides of images should be multiples of so many pixels."""
        return self.side_step

    @property
    def smallest(self) -> int:
        """A side in latents that is enough to try the network."""
        return 2 * self.patch

    @property
    def tokens(self) -> int:
        """Image tokens of one image."""
        height, width = self.latent_shape[-2:]
        return (height // self.patch) * (width // self.patch)
