"""Every active part of every input as flat columns, whatever holds the scores, dense or sparse."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_flatten

from assay.attribution.scores import Scores
from assay.core import values as core_values
from assay.core.mechanisms import Mechanisms
from assay.core.target import Batch
from assay.core.values import active_rows, at, ravel, unravel


@dataclass(frozen=True)
class Population:
    """The active parts (norm above zero) of every input, one row each, ordered by group, then
    input.

    `group` numbers the groups in `names`, `place` is a part's flat index in its group, `score` its
    score and `scales` further columns, such as its `step`, the norm of the part. `unit` (examples,)
    gives inputs that occur more than once one number. The gates of groups in `shared` are shared
    over the batch."""

    mechanisms: Mechanisms
    names: tuple[str, ...]
    example: np.ndarray
    group: np.ndarray
    place: np.ndarray
    score: np.ndarray
    scales: Mapping[str, np.ndarray]
    unit: np.ndarray
    shared: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.example)

    @property
    def examples(self) -> int:
        return len(self.unit)

    @property
    def step(self) -> np.ndarray:
        return self.scales["step"]

    @cached_property
    def part(self) -> np.ndarray:
        """One number per part, the same in every input."""
        starts = np.cumsum([0, *(_parts(self.mechanisms, name) for name in self.names)])
        return starts[self.group] + self.place

    @cached_property
    def rank(self) -> np.ndarray:
        """The rank of each row's |score| within its input, from 0; ties by the norm of the
        part.
        """
        return self._rank(self.example)

    @cached_property
    def rank_in_group(self) -> np.ndarray:
        """The rank of each row's |score| among the rows of its group within its input."""
        return self._rank(self.example * len(self.names) + self.group)

    def _rank(self, owner: np.ndarray) -> np.ndarray:
        order = np.lexsort((-self.step, -np.abs(self.score), owner))
        counts = np.unique(owner, return_counts=True)[1]
        rank = np.empty(len(self), dtype=np.int64)
        rank[order] = np.arange(len(self)) - np.repeat(np.cumsum(counts) - counts, counts)
        return rank

    @cached_property
    def copies(self) -> np.ndarray:
        """How often each row's input occurs in the batch."""
        return np.bincount(self.unit)[self.unit][self.example]

    def take(self, rows: np.ndarray) -> Population:
        """Return some of the rows; ranks are those among them."""
        return replace(
            self,
            example=self.example[rows],
            group=self.group[rows],
            place=self.place[rows],
            score=self.score[rows],
            scales={key: values[rows] for key, values in self.scales.items()},
        )

    def index(self, rows: np.ndarray, name: str) -> Tensor:
        """Return the part index (rows, axes) of rows of one group."""
        return unravel(torch.from_numpy(self.place[rows]), self.mechanisms.group(name).axes)

    def described(self) -> tuple[list[str], list[list[int]], list[str]]:
        """Return the group, the part index and the description of every row."""
        groups = [self.names[code] for code in self.group]
        index: list[list[int]] = [[] for _ in groups]
        for name in self.names:
            rows = self.rows_of(name)
            for row, entry in zip(rows.tolist(), self.index(rows, name).tolist(), strict=True):
                index[row] = entry
        describe = self.mechanisms.describe
        words = [describe(name, tuple(e)) for name, e in zip(groups, index, strict=True)]
        return groups, index, words

    def column(self, values: Mapping[str, Tensor]) -> np.ndarray:
        """Return the entries of values (examples, *axes) by group as a column."""
        found = np.zeros(len(self))
        for name in self.names:
            rows = self.rows_of(name)
            found[rows] = entries(values[name], self.example[rows], self.index(rows, name))
        return found

    def rows_of(self, name: str) -> np.ndarray:
        """Return which rows belong to a group."""
        return np.flatnonzero(self.group == self.names.index(name))

    def per_input(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of a column in every input, (examples,)."""
        return np.bincount(self.example, weights=values, minlength=self.examples)

    def values(self, column: np.ndarray) -> dict[str, Tensor]:
        """Return a column as values (examples, *axes) by group, on the target's device, zero where
        a part is inactive; sparse where a group is large.
        """
        return {
            name: filled(
                (self.examples, *self.mechanisms.group(name).axes),
                self.example[rows],
                self.place[rows],
                torch.from_numpy(np.ascontiguousarray(column[rows])),
            ).to(self.mechanisms.target.device)
            for name in self.names
            for rows in [self.rows_of(name)]
        }


def population(
    scores: Scores, scales: Mapping[str, Mapping[str, Tensor]] | None = None
) -> Population:
    """Return the active parts of every input with their scores, their norms as the scale "step",
    and further `scales` (examples, *axes by group).
    """
    mechanisms = scores.mechanisms
    norms = mechanisms.norms()
    names = tuple(mechanisms.groups)
    columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for code, name in enumerate(names):
        index, mask = active_rows(norms[name].cpu())
        examples, rows = mask.T.nonzero(as_tuple=True)
        flat = ravel(index[rows, examples], mechanisms.group(name).axes)
        columns.append((examples.numpy(), np.full(len(examples), code), flat.numpy()))
    example, group, place = (np.concatenate(found) for found in zip(*columns, strict=True))
    unit = distinct(mechanisms.batch)
    shared = frozenset(name for name, entry in mechanisms.groups.items() if not entry.per_example)
    bare = Population(
        mechanisms, names, example, group, place, np.zeros(len(example)), {}, unit, shared
    )
    columns_of = {"step": norms, **(scales or {})}
    return replace(
        bare,
        score=bare.column(scores.values),
        scales={key: bare.column(values) for key, values in columns_of.items()},
    )


def entries(values: Tensor, example: np.ndarray, index: Tensor) -> np.ndarray:
    """Return the entries of values (examples, *axes) at pairs of an example and a part index
    (pairs, axes), in float64.
    """
    values, where = values.detach().cpu(), torch.from_numpy(example)
    if not values.is_sparse:
        return values[(where, *index.unbind(-1))].double().numpy()
    # `at` takes rows over all examples: a pair's row is its count within its example.
    order = torch.argsort(where, stable=True)
    counts = torch.bincount(where, minlength=len(values))
    row = torch.arange(len(where)) - (counts.cumsum(0) - counts)[where[order]]
    rows = torch.zeros(int(counts.max()), len(values), index.shape[1], dtype=torch.long)
    rows[row, where[order]] = index[order]
    found = torch.empty(len(where), dtype=torch.float64)
    found[order] = at(values, rows)[row, where[order]].double()
    return found.numpy()


def distinct(batch: Batch) -> np.ndarray:
    """Return a number for every example, (examples,), the same for examples whose inputs and labels
    are equal to the last bit.

    Copies of one input are one observation: they must neither be split between folds nor count more
    than once."""
    size = len(batch)
    leaves = [
        leaf.detach().cpu().reshape(size, -1).contiguous()
        for leaf in (*tree_flatten(batch.inputs)[0], *tree_flatten(batch.labels)[0])
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size
    ]
    keys: dict[bytes, int] = {}
    found = np.empty(size, dtype=np.int64)
    rows = [leaf.view(torch.uint8).numpy() if leaf.numel() else None for leaf in leaves]
    for place in range(size):
        digest = hashlib.blake2b(digest_size=16)
        for row in rows:
            if row is not None:
                digest.update(row[place].tobytes())
                digest.update(b"|")
        found[place] = keys.setdefault(digest.digest(), len(keys))
    return found


def filled(
    shape: tuple[int, ...], example: np.ndarray, place: np.ndarray, entries: Tensor
) -> Float[Tensor, "examples ..."]:
    """Return values with the entries at (example, flat place) and zero elsewhere; sparse where a
    group is large.
    """
    where = torch.stack([torch.from_numpy(example), torch.from_numpy(place)])
    count = int(np.prod(shape[1:], dtype=np.int64))
    if len(shape) and shape[0] * count > core_values.DENSE:
        index = torch.cat([where[:1], unravel(where[1], shape[1:]).T])
        return torch.sparse_coo_tensor(index, entries, shape, check_invariants=False).coalesce()
    values = torch.zeros(shape[0], count, dtype=entries.dtype)
    values[where[0], where[1]] = entries
    return values.reshape(shape)


def _parts(mechanisms: Mechanisms, name: str) -> int:
    return int(np.prod(mechanisms.group(name).axes, dtype=np.int64))
