"""One layer of a LoRA file with its place in a network."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fewstep.models.lora_files.formats import change, change_of_bias, low_rank
from fewstep.models.lora_files.keys import Key
from fewstep.models.lora_files.original import Place
from fewstep.models.quantize import whole_shape


@dataclass
class Layer:
    """One layer of a file.

    Attributes:
        part, place: the part of the pipeline, and its layer or layers.
        keys: what each tensor is -> its name in the file.
        tensors: what each tensor is -> the tensor, without alpha.
        scale: alpha / rank.
    """

    part: str
    place: Place
    keys: dict[str, Key] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    scale: float = 1.0

    @property
    def key(self) -> str:
        """The name in the file of one of its tensors, to call it by."""
        return min(key.name for kind, key in self.keys.items() if kind != "alpha" or len(self.keys) == 1)

    def has(self, network: nn.Module, kind: str) -> bool:
        """Whether all of its layers have a parameter ``kind`` (``weight`` or ``bias``)."""
        return all(getattr(network.get_submodule(name), kind, None) is not None for name in self.place.layers)

    def shape(self, network: nn.Module) -> tuple[int, ...]:
        """Shape of the weight that it changes, all of its rows."""
        rows = [whole_shape(self._weight(network, name)) for name in self.place.layers]
        return (sum(row[0] for row in rows), *rows[0][1:])

    def change(self, weight: Tensor) -> dict[str, Tensor]:
        """The changes of ``weight`` and of the bias, rows in the file's order, where there are such.

        Raises:
            RuntimeError, IndexError: the tensors do not fit each other, or ``weight``.
        """
        tensors = {kind: t.to(weight.device) for kind, t in self.tensors.items()}
        found = {"weight": change(tensors, self.scale, weight), "bias": change_of_bias(tensors, self.scale)}
        return {kind: t for kind, t in found.items() if t is not None}

    @torch.no_grad()
    def add_to(self, network: nn.Module, scale: float) -> None:
        """Add ``scale`` times the whole change to the network's parameters, in place."""
        weights = [self._weight(network, name).detach() for name in self.place.layers]
        for kind, found in self.change(self._ordered(torch.cat(weights))).items():
            pieces = self._ordered(found).split([len(w) for w in weights])
            for name, piece in zip(self.place.layers, pieces, strict=True):
                parameter = getattr(network.get_submodule(name), kind)
                parameter += (scale * piece).to(parameter)

    def pairs(self, network: nn.Module) -> dict[str, Tensor] | None:
        """``<layer>.lora_A.weight`` and ``.lora_B.weight`` of its layers, the scale in B; None if there is more.

        A is [rank, *the weight's own inputs and kernel], however the file has it: a 1 x 1 convolution as a matrix, too.
        """
        pair = low_rank(self.tensors)
        if pair is None:
            return None
        inputs = self.shape(network)[1:] or (1,)  # a norm has none
        down = pair[0].reshape(-1, *inputs)
        up = self._ordered(self.scale * pair[1].reshape(-1, len(down), *[1] * (len(inputs) - 1)))
        sizes = [whole_shape(self._weight(network, name))[0] for name in self.place.layers]
        found: dict[str, Tensor] = {}
        for name, rows in zip(self.place.layers, up.split(sizes), strict=True):
            found |= {f"{name}.lora_A.weight": down.clone(), f"{name}.lora_B.weight": rows.clone()}
        return found

    def _ordered(self, rows: Tensor) -> Tensor:
        """Rows in the file's order as the network's, or the other way round: two swapped halves, or as they are."""
        return torch.cat(rows.chunk(2)[::-1]) if self.place.swapped else rows

    @staticmethod
    def _weight(network: nn.Module, name: str) -> Tensor:
        weight: Tensor = network.get_submodule(name).weight  # type: ignore[assignment]
        return weight
