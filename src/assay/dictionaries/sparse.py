"""Products with sparse features: what a training step computes where most features are zero.

The active features of n positions are a pattern of compressed rows. Decoding, its derivative in the
features and the derivatives in both weight matrices each cost one row of the width per active
feature; the only dense product of a step is the encoder's."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag


@dataclass(frozen=True)
class Active:
    """Which features are active at n positions: `features[offsets[i] : offsets[i + 1]]` are those
    of position i, of `size` features.
    """

    offsets: Int[Tensor, " positions_and_one"]
    features: Int[Tensor, " active"]
    size: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def share(self) -> float:
        """The share of the features that are active, over all positions."""
        return len(self.features) / max(len(self) * self.size, 1)

    @cached_property
    def rows(self) -> Int[Tensor, " active"]:
        """The position of every active feature."""
        counts = self.offsets.diff()
        places = torch.arange(len(self), device=self.features.device)
        return places.repeat_interleave(counts, output_size=len(self.features))

    @cached_property
    def transposed(self) -> tuple[Tensor, Tensor]:
        """The order that sorts the entries by feature, and where each feature begins in it."""
        # Half the width sorts in half the time.
        order = self.features.to(torch.int32).argsort(stable=True)
        counts = self.counts
        return order, torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    @cached_property
    def counts(self) -> Int[Tensor, " size"]:
        """At how many positions each feature is active."""
        return torch.bincount(self.features, minlength=self.size)

    def count(self, values: Float[Tensor, " active"]) -> Int[Tensor, " size"]:
        """Return at how many positions each feature has a value above zero."""
        return torch.bincount(self.features[values > 0], minlength=self.size)

    def of_feature(self, numbers: Float[Tensor, " size"]) -> Float[Tensor, " active"]:
        """Return, for every entry, the number of its feature."""
        return numbers[self.features]

    def values_of(self, matrix: Float[Tensor, "positions size"]) -> Float[Tensor, " active"]:
        """Return the entries of a matrix at the active features."""
        return matrix.flatten()[self.rows * self.size + self.features]

    def chosen(self, kept: Bool[Tensor, " active"]) -> Active:
        """Return the pattern of the entries that are kept."""
        before = torch.cat([kept.new_zeros(1, dtype=torch.long), kept.long().cumsum(0)])
        return Active(before[self.offsets], self.features[kept], self.size)


@dataclass(frozen=True)
class Everything:
    """The pattern of all features at n positions, whose values are a matrix: what is faster once a
    tenth of the features is active.
    """

    positions: int
    size: int

    def __len__(self) -> int:
        return self.positions

    def count(self, values: Float[Tensor, "positions size"]) -> Int[Tensor, " size"]:
        """Return at how many positions each feature has a value above zero."""
        return (values > 0).sum(0)

    def of_feature(self, numbers: Float[Tensor, " size"]) -> Float[Tensor, " size"]:
        """Return the numbers, which broadcast over positions."""
        return numbers


THREADS = 2
"""Threads up to which numpy's selection of the largest is faster than that of PyTorch, which shares
rows between threads."""

BLOCK = 1 << 20
"""Numbers among which the largest of rows are looked for at once."""

DENSE = 0.1
"""The share of active features from which dense products are faster."""


def pattern_of(mask: Bool[Tensor, "positions size"]) -> Active | Everything:
    """Return the pattern of a mask, or of all features where the mask is not sparse."""
    if int(mask.sum()) > DENSE * mask.numel():
        return Everything(*mask.shape)
    return active_where(mask)


def active_where(mask: Bool[Tensor, "positions size"]) -> Active:
    """Return the pattern of a mask."""
    counts = mask.sum(1)
    return Active(
        torch.cat([counts.new_zeros(1), counts.cumsum(0)]), mask.nonzero()[:, 1], mask.shape[1]
    )


def active_at(features: Int[Tensor, "positions k"], size: int) -> Active:
    """Return the pattern of k features at every position."""
    count, k = features.shape
    offsets = torch.arange(0, (count + 1) * k, k, device=features.device)
    return Active(offsets, features.reshape(-1), size)


def largest(sizes: Float[Tensor, "positions size"], k: int) -> Int[Tensor, "positions k"]:
    """Return the features with the k largest sizes at every position, in no order; outside the
    graph.
    """
    if sizes.device.type != "cpu" or torch.get_num_threads() > THREADS or not sizes.numel():
        return sizes.topk(k, dim=-1, sorted=False).indices
    rows = max(1, BLOCK // sizes.shape[1])
    return torch.cat([_largest(some, k) for some in sizes.detach().split(rows)])


def _largest(sizes: Tensor, k: int) -> Tensor:
    try:
        split = np.partition(sizes.numpy(), -k, axis=-1)
    except TypeError:  # numpy has no bfloat16
        return sizes.topk(k, dim=-1, sorted=False).indices
    chosen = sizes >= torch.from_numpy(split[:, -k].copy())[:, None]
    if not bool((chosen.sum(1) == k).all()):  # ties, or NaN
        return sizes.topk(k, dim=-1, sorted=False).indices
    return chosen.nonzero()[:, 1].reshape(-1, k)


def take_before(
    x: Float[Tensor, "positions d_in"],
    centre: Float[Tensor, " d_in"] | None,
    W_enc: Float[Tensor, "d_in size"],
    b_enc: Float[Tensor, " size"],
    known: Float[Tensor, " active"] | None,
    active: Active | Everything,
) -> Float[Tensor, "*active"]:
    """Return `(x - centre) W_enc + b_enc` at the active features.

    `known` holds the values of a sparse pattern, computed outside the graph; the derivatives in the
    four factors are computed at the active features alone."""
    if isinstance(active, Everything):
        return (x if centre is None else x - centre) @ W_enc + b_enc
    values: Tensor = _Take.apply(x, centre, W_enc, b_enc, known, active)
    return values


def decode(
    values: Float[Tensor, "*active"],
    W_dec: Float[Tensor, "size d_out"],
    active: Active | Everything,
) -> Float[Tensor, "positions d_out"]:
    """Return the sum of `value * W_dec[feature]` at every position."""
    if isinstance(active, Everything):
        return values @ W_dec
    found: Tensor = _Decode.apply(values, W_dec, active)
    return found


def row_major(W_enc: Tensor) -> Tensor:
    """Return the same matrix laid out so that a feature's column is contiguous: gathers of columns,
    and sums of them, then read memory in order.
    """
    return W_enc.T.contiguous().T


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        centre: Tensor | None,
        W_enc: Tensor,
        b_enc: Tensor,
        known: Tensor,
        active: Active,
    ) -> Tensor:
        return known.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, centre, W_enc, _, _, ctx.active = inputs
        ctx.save_for_backward(x, centre, W_enc)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, centre, W_enc = ctx.saved_tensors
        active = ctx.active
        into_x = into_centre = into_weights = None
        into_bias = gradient.new_zeros(active.size).index_add(0, active.features, gradient)
        if ctx.needs_input_grad[0]:
            into_x = _sum_rows(gradient, active.features, active.offsets, W_enc.T.contiguous())
        if ctx.needs_input_grad[1]:  # one product: no position has a centre of its own
            into_centre = -(W_enc @ into_bias)
        if ctx.needs_input_grad[2]:
            centred = x if centre is None else x - centre
            into_weights = _sum_positions(gradient, active, centred).T
        return into_x, into_centre, into_weights, into_bias, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor, W_dec: Tensor, active: Active) -> Tensor:
        return _sum_rows(values, active.features, active.offsets, W_dec)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, W_dec, ctx.active = inputs
        ctx.save_for_backward(values, W_dec)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        into_values = into_weights = None
        if ctx.needs_input_grad[0]:
            into_values = products(gradient, W_dec, ctx.active)
        if ctx.needs_input_grad[1]:
            into_weights = _sum_positions(values, ctx.active, gradient)
        return into_values, into_weights, None


def _sum_rows(weights: Tensor, index: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    """Return, for every row, the weighted sum of the table's rows at its indices."""
    return embedding_bag(
        index,
        table.contiguous(),
        offsets,
        mode="sum",
        per_sample_weights=weights,
        include_last_offset=True,
    )


def _sum_positions(weights: Tensor, active: Active, table: Tensor) -> Tensor:
    """Return, for every feature, the weighted sum of the table's rows at its positions."""
    order, offsets = active.transposed
    return _sum_rows(weights[order], active.rows[order], offsets, table)


def products(
    left: Float[Tensor, "positions width"], right: Float[Tensor, "size width"], active: Active
) -> Float[Tensor, " active"]:
    """Return `left[position] . right[feature]` at the active features."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the layout is called a beta
        pattern = torch.sparse_csr_tensor(
            active.offsets,
            active.features,
            left.new_zeros(len(active.features)),
            (len(active), active.size),
            check_invariants=False,
        )
        found = torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0)
    return found.values()
