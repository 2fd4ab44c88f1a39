"""Clusters of components that matter together, by description length."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from assay.errors import InputError


@dataclass(frozen=True)
class Clusters:
    """A partition of components: `members` by cluster, the description length in bits per position,
    and that of single components."""

    members: tuple[tuple[int, ...], ...]
    bits: float
    bits_single: float


def cluster(active: Bool[Tensor, "positions components"], *, rank_bits: float = 1.0) -> Clusters:
    """Merge components greedily as long as the description of what is active gets shorter.

    A cluster is active where one of its components is. At every position each active cluster is
    named, log2(number of clusters) bits, and paid for by its size, `rank_bits` for each of its
    rank-one parts: `sum_positions sum_active (log2 k + rank_bits |cluster|)`. Components that are
    never active are left out. Merging two that always go together saves a name; merging two that do
    not pays for parts that are not needed.

    Raises InputError when nothing is active."""
    if active.ndim != 2 or not bool(active.any()):
        raise InputError("active must be (positions, components) with at least one active entry")
    if not rank_bits >= 0:
        raise InputError(f"rank_bits must be at least 0, got {rank_bits}")
    members = [[index] for index in range(active.shape[1]) if bool(active[:, index].any())]
    flags = active[:, [own[0] for own in members]].double()
    together = flags.T @ flags
    sizes = torch.ones(len(members), dtype=torch.float64)
    single = _bits(together.diag(), sizes, rank_bits)
    while len(members) > 1:
        own = together.diag()
        union = own[:, None] + own[None, :] - together
        both = sizes[:, None] + sizes[None, :]
        # What changes when i and j become one: their own two entries, and every name, which needs
        # fewer bits for k - 1 clusters.
        name = math.log2(max(len(members) - 1, 1))
        before = rank_bits * (own * sizes)[:, None] + rank_bits * (own * sizes)[None, :]
        names = name * (own.sum() - own[:, None] - own[None, :] + union)
        change = names + rank_bits * union * both - before - math.log2(len(members)) * own.sum()
        change.fill_diagonal_(math.inf)
        best = int(change.argmin())
        first, second = sorted(divmod(best, len(members)))
        if not float(change.flatten()[best]) < -1e-9:
            break
        members[first] += members.pop(second)
        flags[:, first] = torch.maximum(flags[:, first], flags[:, second])
        keep = [index for index in range(flags.shape[1]) if index != second]
        flags, sizes = flags[:, keep], _merged(sizes, first, second)[keep]
        together = flags.T @ flags
    bits = _bits(together.diag(), sizes, rank_bits)
    count = len(active)
    return Clusters(tuple(tuple(sorted(own)) for own in members), bits / count, single / count)


def _bits(counts: Tensor, sizes: Tensor, rank_bits: float) -> float:
    return float((counts * (math.log2(max(len(counts), 1)) + rank_bits * sizes)).sum())


def _merged(sizes: Tensor, first: int, second: int) -> Tensor:
    found = sizes.clone()
    found[first] += sizes[second]
    return found
