"""What a strategy is: a search for advice that nobody has to trust, and a verifier that turns it
into certified sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from assay.errors import InputError
from assay.proofs.max_of_k import tables
from assay.proofs.max_of_k.cells import ACCURACY, Measure
from assay.proofs.max_of_k.tables import FoldedTables, Outputs, TableFactors
from assay.targets.max_of_k import Weights

Advice = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Problem:
    """A network and a level of rigour; its tables are folded when first asked for.

    `exp_ulp` is the assumed accuracy, in units in the last place, of the float32 exponential (level
    float32). Raises InputError unless the weights are finite float32 numbers: what a certificate
    says of its model, and what is executed."""

    weights: Weights
    level: str = "real"
    exp_ulp: float = 2.0

    def __post_init__(self) -> None:
        for entry in fields(self.weights):
            array = getattr(self.weights, entry.name)
            if getattr(array, "dtype", None) != np.float32 or not np.isfinite(array).all():
                raise InputError(
                    f"weights {entry.name}: finite float32 numbers are needed, got"
                    f" {getattr(array, 'dtype', type(array).__name__)}"
                )

    @cached_property
    def factors(self) -> TableFactors:
        return tables.factor(self.weights, self.level)

    @cached_property
    def outputs(self) -> Outputs:
        return tables.outputs(self.factors, self.weights, exp_ulp=self.exp_ulp)

    @cached_property
    def tables(self) -> FoldedTables:
        return tables.fold(self.factors, self.weights, exp_ulp=self.exp_ulp)

    def floating(self) -> Problem:
        """Return the problem at level float64, where searches may work."""
        return self if self.level == "float64" else Problem(self.weights, "float64")


class Certified(Protocol):
    """Sequences that a verifier has certified."""

    def weigh(self, measure: Measure = ACCURACY) -> int:
        """Return their weight: an integer, exact."""


class Strategy(Protocol):
    """One way to prove; the fields say what its certificate needs (see
    `assay.proofs.max_of_k.certificate`).
    """

    @property
    def name(self) -> str: ...

    @property
    def rule(self) -> str: ...

    @property
    def about(self) -> str: ...

    @property
    def options(self) -> Mapping[str, Any]:
        """The options that the certificate's rule needs."""

    def seconds(self, weights: Weights) -> float:
        """Return about how many CPU seconds search and verification take, 0 for seconds at most."""

    def search(self, problem: Problem) -> Advice:
        """Return advice: whatever it holds, the verifier stays sound."""

    def verify(self, problem: Problem, advice: Advice) -> Certified:
        """Return what holds at the level of the problem."""

    def unexplained(self, weights: Weights) -> int:
        """Return the unexplained dimensions: how many numbers of the network the proof treats as
        a black box.
        """


@dataclass(frozen=True)
class Described:
    """The fields that every strategy has."""

    name: str
    rule: str
    about: str

    @property
    def options(self) -> Mapping[str, Any]:
        """The options that the certificate's rule needs: none, unless a strategy says so."""
        return {}

    def seconds(self, weights: Weights) -> float:
        """Return about how many CPU seconds search and verification take, 0 for seconds at most."""
        return 0.0
