"""The registry of rules for ATen operations, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from assay.bounds.trace.lower import Constant, Handler, Lowering, Node, UnsupportedError, Value

HANDLERS: dict[str, Handler] = {}


def rule(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def as_value(x: Any, like: torch.dtype = torch.float64) -> Value:
    """Return a number or a tensor as a value."""
    if isinstance(x, Constant | Node):
        return x
    if isinstance(x, bool | int | float):
        return Constant(torch.tensor(float(x), dtype=torch.float64))
    raise UnsupportedError(f"is applied to {type(x).__name__}")


def shape_of(low: Lowering, x: Value) -> tuple[int, ...]:
    return low.shape(x) if isinstance(x, Node) else tuple(x.tensor.shape)


def together(low: Lowering, *xs: Value) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(*(shape_of(low, x) for x in xs)))


def plain(x: Any) -> Any:
    if isinstance(x, Node):
        raise UnsupportedError("depends on the region in which entry it takes")
    if isinstance(x, Constant):
        return x.tensor
    if isinstance(x, list | tuple):
        return type(x)(plain(entry) for entry in x)
    return x
