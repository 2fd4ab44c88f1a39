"""Numbers of any origin as float64: exactly, or rounded outward, and never rounded in silence.

A bound speaks of the numbers that were given. Whatever float64 cannot hold (a long double, a large
integer, a fraction) is refused where it stands for itself, and rounded outward where it is the end
of an interval. What arrives as a tensor is copied, since training changes tensors in place."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from assay.errors import InputError

Array = NDArray[np.float64]

_WHOLE = 2.0**53  # float64 holds every integer up to here


def as_array(what: str, x: Any, *, copy: bool = False) -> Array:
    """Return real numbers of any precision as finite float64, exactly equal to what was given.

    x: a tensor, an array or nested lists. copy: share no memory with x. Raises `InputError` naming
    what it is for complex numbers, text, NaN, infinities, and numbers that float64 cannot hold."""
    values = exactly(x, what)
    if not np.all(np.isfinite(values)):
        raise InputError(f"{what} has NaN or infinite entries")
    return values.copy() if copy else values


def constant(what: str, x: Any) -> Array:
    """Return `as_array(x)` as a copy that cannot be written to: what an operation is made of."""
    values = as_array(what, x, copy=True)
    values.flags.writeable = False
    return values


def exactly(x: Any, what: str = "a bound") -> Array:
    """Return numbers of any precision as float64 of the same value; NaN and infinities pass.

    Raises `InputError` for what is no real number, or no float64."""
    if is_float64(x) or type(x) is float:
        return cast(Array, np.asanyarray(x))
    given = _given(what, x)
    nearest = _nearest(what, given)
    if np.any(_inexact(given, nearest)):
        raise InputError(f"{what} has entries that float64 cannot hold; round them first")
    return nearest


def outward(x: Any, direction: float, what: str = "an interval") -> Array:
    """Return float64 numbers on the given side of x: at or below it (direction -inf), or at or
    above it (inf).
    """
    if is_float64(x):
        return cast(Array, np.asanyarray(x))
    given = _given(what, x)
    nearest = _nearest(what, given)
    return cast(
        Array, np.where(_inexact(given, nearest), np.nextafter(nearest, direction), nearest)
    )


def is_float64(x: Any) -> bool:
    """Return whether x is a numpy array or scalar of native float64, whose operators work entry
    by entry (those of a matrix do not, and a masked array hides entries).
    """
    plain = isinstance(x, np.ndarray | np.float64) and x.dtype == np.float64
    return plain and not isinstance(x, np.matrix | np.ma.MaskedArray)


def _given(what: str, x: Any) -> NDArray[Any]:
    """Return x as an array of booleans, integers, floats or Python numbers."""
    try:
        values = _of_tensor(x) if hasattr(x, "detach") else np.asarray(x)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{what}: numbers are needed, got {type(x).__name__}") from error
    if np.ma.isMaskedArray(x) or values.dtype.kind not in "biufO":
        kind = "a masked array" if np.ma.isMaskedArray(x) else values.dtype
        raise InputError(f"{what}: real numbers are needed, got {kind}")
    return values


def _of_tensor(x: Any) -> NDArray[Any]:
    plain = x.detach().cpu().resolve_conj().resolve_neg()
    # numpy has no bfloat16 and no eight-bit floats; float64 holds them all.
    plain = plain.double() if plain.is_floating_point() else plain
    return np.array(plain.numpy(), copy=True)


def _nearest(what: str, given: NDArray[Any]) -> Array:
    """Return the nearest float64 numbers, infinities for what is beyond them."""
    if given.dtype.kind != "O":
        with np.errstate(over="ignore"):
            return np.asarray(given, np.float64)
    try:
        return np.array([_float(v) for v in given.flat], np.float64).reshape(given.shape)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what}: numbers are needed, got {error}") from error


def _float(value: Any) -> float:
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise TypeError(type(value).__name__)
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def _inexact(given: NDArray[Any], nearest: Array) -> NDArray[np.bool_]:
    """Return where the nearest float64 is not the number itself."""
    if given.dtype.kind in "iu":
        doubtful = np.abs(nearest) >= _WHOLE
    elif given.dtype.kind == "f" and given.dtype.itemsize > 8:
        return np.asarray((nearest != given) & ~np.isnan(nearest))
    elif given.dtype.kind == "O":
        doubtful = np.ones(given.shape, bool)
    else:
        return np.zeros(given.shape, bool)
    wrong = np.zeros(given.shape, bool)
    for place in map(tuple, np.argwhere(doubtful)):
        wrong[place] = not _same(given[place], float(nearest[place]))
    return wrong


def _same(value: Any, nearest: float) -> bool:
    exact = value.item() if isinstance(value, np.generic) else value
    if np.isnan(nearest) or (isinstance(exact, float) and np.isinf(exact)):
        return True
    try:
        return bool(np.isfinite(nearest)) and Fraction(exact) == Fraction(nearest)
    except (TypeError, ValueError):
        return False
