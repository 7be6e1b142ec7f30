"""Settings of a method: a frozen dataclass whose values pydantic checks; its errors as sentences."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, dataclass_transform

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic.dataclasses import dataclass

from fewstep.methods.guidance import Guidance, off_is_one

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def checked(cls: type[T]) -> type[T]:
    """A frozen dataclass that converts and checks its fields by their annotations, and knows no others.

    Rules between fields stand in its ``__post_init__``. A wrong value is a ValueError of one sentence.
    """
    made: type[Any] = dataclass(frozen=True, config=ConfigDict(extra="forbid"))(cls)
    names, check = [field.name for field in fields(made)], made.__init__

    def init(self: Any, *values: Any, **named: Any) -> None:
        try:
            check(self, **dict(zip(names, values, strict=False)), **named)
        except ValidationError as error:
            raise ValueError(explain(error)) from None

    made.__init__ = init
    return made


def explain(error: ValidationError, prefix: str = "") -> str:
    """The first thing that is wrong, as a sentence; ``prefix`` is where the settings stand, as in "method"."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return message
    where = ".".join(str(part) for part in (*([prefix] if prefix else []), *first["loc"]))
    return f"{where}: {message[0].lower()}{message[1:]}, not {first['input']!r:.80}."


def _scale(value: Any, convert: ValidatorFunctionWrapHandler) -> float | tuple[float, float]:
    try:
        scale: float | tuple[float, float] = convert(value)
    except ValidationError:
        raise ValueError(f"guidance_scale must be one number or [low, high], not {value!r:.80}.") from None
    guidance = Guidance.of(scale)
    return guidance.low if guidance.fixed else scale


Weight: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""The weight of a loss term, or a standard deviation: finite and at least 0."""
Share: TypeAlias = Annotated[float, Field(gt=0, lt=1)]
ShareOrNone: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
"""A share, or 0 for none of it."""
LARGEST = 2**31 - 1
"""Of all whole numbers in settings: larger ones overflow somewhere in the libraries."""
Count: TypeAlias = Annotated[int, Field(ge=1, le=LARGEST)]
CountOrNone: TypeAlias = Annotated[int, Field(ge=0, le=LARGEST)]
"""A number of steps, or 0 for none."""
GuidanceScale: TypeAlias = Annotated[float | tuple[float, float], WrapValidator(_scale)]
"""The teacher's w (1 or 0: off): one number, or [low, high] drawn per sample (`Guidance`)."""
FixedGuidance: TypeAlias = Annotated[Weight, AfterValidator(off_is_one)]
"""The teacher's w (1 or 0: off), one number."""
Halvings: TypeAlias = Annotated[int, Field(ge=0, le=30)]
"""Convolutions of stride 2 in a discriminator's head, whose map must come down to 4x4."""
Held: TypeAlias = Literal["full", "lora"]
"""How the weights of a discriminator's backbone are held."""
