"""Which parts are ablated exactly: the ones that are read, for certain, and a random sample of the
others, with known inclusion probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from assay.audit.population import Population
from assay.audit.selections import Selections
from assay.core.mechanisms import Mechanisms
from assay.errors import InputError


@dataclass(frozen=True)
class Design:
    """A stratified design: `stratum` of every row of a population (0: certain, else one per group),
    and by input and stratum the number of rows, `size`, and of those drawn, `taken`.

    The inclusion probability of a row is taken / size of its stratum in its input."""

    stratum: np.ndarray
    size: np.ndarray
    taken: np.ndarray

    def inclusion(self, parts: Population) -> np.ndarray:
        """Return the inclusion probability of every row."""
        place = parts.example, self.stratum
        return self.taken[place] / self.size[place]

    def reach(self, parts: Population, chosen: np.ndarray) -> np.ndarray:
        """Return the largest sum of 1 / inclusion probability that `chosen` rows (a mask, or their
        places) can have in a sample of each input, (examples,).
        """
        strata = self.size.shape[1]
        inside = np.bincount(
            (parts.example * strata + self.stratum)[chosen], minlength=self.size.size
        ).reshape(self.size.shape)
        drawn = np.minimum(self.taken, inside)
        return (drawn * self.size / np.maximum(self.taken, 1)).sum(1)

    def draw(self, parts: Population, generator: np.random.Generator) -> np.ndarray:
        """Return the rows of one sample, in order: without replacement, uniform in each stratum of
        each input.
        """
        # One key per part and input in the order of the population, whatever the design is: samples
        # for several methods overlap as far as their designs allow.
        keys = generator.random(len(parts))
        cell = parts.example * self.size.shape[1] + self.stratum
        order = np.lexsort((keys, cell))
        counts = self.size.ravel()[np.unique(cell)] if len(cell) else np.zeros(0, dtype=int)
        within = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.sort(order[within < self.taken.ravel()[cell[order]]])


def list_length(mechanisms: Mechanisms, exact: int, top: int) -> int:
    """Return how many parts a list can have so that two lists of them (the listed parts and the
    largest of an input) fit into `exact` ablations of an input beside one random part per group, at
    most `top`.

    Raises InputError when there are fewer ablations than groups.
    """
    groups = len(mechanisms.groups)
    if exact < groups:
        raise InputError(
            f"exact={exact} passes cannot cover {groups} gate groups; give at least {groups}"
        )
    return min(top, (exact - groups) // 2)


def design(parts: Population, selections: Selections, exact: int | None) -> Design:
    """Take the listed parts and the largest parts of every input for certain, and split what is
    left of `exact` ablations of an input evenly over the groups; None takes everything.
    """
    strata = len(parts.names) + 1
    shared = np.isin(parts.group, [parts.names.index(name) for name in parts.shared])
    if exact is None:
        certain = np.ones(len(parts), dtype=bool)
    else:
        certain = shared | selections.in_list(parts) | (parts.rank < selections.count)
    stratum = np.where(certain, 0, parts.group + 1)
    cell = parts.example * strata + stratum
    size = np.bincount(cell, minlength=parts.examples * strata).reshape(parts.examples, strata)
    taken = size.copy()
    if exact is not None:
        own = [name not in parts.shared for name in parts.names]
        spent = parts.per_input((certain & ~shared).astype(float)).astype(int)
        passes = exact * sum(own) // len(own)  # shared groups take their part of the passes
        left = np.maximum(passes - spent, sum(own))
        order = np.cumsum(own) - 1
        for code, mine in enumerate(own):
            share = left // max(sum(own), 1) + (order[code] < left % max(sum(own), 1))
            taken[:, code + 1] = np.minimum(size[:, code + 1], share) if mine else 0
    return Design(stratum, size, taken)


def shared_parts(
    parts: Population, selections: Selections, exact: int | None, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return which rows have a part that is ablated, and every row's inclusion probability, for
    groups whose gates are shared over the batch; rows of other groups are kept, with probability 1.

    Each shared group takes its listed parts for certain and others at random, an even share of the
    passes: one pass gives the effect in every input.
    """
    keep, inclusion = np.ones(len(parts), dtype=bool), np.ones(len(parts))
    if exact is None:
        return keep, inclusion
    listed = selections.in_list(parts)
    for place, name in enumerate(parts.names):
        if name not in parts.shared:
            continue
        share = exact // len(parts.names) + (place < exact % len(parts.names))
        rows = parts.rows_of(name)
        known = np.unique(parts.place[rows[listed[rows]]])[:share]
        others = np.setdiff1d(np.unique(parts.place[rows]), known)
        count = min(share - len(known), len(others))
        drawn = generator.choice(others, count, replace=False) if count else others[:0]
        keep[rows] = np.isin(parts.place[rows], np.concatenate([known, drawn]))
        if len(others):
            certain = np.isin(parts.place[rows], known)
            inclusion[rows] = np.where(certain, 1.0, count / len(others))
    return keep, inclusion
