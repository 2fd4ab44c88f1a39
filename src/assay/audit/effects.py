"""Exact effects that are computed once and shared: by the audits of several methods, by the means
of listed parts, and by patches spent on doubtful scores.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from assay.attribution.exact import ablate
from assay.attribution.scores import Scores
from assay.audit.population import Population, entries
from assay.core.mechanisms import Mechanisms
from assay.core.sites import Record
from assay.errors import InputError


class ExactEffects:
    """F(ones) - F(gate at 0) of single parts in single inputs, each computed when it is first asked
    for.

    `everything` holds exact scores of all parts, which nothing needs to be computed beyond. `spent`
    counts the (input, part) pairs that were computed here.

    Raises InputError for scores that are not exact, or of other mechanisms.
    """

    def __init__(
        self,
        mechanisms: Mechanisms,
        *,
        everything: Scores | None = None,
        budget: int | None = None,
    ):
        if everything is not None and not everything.exact:
            raise InputError(
                f"effects must be exact scores, for example attribute(m, Exact()); got scores by"
                f" {everything.method!r}"
            )
        if everything is not None and everything.mechanisms is not mechanisms:
            raise InputError("exact effects must be those of the mechanisms that are audited")
        self.mechanisms = mechanisms
        self.everything = everything
        self.budget = budget
        self.spent = 0
        self._keys: dict[str, np.ndarray] = {}
        self._found: dict[str, np.ndarray] = {}

    @property
    def complete(self) -> bool:
        """Whether every effect is known."""
        return self.everything is not None

    def of(self, parts: Population, rows: np.ndarray) -> np.ndarray:
        """Return the exact effects of rows of a population, computing those that are missing."""
        found = np.empty(len(rows))
        record = cache(self.mechanisms.record)  # made by the first group that needs it
        for code, name in enumerate(parts.names):
            here = np.flatnonzero(parts.group[rows] == code)
            if len(here):
                chosen = rows[here]
                found[here] = self._group(
                    name,
                    parts.example[chosen],
                    parts.place[chosen],
                    parts.index(chosen, name),
                    record,
                )
        return found

    def _group(
        self,
        name: str,
        example: np.ndarray,
        place: np.ndarray,
        index: Tensor,
        record: Callable[[], Record],
    ) -> np.ndarray:
        if self.everything is not None:
            return entries(self.everything.values[name], example, index)
        size = int(np.prod(self.mechanisms.group(name).axes, dtype=np.int64))
        keys = example * size + place
        missing = ~np.isin(keys, self._keys.get(name, np.empty(0, dtype=np.int64)))
        if missing.any():
            wanted = torch.from_numpy(missing)
            effects = self._computed(name, example[missing], index[wanted], record)
            self._keep(name, keys[missing], place[missing], effects, size)
        return self._found[name][np.searchsorted(self._keys[name], keys)]

    def _computed(
        self, name: str, example: np.ndarray, index: Tensor, record: Callable[[], Record]
    ) -> np.ndarray:
        """Return the effects of pairs of one group: (pairs,), or (parts, examples) of the distinct
        parts where one pass gives the effect in every input.
        """

        def effects(rows: Tensor) -> Tensor:
            found = ablate(self.mechanisms, name, rows, record=record, budget=self.budget)
            return found.double().cpu()

        if not self.mechanisms.group(name).per_example:
            return effects(torch.unique(index, dim=0)).numpy()
        # The parts of each input in a column of their own; shorter columns are filled with part 0.
        order = np.argsort(example, kind="stable")
        counts = np.bincount(example, minlength=len(self.mechanisms.batch))
        row = np.arange(len(example)) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = torch.zeros(int(counts.max()), len(counts), index.shape[1], dtype=torch.long)
        where = torch.from_numpy(row), torch.from_numpy(example[order])
        rows[where] = index[torch.from_numpy(order)]
        found = np.empty(len(example))
        found[order] = effects(rows)[where].numpy()
        return found

    def _keep(
        self, name: str, keys: np.ndarray, place: np.ndarray, effects: np.ndarray, size: int
    ) -> None:
        if effects.ndim == 2:
            examples = np.arange(effects.shape[1])[None] * size
            keys, effects = (examples + np.unique(place)[:, None]).ravel(), effects.ravel()
        self.spent += len(keys)
        joined = np.concatenate([self._keys.get(name, np.empty(0, dtype=np.int64)), keys])
        values = np.concatenate([self._found.get(name, np.empty(0)), effects])
        self._keys[name], first = np.unique(joined, return_index=True)
        self._found[name] = values[first]
