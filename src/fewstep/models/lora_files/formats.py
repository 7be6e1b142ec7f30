"""What the tensors of one layer of a LoRA file do to its weight, as the papers and trainers define it.

======  ============================================================================================================
form    change of W [out, in, ...], s = alpha / rank
======  ============================================================================================================
LoRA    s B A; with a core tensor M (CP-LoCon, LyCORIS) s sum_rt B_or M_rtkl A_ti                   arXiv:2106.09685
LoHa    s (A1 B1) * (A2 B2), or of two products with a core tensor                        arXiv:2108.06098, LyCORIS
LoKr    s kron(C, D), of factors that may be products, whose rank it is; s = 1 of two full ones             LyCORIS
diff    the tensor itself, which norms have too (w_norm); the same of the bias (diff_b, b_norm)             LyCORIS
======  ============================================================================================================

DoRA on top of the first three: m (W + change) / |W + change| - W (arXiv:2402.09353). The norms are over rows in peft's
files. In kohya's they are over columns, or over rows where ``dora_scale`` has the shape [out, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
"""The tensors of one layer by what they are (`fewstep.models.lora_files.keys`), without alpha."""

_LORA, _LOHA = ("down", "up"), ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_TINY = 1e-12  # a row of zeros has no direction; it stays zero


def lacking(kinds: Iterable[str]) -> str:
    """What tensors of these kinds lack to be one of the forms above, in words; empty if they are one."""
    has = set(kinds)
    found = {form: {kind for kind in has if kind in names} for form, names in _KINDS.items()}
    forms = [form for form, kinds in found.items() if kinds]
    if len(forms) > 1:
        return f"is {' and '.join(forms)} at once"
    if not forms:
        return "" if "diff_b" in has and not has & {"magnitude", "dora_scale"} else "has no weights"
    needs = {"LoRA": _LORA, "LoHa": _LOHA, "LoKr": (), "diff": ("diff",)}[forms[0]]
    twice = next((f"lokr_w{i}" for i in "12" if {f"lokr_w{i}"} < {f"lokr_w{i}", f"lokr_w{i}_a"} & has), "")
    if twice:
        return f"holds {twice} twice, whole and as a product"
    if forms == ["LoKr"]:
        needs = tuple(name for i in "12" if f"lokr_w{i}" not in has for name in (f"lokr_w{i}_a", f"lokr_w{i}_b"))
    if has & {"hada_t1", "hada_t2"}:
        needs = (*needs, "hada_t1", "hada_t2")
    return next((f"lacks its {name}" for name in needs if name not in has), "")


_KINDS = {
    "LoRA": (*_LORA, "mid", "bias"),
    "LoHa": (*_LOHA, "hada_t1", "hada_t2"),
    "LoKr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "diff": ("diff",),
}


def rank_of(tensors: Tensors) -> int | None:
    """The rank that alpha is divided by; None where the form has none."""
    name = next((k for k in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if k in tensors), None)
    return None if name is None else tensors[name].shape[0]


def low_rank(tensors: Tensors) -> tuple[Tensor, Tensor] | None:
    """(A [rank, in, ...], B [out, rank, ...]) of a layer that is a LoRA and nothing more, in float32; else None."""
    if not tensors.keys() <= {"down", "mid", "up"}:
        return None
    down, up = _float(tensors["down"]), _float(tensors["up"])
    return (down if "mid" not in tensors else _through(_float(tensors["mid"]), down)), up


def change(tensors: Tensors, scale: float, weight: Tensor) -> Tensor | None:
    """The change of ``weight`` [out, in, ...], in float32; None where only the bias changes.

    Raises:
        RuntimeError, IndexError: the tensors do not fit each other, or ``weight``.
    """
    rule = next((rule for kind, rule in _RULES.items() if kind in tensors), None)
    if rule is None:
        return None
    found = rule(tensors)
    if found.reshape(len(found), -1).shape != weight.reshape(len(weight), -1).shape:
        raise IndexError(f"a change of shape {tuple(found.shape)} does not fit a weight of {tuple(weight.shape)}")
    found = scale * found.reshape(weight.shape)
    for kind in ("magnitude", "dora_scale"):
        if kind in tensors:
            size = _float(tensors[kind])
            rows = kind == "magnitude" or len(size) == len(weight)
            return _decomposed(weight.float(), found, size, 0 if rows else 1)
    return found


def change_of_bias(tensors: Tensors, scale: float) -> Tensor | None:
    """The change of the bias [out], in float32; None where there is none."""
    parts = [scale * _float(tensors["bias"])] if "bias" in tensors else []
    parts += [_float(tensors["diff_b"])] if "diff_b" in tensors else []
    return torch.stack(parts).sum(0) if parts else None


def _decomposed(weight: Tensor, found: Tensor, size: Tensor, axis: int) -> Tensor:
    """DoRA: ``weight`` + ``found`` with norms ``size`` over all axes but ``axis``, minus ``weight``."""
    merged = weight + found
    norm = torch.linalg.vector_norm(merged.transpose(0, axis).flatten(1), dim=1)
    if size.numel() != len(norm):
        raise IndexError(f"{size.numel()} magnitudes do not fit {len(norm)} norms")
    shape = [1] * weight.ndim
    shape[axis] = len(norm)
    return merged * (size.flatten() / norm.clamp_min(_TINY)).reshape(shape) - weight


def _lora(tensors: Tensors) -> Tensor:
    down, up = _float(tensors["down"]), _float(tensors["up"])
    if "mid" in tensors:
        down = _through(_float(tensors["mid"]), down)
    return up.flatten(1) @ down.flatten(1)


def _loha(tensors: Tensors) -> Tensor:
    return _product(tensors, "hada_w1", "hada_t1") * _product(tensors, "hada_w2", "hada_t2")


def _lokr(tensors: Tensors) -> Tensor:
    one, two = _product(tensors, "lokr_w1", ""), _product(tensors, "lokr_w2", "lokr_t2")
    return torch.kron(one.reshape(*one.shape, *[1] * (two.ndim - one.ndim)), two)


def _product(tensors: Tensors, name: str, core: str) -> Tensor:
    """A factor: as it is, the product A B, or sum_rt A_ro T_rtkl B_ti with a core tensor T."""
    if name in tensors:
        return _float(tensors[name])
    one, two = _float(tensors[f"{name}_a"]), _float(tensors[f"{name}_b"])
    if core not in tensors:
        return one @ two
    return torch.einsum("rtkl,ro,ti->oikl", _float(tensors[core]), one, two).contiguous()


def _through(mid: Tensor, down: Tensor) -> Tensor:
    """A 1 x 1 convolution followed by one with a kernel, as one: [rank, in, height, width]."""
    return torch.einsum("rtkl,ti->rikl", mid, down.flatten(1))


def _float(t: Tensor) -> Tensor:
    return t.to(torch.float32)


_RULES: dict[str, Callable[[Tensors], Tensor]] = {
    "down": _lora,
    "hada_w1_a": _loha,
    "lokr_w1": _lokr,
    "lokr_w1_a": _lokr,
    "diff": lambda tensors: _float(tensors["diff"]),
}
