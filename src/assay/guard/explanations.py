"""Explanations: admitted statements about patterns of features, and those that were refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import polars as pl

from assay.errors import InputError

Form = Literal["constant", "marginal", "edge", "root"]
Sort = Literal["statistical", "mechanistic"]


@dataclass(frozen=True)
class Explanation:
    """One statement: a feature is always in one bin (constant), has a table of its own (marginal),
    has a table with another one (edge: parent, child) or with the root.

    `bits` is what the statement saves beyond its own length, `explains` the number of events of
    laboratory inputs that were unexplained before it. A mechanistic edge says what gates
    `predicted` of "the child fires given that the parent does", and what a fresh split `observed`.
    """

    form: Form
    features: tuple[int, ...]
    sort: Sort = "statistical"
    bits: float = 0.0
    explains: int = 0
    predicted: float | None = None
    observed: float | None = None

    def words(self, names: Sequence[str]) -> str:
        """Return the statement in words."""
        first = names[self.features[0]]
        match self.form:
            case "constant":
                return f"{first} never varies"
            case "marginal":
                return f"{first} has its usual values"
            case "root":
                return f"{first} goes with the predicted class"
            case "edge":
                return f"{first} -> {names[self.features[1]]}"


@dataclass(frozen=True)
class Refused:
    """A statement that was tried and not admitted, with the reason."""

    explanation: Explanation
    reason: str


def explained_table(
    admitted: Iterable[Explanation], refused: Iterable[Refused], names: Sequence[str]
) -> pl.DataFrame:
    """Return all explanations, then all refusals, a row each."""
    rows = [(one, True, "") for one in admitted]
    rows += [(one.explanation, False, one.reason) for one in refused]
    schema = {
        "explanation": pl.String,
        "form": pl.String,
        "sort": pl.String,
        "bits": pl.Float64,
        "events explained": pl.Int64,
        "predicted": pl.Float64,
        "fresh split": pl.Float64,
        "admitted": pl.Boolean,
        "reason": pl.String,
    }
    cells = [
        (
            *(one.words(names), one.form, one.sort, one.bits, one.explains),
            *(one.predicted, one.observed, taken, reason),
        )
        for one, taken, reason in rows
    ]
    return pl.DataFrame(cells, schema=schema, orient="row")


def require_forest(edges: Iterable[tuple[int, int]], names: Sequence[str]) -> None:
    """Raise InputError when edges close a cycle, in either direction: the likelihood of a forest is
    exact, that of a cycle is none.
    """
    forest = Forest(len(names))
    for parent, child in edges:
        if not forest.join(parent, child):
            raise InputError(
                f"the edge {names[parent]!r} -> {names[child]!r} closes a cycle; edges must form a"
                " forest"
            )


class Forest:
    """Which features are joined already."""

    def __init__(self, size: int):
        self._above = list(range(size))

    def find(self, feature: int) -> int:
        """Return the representative of a feature's tree."""
        while self._above[feature] != feature:
            self._above[feature] = self._above[self._above[feature]]
            feature = self._above[feature]
        return feature

    def joined(self, first: int, second: int) -> bool:
        return self.find(first) == self.find(second)

    def join(self, first: int, second: int) -> bool:
        """Join two trees; return False where they are one already."""
        one, other = self.find(first), self.find(second)
        self._above[one] = other
        return one != other
