"""Moving entries: one operation for views, permutations, slices, expansions, concatenations,
gathers and selections by a constant mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assay.bounds.levels import Arithmetic
from assay.bounds.numbers import constant
from assay.bounds.operations import Carried, Operation, Shape
from assay.bounds.rounding import Array, Interval, mul_up
from assay.errors import InputError

Index = NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Pick(Operation):
    """`out[i] = fill[i] + parent_p[from_p[j]]` where `to_p[j] = i`: every entry of the output is a
    constant or an entry of one parent.

    fill: the output's constants, zero where an entry is taken from a parent. sources: for every
    parent the flat places in the output, each at most once over all parents, and those in the
    parent. sizes: how many entries each parent has."""

    fill: Array
    sources: tuple[tuple[Index, Index], ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "fill", constant("pick fill", self.fill))
        taken = np.concatenate([to for to, _ in self.sources] or [np.zeros(0, np.intp)])
        fits = all(len(to) == len(start) for to, start in self.sources)
        if not fits or len(np.unique(taken)) < len(taken) or np.any(self.fill.reshape(-1)[taken]):
            raise InputError("pick: every entry of the output must come from one place")
        if len(taken) and (taken.min() < 0 or taken.max() >= self.fill.size):
            raise InputError(f"pick: places must lie within 0..{self.fill.size - 1}")

    @cached_property
    def plain(self) -> bool:
        """Whether the output is the only parent's entries in their order: a view."""
        if self.sizes != (self.fill.size,):
            return False
        (to, start), size = self.sources[0], self.fill.size
        return (
            len(to) == size
            and np.array_equal(to, np.arange(size))
            and np.array_equal(start, np.arange(size))
        )

    @cached_property
    def sums(self) -> tuple[tuple[Index, Index, Index, int], ...]:
        """For every parent: the output places ordered by their source, where each source begins,
        the sources, and the most output places that one source has.
        """
        found = []
        for to, start in self.sources:
            order = np.argsort(start, kind="stable")
            places, begins, counts = np.unique(start[order], return_index=True, return_counts=True)
            found.append((to[order], begins, places, int(counts.max(initial=1))))
        return tuple(found)

    def shape(self, *parents: Shape) -> Shape:
        for (_, start), size, shape in zip(self.sources, self.sizes, parents, strict=True):
            if size != math.prod(shape) or (
                len(start) and not 0 <= start.min() <= start.max() < size
            ):
                raise InputError(f"pick: a source lies outside a parent of shape {shape}")
        return self.fill.shape

    def interval(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        if self.plain:
            samples = len(xs[0].lo)
            shape = (samples, *self.fill.shape)
            return Interval(xs[0].lo.reshape(shape), xs[0].hi.reshape(shape))
        return Interval(self._move([x.lo for x in xs]), self._move([x.hi for x in xs]))

    def _move(self, xs: list[Array]) -> Array:
        samples = max((len(x) for x in xs), default=1)
        out = np.tile(self.fill.reshape(1, -1), (samples, 1))
        for (to, start), x in zip(self.sources, xs, strict=True):
            out[:, to] = x.reshape(len(x), -1)[:, start]
        return out.reshape(samples, *self.fill.shape)

    def backward(
        self, rows: Array, xs: list[Interval], relaxed: Any, error: Array | float, ar: Arithmetic
    ) -> Carried:
        if self.plain:
            return [rows.reshape(*rows.shape[:2], *xs[0].shape[1:])], np.zeros((1, 1))
        flat = rows.reshape(*rows.shape[:2], -1)
        carried: list[Array | None] = []
        wobble = np.zeros((max((len(x.lo) for x in xs), default=1), self.fill.size))
        for (to, begins, places, most), (onto, start), x in zip(
            self.sums, self.sources, xs, strict=True
        ):
            part = np.zeros((*rows.shape[:2], math.prod(x.shape[1:])))
            if most == 1:
                part[..., places] = flat[..., to]
            elif len(to):
                part[..., places] = np.add.reduceat(flat[..., to], begins, axis=-1)
                if ar.rigorous:
                    size = x.magnitude().reshape(len(x.lo), -1)[:, start]
                    wobble[:, onto] = mul_up(ar.gamma(most), size)
            carried.append(part.reshape(*rows.shape[:2], *x.shape[1:]))
        if not (np.any(self.fill) or np.any(wobble)):
            return carried, np.zeros((1, 1))
        fill = self.fill[None]
        return carried, ar.lower(rows, fill, fill, wobble.reshape(len(wobble), *self.fill.shape))

    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        return 0.0
