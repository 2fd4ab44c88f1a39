"""Operation counts: a verifier is replayed on arrays that count what is done to them.

Elementwise operations cost one per output, a reduction n - 1 per output, a matrix product m n (2k -
1), a sort n - 1 per row (what verifying the order costs), a look-up in n ordered numbers ceil(log2
n), a singular value decomposition what verifying U S V^T costs. Moving, selecting and reshaping
data is free."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np

Entries = TypeVar("Entries")
_total = [0]


class Counted(np.ndarray[Any, Any]):
    """A float array that adds what is done to it to the running count."""

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        plain = [_plain(x) for x in inputs]
        if "out" in kwargs:
            kwargs["out"] = tuple(_plain(x) for x in kwargs["out"])
        result = getattr(ufunc, method)(*plain, **kwargs)
        _total[0] += _cost(ufunc, method, plain, result, kwargs)
        return _counted(result)

    def __array_function__(
        self, function: Callable[..., Any], types: Any, args: Any, kwargs: Any
    ) -> Any:
        if function in (np.sort, np.argsort):
            plain = _plain(args[0])
            axis = kwargs.get("axis", args[1] if len(args) > 1 else -1)
            _total[0] += plain.size // max(plain.shape[axis], 1) * max(plain.shape[axis] - 1, 0)
            return _counted(function(plain, *args[1:], **kwargs))
        if function is np.searchsorted:
            plain = [_plain(x) for x in args]
            result = function(*plain, **kwargs)
            _total[0] += np.size(result) * math.ceil(math.log2(max(len(plain[0]), 2)))
            return result
        if function is np.linalg.svd:
            rows, columns = _plain(args[0]).shape
            rank = min(rows, columns)
            _total[0] += rows * rank + rows * columns * (2 * rank - 1)
            return function(_plain(args[0]), **kwargs)
        result = super().__array_function__(function, types, args, kwargs)
        return (
            [_counted(part) for part in result]
            if isinstance(result, list | tuple)
            else _counted(result)
        )


def counting(x: np.ndarray[Any, Any]) -> Counted:
    """Return an array that counts."""
    return np.asarray(x).view(Counted)


def counting_fields(entries: Entries) -> Entries:
    """Return a dataclass of arrays as one of arrays that count."""
    counted = {
        field.name: counting(getattr(entries, field.name))
        for field in fields(entries)  # type: ignore[arg-type]
    }
    return replace(entries, **counted)  # type: ignore[type-var]


def charge(operations: int) -> None:
    """Add operations that were done on arrays that do not count."""
    _total[0] += operations


def count(work: Callable[[], Any]) -> int:
    """Return the operations that `work` does on counting arrays."""
    before = _total[0]
    with np.errstate(all="ignore"):
        work()
    return _total[0] - before


def _plain(x: Any) -> Any:
    return x.view(np.ndarray) if isinstance(x, Counted) else x


def _counted(x: Any) -> Any:
    return (
        x.view(Counted)
        if isinstance(x, np.ndarray) and x.dtype.kind == "f" and not isinstance(x, Counted)
        else x
    )


def _cost(
    ufunc: np.ufunc, method: str, inputs: list[Any], result: Any, kwargs: dict[str, Any]
) -> int:
    if ufunc is np.matmul:
        return int(np.size(result)) * (2 * int(np.shape(inputs[0])[-1]) - 1)
    if method in ("reduce", "accumulate"):
        entries = int(np.size(inputs[0]))
        if method == "accumulate":
            axis = kwargs.get("axis", 0)
            return entries - entries // max(int(np.shape(inputs[0])[axis]), 1)
        return max(entries - int(np.size(result)), 0)
    return int(np.size(result))
