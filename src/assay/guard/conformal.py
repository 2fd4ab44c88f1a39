"""Conformal p-values, and one p-value from several tests.

A test's p-value is `(1 + #{calibration score >= score}) / (1 + #calibration)`: under
exchangeability it is at most a with probability at most a. The combination is Fisher's sum
`-sum_k w_k log r_k` of ranks r_k against reference inputs, and its own conformal p-value against
the calibration inputs: its level does not depend on how the tests depend on one another, nor on the
reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from assay.errors import InputError


@dataclass(frozen=True)
class Ranks:
    """Reference scores of tests, each sorted, (tests, inputs), and which tests are two-sided."""

    reference: Float[Tensor, "tests inputs"]
    two_sided: tuple[bool, ...]

    def __call__(self, scores: Float[Tensor, "tests inputs"]) -> Float[Tensor, "tests inputs"]:
        """Return p-values of scores against the reference, zero where a score is NaN; two-sided
        ones are `min(1, 2 min(upper, lower))`.
        """
        if not scores.shape[1]:
            return scores.double()
        rows, size = scores.contiguous(), self.reference.shape[1]
        below = torch.searchsorted(self.reference, rows)
        upper = (size - below + 1).double() / (size + 1)
        for test, both in enumerate(self.two_sided):
            if both:
                through = torch.searchsorted(self.reference[test], rows[test], right=True)
                lower = (through + 1).double() / (size + 1)
                upper[test] = (2 * torch.minimum(upper[test], lower)).clamp_max(1)
        return upper.masked_fill(scores.isnan(), 0.0)


def ranks(scores: Float[Tensor, "tests inputs"], two_sided: Sequence[bool]) -> Ranks:
    """Sort reference scores; InputError when there are none, or one is NaN."""
    if not scores.shape[1]:
        raise InputError("the split that p-values are taken against is empty; give more inputs")
    if bool(scores.isnan().any()):
        raise InputError("a reference score is NaN; a laboratory must be finite")
    return Ranks(scores.sort(1).values, tuple(two_sided))


def combine(
    p_values: Float[Tensor, "tests inputs"], weights: Float[Tensor, " tests"]
) -> Float[Tensor, " inputs"]:
    """Return Fisher's weighted sum `-sum_k w_k log p_k`, infinite where one is zero."""
    # Rounded, so that equal inputs tie whatever the number of inputs that were scored at once.
    found = -(weights[:, None].double() * p_values.log()).sum(0)
    return found.float().double()


def level(statistic: Tensor, calibration: Float[Tensor, " inputs"]) -> Float[Tensor, " inputs"]:
    """Return conformal p-values of a statistic against sorted calibration values of it."""
    size = len(calibration)
    below = torch.searchsorted(calibration, statistic.contiguous())
    return (size - below + 1).double() / (size + 1)
