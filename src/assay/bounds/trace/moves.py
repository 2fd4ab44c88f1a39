"""Operations that only move entries, or that create constants."""

from __future__ import annotations

from typing import Any

import torch

from assay.bounds.trace.lower import Constant, Lowering, Node, Undecided, UnsupportedError, Value
from assay.bounds.trace.registry import as_value, plain, rule, shape_of


@rule(
    *("view", "_unsafe_view", "reshape", "transpose", "t", "permute", "expand", "clone", "detach"),
    *("unsqueeze", "squeeze", "split", "split_with_sizes", "select", "slice", "alias", "flip"),
    *("roll", "repeat", "unbind", "lift_fresh_copy", "diagonal", "index", "index_select"),
    *("tril", "triu", "unfold", "contiguous"),
)
def moved(low: Lowering, op: Any, x: Value, *args: Any, **kwargs: Any) -> Any:
    rest, named = [plain(a) for a in args], {key: plain(a) for key, a in kwargs.items()}
    return low.move(lambda y: op(y, *rest, **named), x)


@rule("_to_copy")
def _cast(low: Lowering, op: Any, x: Any, dtype: Any = None, **kwargs: Any) -> Any:
    if isinstance(x, Undecided):  # a comparison as zeros and ones
        return x
    if dtype is not None and not dtype.is_floating_point:
        raise UnsupportedError(f"turns numbers that depend on the region into {dtype}")
    if dtype is None or dtype == x.dtype:
        return x
    low.dtypes |= {dtype}
    return Node(x.ref, dtype)


@rule("cat", "stack")
def _joined(low: Lowering, op: Any, xs: list[Value], *args: Any) -> Any:
    return low.move(lambda *ys: op(list(ys), *args), *xs)


@rule("where")
def _where(low: Lowering, op: Any, mask: Value, x: Any, y: Any) -> Any:
    chosen = plain(mask)
    return low.move(lambda a, b: torch.where(chosen, a, b), as_value(x), as_value(y))


@rule("masked_fill")
def _filled(low: Lowering, op: Any, x: Value, mask: Value, value: Any) -> Any:
    chosen = plain(mask)
    return low.move(lambda a, b: torch.where(chosen, b, a), x, as_value(value))


@rule("constant_pad_nd")
def _padded(low: Lowering, op: Any, x: Value, pad: list[int], value: float = 0.0) -> Any:
    if value:
        raise UnsupportedError(f"pads with {value}; only zeros have a rule")
    return low.move(lambda y: op(y, pad, 0.0), x)


@rule("zeros_like", "ones_like", "new_zeros", "new_ones")
def _created(low: Lowering, op: Any, x: Value, *args: Any, **kwargs: Any) -> Constant:
    """Return a constant of which only the shape comes from x."""
    name = op._schema.name
    shape = args[0] if "new_" in name else shape_of(low, x)
    return Constant(torch.full(tuple(shape), float("ones" in name), dtype=torch.float64))
