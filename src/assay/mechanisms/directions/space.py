"""Which parameters a direction moves, and how a flat vector maps to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import Tensor, nn

from assay.errors import InputError, unknown
from assay.io.files import require_finite


@dataclass(frozen=True)
class Space:
    """An ordered choice of parameters; a direction is a vector of length `size`, the
    concatenation of their entries.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        return sum(prod(shape) for shape in self.shapes)

    def slices(self) -> dict[str, slice]:
        """Return where each parameter lies in the flat vector."""
        found, start = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            found[name] = slice(start, start + prod(shape))
            start += prod(shape)
        return found

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Turn `(..., size)` into one `(..., *shape)` per parameter (views)."""
        parts = flat.split([prod(shape) for shape in self.shapes], dim=-1)
        return {
            name: part.unflatten(-1, shape) if shape else part[..., 0]
            for name, shape, part in zip(self.names, self.shapes, parts, strict=True)
        }

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Turn one `(..., *shape)` per parameter into `(..., size)`; the inverse of `split`."""
        pieces = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            tensor = tensors[name]
            pieces.append(tensor.reshape(*tensor.shape[: tensor.ndim - len(shape)], prod(shape)))
        return torch.cat(pieces, dim=-1)


def choose(model: nn.Module, patterns: str | Sequence[str] = "*") -> Space:
    """Choose the parameters whose dotted names match any of the shell patterns
    (`transformer.h.0.attn.*`); a shared parameter is chosen once, by any of its names.

    Raises InputError when a pattern matches nothing, or when a parameter of the model holds NaN or
    infinity."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    parameters = dict(model.named_parameters())
    if not parameters:
        raise InputError("the model has no parameters, so there is no direction to look for")
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for known in names.values() for name in known):
            raise unknown("parameter pattern", pattern, parameters)
    for name, parameter in parameters.items():
        require_finite(parameter.detach(), f"parameter {name!r}")
    chosen = [
        name
        for name, parameter in parameters.items()
        if any(fnmatchcase(known, p) for known in names[id(parameter)] for p in patterns)
    ]
    return Space(tuple(chosen), tuple(tuple(parameters[name].shape) for name in chosen))
