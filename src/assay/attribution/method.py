"""What every attribution method shares: its scores are timed, checked to be finite, and labelled
with what they estimate.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from assay.attribution.scores import Estimand, Gap, Scores, require_scores
from assay.core.mechanisms import Mechanisms


class Estimate(NamedTuple):
    """The metric (examples,) and the value of every part, (examples, *axes) by group; path
    integrals add their completeness gaps.
    """

    baseline: Tensor
    values: Mapping[str, Tensor]
    gaps: Mapping[str, Gap] = {}


class Method(ABC):
    """One way to score every part of a bound mechanism: a subclass names itself and computes the
    values.
    """

    name: str
    estimand: Estimand = "single removal"
    exact = False
    backward: str | None = None

    @abstractmethod
    def estimate(self, mechanisms: Mechanisms) -> Estimate:
        """Return the metric and an estimate of F(ones) - F(gate at 0) for every part."""

    def scores(self, mechanisms: Mechanisms) -> Scores:
        """Return the estimate with its labels and its CPU time; InputError when a value is NaN
        or infinite.
        """
        began = time.process_time()
        baseline, values, gaps = self.estimate(mechanisms)
        require_scores(values)
        seconds = time.process_time() - began
        return Scores(
            mechanisms,
            values,
            baseline,
            self.name,
            self.estimand,
            exact=self.exact,
            gaps=gaps,
            cpu_seconds=seconds,
            backward=self.backward,
        )
