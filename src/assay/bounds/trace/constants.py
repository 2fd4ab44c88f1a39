"""Arithmetic on constants that is exact, so that its result is a constant again."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay.bounds.trace.lower import Constant

_CREATED = {
    *("arange", "zeros", "ones", "full", "scalar_tensor", "new_zeros", "new_ones", "new_full"),
    *("zeros_like", "ones_like", "full_like", "eye", "triu_indices", "tril_indices"),
}
_MOVED = {
    *("view", "_unsafe_view", "reshape", "transpose", "t", "permute", "expand", "clone", "detach"),
    *("unsqueeze", "squeeze", "split", "split_with_sizes", "select", "slice", "alias", "cat"),
    *("stack", "index", "gather", "index_select", "embedding", "flip", "roll", "repeat", "unbind"),
    *("lift_fresh_copy", "where", "masked_fill", "tril", "triu", "diagonal", "neg", "abs", "relu"),
    *("maximum", "minimum", "amax", "amin", "clamp", "clamp_min", "clamp_max", "constant_pad_nd"),
    *("unfold", "max", "min", "contiguous"),
}
_DECIDED = {
    *("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not", "isnan"),
    *("bitwise_and", "bitwise_or", "bitwise_not", "any", "all", "isin", "isinf"),
}
_SUMS = {"add", "sub", "rsub", "mul"}


def fold(target: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Return the result of an operation on constants where it is exact, else None.

    Integers, booleans, comparisons, moved entries and creations are exact; sums and products of
    floats where float64 does not round them."""
    name = target._schema.name.partition("::")[2]
    plain_args, plain_kwargs = _plain(args), {key: _plain(entry) for key, entry in kwargs.items()}
    if name == "_to_copy":
        return _copied(plain_args[0], plain_kwargs.get("dtype"))
    tensors = [x for x in _flat(plain_args) if isinstance(x, Tensor)]
    floats = any(x.dtype.is_floating_point for x in tensors)
    if floats and name in _SUMS:
        return _exact_sum(name, plain_args, plain_kwargs)
    if name in _CREATED | _MOVED | _DECIDED or not (floats or name in ("div", "mean")):
        return target(*plain_args, **plain_kwargs)
    return None


def _copied(x: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    if dtype is None or dtype == x.dtype:
        return x.clone()
    found = x.to(dtype)
    # The real formula has no rounding to a narrower format: the exact numbers go on.
    if dtype.is_floating_point and not torch.equal(found.double(), x.double()):
        return x.double()
    return found


def _exact_sum(name: str, args: list[Any], kwargs: dict[str, Any]) -> Tensor | None:
    first, second = (
        np.asarray(x.double().numpy() if isinstance(x, Tensor) else float(x)) for x in args[:2]
    )
    alpha = float(kwargs.get("alpha", args[2] if len(args) > 2 else 1))
    if name == "mul":
        if not (_narrow(first) and _narrow(second)):
            return None
        return torch.from_numpy(np.asarray(first * second))
    if abs(alpha) != 1:
        return None
    if name == "rsub":
        first, second = second, first
    sign = -alpha if name in ("sub", "rsub") else alpha
    with np.errstate(all="ignore"):
        second = sign * second
        total = first + second
        part = total - first
        error = (first - (total - part)) + (second - part)
    return torch.from_numpy(np.asarray(total)) if np.all(error == 0) else None


def _narrow(x: np.ndarray) -> bool:
    """Return whether every entry has at most 26 bits, so that products of two are exact."""
    fractions, exponents = np.frexp(x)
    scaled = fractions * 2.0**26
    inside = bool(np.all(np.isfinite(x))) and bool(np.all(np.abs(exponents) < 500))
    return inside and bool(np.all(scaled == np.floor(scaled)))


def _plain(x: Any) -> Any:
    if isinstance(x, Constant):
        return x.tensor
    if isinstance(x, list | tuple):
        return type(x)(_plain(entry) for entry in x)
    return x


def _flat(x: Any) -> list[Any]:
    if isinstance(x, list | tuple):
        return [leaf for entry in x for leaf in _flat(entry)]
    return [x]
