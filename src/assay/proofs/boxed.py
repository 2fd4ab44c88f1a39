"""Mechanisms whose gates move in narrower boxes than their kind's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from assay.core.mechanisms import Mechanisms
from assay.core.parts import Gates, Group, Parts
from assay.core.sites import Record, Seen
from assay.errors import InputError

Low = float | Mapping[str, Tensor]


@dataclass(frozen=True)
class Boxed(Mechanisms):
    """Another object's gates in the boxes [low, high]; everything else is the other object's.

    The target may be another one, so that a search can be about another metric."""

    inner: Mechanisms
    lows: Mapping[str, Tensor]

    @property
    def groups(self) -> Mapping[str, Group]:
        return self.inner.groups

    def parts(self, site: str, seen: Seen) -> Mapping[str, Parts]:
        return self.inner.parts(site, seen)

    def box(self, name: str) -> tuple[Tensor, Tensor]:
        return self.lows[name], self.inner.box(name)[1]

    def take(self, index: Tensor | slice) -> Self:
        inner = self.inner.take(index)
        lows = {
            name: low[index] if self.group(name).per_example else low
            for name, low in self.lows.items()
        }
        # A metric that holds numbers of every example follows the examples.
        target = inner.target if self.target is self.inner.target else self.target
        return replace(self, target=target, inner=inner, batch=inner.batch, lows=lows)

    def on(self, inputs: Any, references: Mapping[str, Tensor]) -> Boxed:
        """Return the same gates on other inputs, and with other reference values."""
        batch = replace(self.batch, inputs=inputs, checked=True)
        inner = self.inner.with_references(references) if references else self.inner
        moved = replace(inner, batch=batch)
        # The same groups: kinds that work them out once read the model's weights for it, and no
        # number may be read off a tensor while the function is recorded.
        moved.__dict__["groups"] = self.inner.groups
        return replace(self, inner=moved, batch=batch)

    def values(self, gates: Gates | None = None, *, record: Record | None = None) -> Tensor:
        if self.target is self.inner.target:
            return self.inner.values(gates, record=record)
        return super().values(gates, record=record)


def boxed(mechanisms: Mechanisms, low: Low | None) -> Boxed:
    """Return mechanisms whose gates go down to `low` at most: one number, or a tensor for each
    group that broadcasts to its gates, cut to the box that the kind allows; by default that box.

    Raises InputError for a low above the box, one below both box and zero, NaN, an unknown group or
    another shape."""
    lows = {}
    if isinstance(low, Mapping):
        mechanisms.check(low)
    for name, ones in mechanisms.ones().items():
        least, most = (bound.to(ones).expand(ones.shape) for bound in mechanisms.box(name))
        mine: Any = low.get(name) if isinstance(low, Mapping) else low
        if mine is None:
            lows[name] = least
            continue
        wanted = torch.as_tensor(mine, dtype=ones.dtype, device=ones.device).expand(ones.shape)
        if not bool((wanted <= most).all()):  # false for NaN too
            raise InputError(
                f"low: the lowest gate of {name!r} must be a number at most"
                f" {float(most.max())}, got {float(wanted.max())}"
            )
        # A number below every gate's own lowest one would be cut without a word.
        floor = min(float(least.min()), 0.0)
        if not bool((wanted >= floor).all()):
            raise InputError(
                f"low: the gates of {name!r} go down to {floor} at least, got {float(wanted.min())}"
            )
        lows[name] = torch.maximum(least, wanted)
    return Boxed(mechanisms.target, mechanisms.batch, mechanisms, lows, bound=mechanisms.bound)
