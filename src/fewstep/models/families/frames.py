"""Autoencoders of video, which take an image as one frame and normalise every channel by a mean and a deviation."""

from __future__ import annotations

from torch import Tensor

from fewstep.models.families.latents import Latents


class OneFrame(Latents):
    """`Latents` of Qwen-Image's autoencoder, for families to inherit from before `Family`.

    Latents are (encoded - ``latents_mean``) / ``latents_std``, [B, C, h, w] without the axis of frames. What it decodes
    is clamped to [-1, 1]: a loss on pixels has no gradient beyond.
    """

    @property
    def latent_scale(self) -> tuple[Tensor, Tensor]:
        config = self._vae_config
        return self.per_channel([1 / std for std in config.latents_std]), self.per_channel(config.latents_mean)

    @property
    def down(self) -> int:
        config = self._vae_config
        return super().down if config is None else int(2 ** len(config.temperal_downsample))

    def to_encoder(self, images: Tensor) -> Tensor:
        return images.unsqueeze(2)

    def from_encoder(self, encoded: Tensor) -> Tensor:
        return encoded[:, :, 0]

    def to_decoder(self, latents: Tensor) -> Tensor:
        return latents.unsqueeze(2)

    def from_decoder(self, decoded: Tensor) -> Tensor:
        return decoded[:, :, 0]
