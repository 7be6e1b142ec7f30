"""The distance of two images through a frozen encoder: instance feedback, perceptual feedback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.diffusion.schedule import working
from fewstep.methods.parts.distances import feature_distance
from fewstep.models.helpers import Encoder


def perceptual_loss(encoder: Encoder, images: Tensor, data: Tensor) -> Tensor:
    """How far what ``encoder`` finds in images is from what it finds in data, [B, 3, H, W] both from -1 to 1.

    It is 0 where nothing differs. An encoder that detects the things in an image (``instances``) is asked for them; of
    others, features at all of their taps are compared.
    """
    detect: Any = getattr(encoder, "instances", None)
    if detect is not None:
        with torch.no_grad():
            wanted = detect(data)
        return instance_loss(detect(images), wanted)
    taps = tuple(encoder.tap_channels)
    with torch.no_grad():
        features = encoder.features(data, taps)
    return feature_distance(encoder.features(images, taps), features)


def instance_loss(pred: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Tensor:
    """A detector's predictions on images against those on data, mean over the batch: Hyper-SD's instance feedback (its
    sec. 3.3) with the detector's own reading of the data in the place of people's annotations.

    Predictions are those of `fewstep.models.detector.DetectorNetwork`: ``near`` [B, n, n], ``geometry`` [B, n, n, 3],
    attributes [B, n, n, values], logits all but the geometry. Cells count by how surely there is a thing in the data,
    whose mass in an image is 1; divergences of ``near`` are summed over cells and divided by that mass before it is
    made 1.
    """
    target = working(wanted["near"]).sigmoid()
    mass = target.sum(dim=(1, 2)).clamp_min(1e-6)
    weight = target / mass[:, None, None]
    entropy = F.binary_cross_entropy(target, target, reduction="none")
    near = F.binary_cross_entropy_with_logits(working(pred["near"]), target, reduction="none") - entropy
    offset = F.smooth_l1_loss(working(pred["geometry"]), working(wanted["geometry"]), reduction="none").sum(-1)
    each = near.sum(dim=(1, 2)) / mass + (weight * offset).sum(dim=(1, 2))
    for name in pred.keys() - {"near", "geometry"}:
        log, log_wanted = (working(side[name]).log_softmax(dim=-1) for side in (pred, wanted))
        divergence = F.kl_div(log, log_wanted, reduction="none", log_target=True).sum(-1)
        each = each + (weight * divergence).sum(dim=(1, 2))
    return each.mean()
