"""The types of config keys that all studies share; each says what it accepts, so that bad values
are refused before any work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Config(BaseModel):
    """A frozen config; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class IsInput:
    """Marks a key whose value names a file or folder that the run reads."""


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is expected, not true or false")
    return value


def _text(value: str) -> str:
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError("the text holds a NUL or a lone surrogate")
    return value


_NUMBER = BeforeValidator(_no_truth)
_TEXT = (Field(min_length=1, max_length=4096), AfterValidator(_text))
MOST = 2**31 - 1

Seed = Annotated[int, _NUMBER, Field(ge=0, le=MOST)]
Whole = Annotated[int, _NUMBER, Field(ge=0, le=MOST)]
Count = Annotated[int, _NUMBER, Field(ge=1, le=MOST)]
Several = Annotated[int, _NUMBER, Field(ge=2, le=MOST)]
Size = Annotated[int, _NUMBER, Field(ge=1, le=1 << 20)]
"""A dimension of a network."""
Place = Annotated[int, _NUMBER, Field(ge=-MOST, le=MOST)]
"""An index that counts from the end when it is negative."""
Positive = Annotated[float, _NUMBER, Field(gt=0, le=1e30, allow_inf_nan=False)]
Amount = Annotated[float, _NUMBER, Field(ge=0, le=1e30, allow_inf_nan=False)]
Share = Annotated[float, _NUMBER, Field(ge=1e-9, lt=1, allow_inf_nan=False)]
Probability = Annotated[float, _NUMBER, Field(ge=0, le=1, allow_inf_nan=False)]
Name = Annotated[str, *_TEXT]
Names = Annotated[
    tuple[Name, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
]
"""Names or patterns; a single one may stand without brackets."""
Input = Annotated[str, *_TEXT, IsInput()]


class StudyConfig(Config):
    """What every study's config has."""

    seed: Seed = 0

    def require(self) -> None:
        """Raise InputError for keys that do not go together; called before anything is loaded."""


def input_paths(config: BaseModel) -> list[str]:
    """Return the values of all keys that name a file or folder to read."""
    found = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            found += input_paths(value)
        elif isinstance(value, str) and _is_input(field.annotation, field.metadata):
            found.append(value)
    return found


def _is_input(annotation: Any, metadata: Any) -> bool:
    """Return whether a field, or a branch of its union, carries the mark."""
    marks = (*metadata, *getattr(annotation, "__metadata__", ()))
    return any(isinstance(mark, IsInput) for mark in marks) or any(
        _is_input(branch, ()) for branch in getattr(annotation, "__args__", ())
    )
