"""Values of every part, (examples, *axes): dense tensors, or sparse ones that hold the entries that
are not zero.

A group of a large dictionary has millions of parts of which an input uses dozens: its values are
`torch.sparse_coo` tensors. Everything that reads values goes through these functions.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

DENSE = 1 << 22
"""Entries up to which a group's values stay dense."""
SHARE = 1 / 8
"""The largest share of entries that are not zero at which sparse values are worth it."""


def compact(values: Float[Tensor, "examples ..."]) -> Tensor:
    """Return values as they are, or sparse where they are more than `DENSE` and at most a `SHARE`
    of them is not zero.
    """
    if values.is_sparse or values.numel() <= DENSE:
        return values
    if values.count_nonzero() > SHARE * values.numel():
        return values
    return values.to_sparse().coalesce()


def add(first: Tensor, second: Tensor) -> Tensor:
    """Return the sum of two values, sparse where both are."""
    if first.is_sparse and second.is_sparse:
        return (first + second).coalesce()
    return dense(first) + dense(second)


def dense(values: Tensor) -> Tensor:
    """Return values as a dense tensor."""
    return values.to_dense() if values.is_sparse else values


def data(values: Tensor) -> Tensor:
    """Return the entries that are held, in one dimension."""
    return values.values() if values.is_sparse else values.flatten()


def mean(values: Float[Tensor, "examples ..."]) -> Float[Tensor, "..."]:
    """Return the mean over examples, dense."""
    if values.is_sparse:
        return torch.sparse.sum(values, 0).to_dense() / len(values)
    return values.mean(0)


def totals(values: Float[Tensor, "examples ..."]) -> Float[Tensor, " examples"]:
    """Return the sum over all parts of every example."""
    if values.is_sparse:
        found = torch.zeros(len(values), dtype=values.dtype, device=values.device)
        return found.index_add(0, values.indices()[0], values.values())
    return values.reshape(len(values), -1).sum(1)


def at(
    values: Float[Tensor, "examples ..."], index: Int[Tensor, "rows examples axes"]
) -> Float[Tensor, "rows examples"]:
    """Return the entries of values at rows of part indices."""
    examples = torch.arange(len(values), device=values.device).expand(index.shape[:2])
    if not values.is_sparse:
        return values[(examples, *index.unbind(-1))]
    wanted = ravel(torch.cat([examples.unsqueeze(-1), index.to(values.device)], -1), values.shape)
    held = ravel(values.indices().T, values.shape)  # sorted: the tensor is coalesced
    if not len(held):
        return torch.zeros(wanted.shape, dtype=values.dtype, device=values.device)
    place = torch.searchsorted(held, wanted).clamp_max(len(held) - 1)
    return torch.where(held[place] == wanted, values.values()[place], 0)


def columns(
    values: Float[Tensor, "examples ..."], *, nonzero: bool = True
) -> tuple[Float[Tensor, "examples parts"], Int[Tensor, " parts"]]:
    """Return the parts that are not zero in every example (or all of them) as dense columns, with
    the flat index of each.
    """
    if not values.is_sparse:
        flat = values.reshape(len(values), -1)
        keep = (flat != 0).any(0) if nonzero else torch.ones(flat.shape[1], dtype=torch.bool)
        places = keep.to(flat.device).nonzero().flatten()
        return flat[:, places], places
    if not nonzero:
        return columns(dense(values), nonzero=False)
    held = values.values() != 0
    flat = ravel(values.indices()[1:].T[held], values.shape[1:])
    places, column = flat.unique(return_inverse=True)
    found = torch.zeros(len(values), len(places), dtype=values.dtype, device=values.device)
    found[values.indices()[0][held], column] = values.values()[held]
    return found, places


def unravel(flat: Int[Tensor, "..."], axes: tuple[int, ...]) -> Int[Tensor, "... axes"]:
    """Return the index of parts from their flat places."""
    if not axes:
        return flat.new_zeros(*flat.shape, 0)
    return torch.stack(torch.unravel_index(flat, axes), dim=-1)


def active_rows(
    sizes: Float[Tensor, "examples ..."], keys: Float[Tensor, "examples ..."] | None = None
) -> tuple[Int[Tensor, "rows examples axes"], Bool[Tensor, "rows examples"]]:
    """Return the parts of positive size as rows of indices, one part of each example in a row, with
    a mask of those that exist: examples have different numbers of them.

    With `keys` (a number for every entry that is held) each example's parts come in the order of
    their keys.
    """
    axes = tuple(sizes.shape[1:])
    if sizes.is_sparse:
        held = sizes.values() > 0
        example, flat = sizes.indices()[0][held], ravel(sizes.indices()[1:].T[held], axes)
    else:
        held = sizes.flatten() > 0
        example, flat = (sizes.reshape(len(sizes), -1) > 0).nonzero().T
    if keys is not None:
        order = data(keys)[held].argsort()
        order = order[example[order].argsort(stable=True)]
        example, flat = example[order], flat[order]
    counts = torch.bincount(example, minlength=len(sizes))
    rows = int(counts.max()) if len(counts) else 0
    row = torch.arange(len(example), device=example.device) - (counts.cumsum(0) - counts)[example]
    places = flat.new_zeros(rows, len(sizes))
    mask = torch.zeros(rows, len(sizes), dtype=torch.bool, device=flat.device)
    places[row, example], mask[row, example] = flat, True
    return unravel(places, axes), mask


def scatter(
    shape: tuple[int, ...],
    index: Int[Tensor, "rows examples axes"],
    mask: Bool[Tensor, "rows examples"],
    found: Float[Tensor, "rows examples"],
) -> Float[Tensor, "examples ..."]:
    """Return values with the entries at rows of part indices, where the mask is true, and zero
    elsewhere; sparse where a group is large.
    """
    rows, examples = mask.nonzero(as_tuple=True)
    where = torch.cat([examples[:, None], index[rows, examples].to(examples)], dim=1)
    entries = found[rows, examples].double()
    if torch.Size(shape).numel() > DENSE:
        return torch.sparse_coo_tensor(where.T, entries, shape, check_invariants=False).coalesce()
    values = torch.zeros(shape, dtype=torch.float64, device=found.device)
    values[tuple(where.T)] = entries
    return values


def ravel(index: Int[Tensor, "... axes"], shape: tuple[int, ...]) -> Int[Tensor, "..."]:
    """Return the flat places of part indices."""
    key = torch.zeros(index.shape[:-1], dtype=torch.long, device=index.device)
    for axis, size in enumerate(shape):
        key = key * size + index[..., axis]
    return key
