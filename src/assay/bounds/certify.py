"""Certified accuracy: the share of samples whose class provably survives every perturbation in a
ball.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from assay.bounds.convert import graph_of
from assay.bounds.graph import Graph
from assay.bounds.numbers import Array, as_array
from assay.bounds.propagate import bound
from assay.bounds.regions import ball
from assay.errors import InputError


@dataclass(frozen=True)
class CertifiedAccuracy:
    """A proved lower bound of accuracy under perturbation.

    margins: per sample, a lower bound of `min_k logit_label - logit_k` over the ball. A sample is
    certified where it is positive (ties are wrong)."""

    margins: Array
    radius: float
    norm: float
    level: str
    method: str
    assumptions: tuple[str, ...]

    @property
    def certified(self) -> NDArray[np.bool_]:
        """Which samples are certified."""
        return self.margins > 0

    @property
    def accuracy(self) -> Fraction:
        """The certified share of the samples."""
        return Fraction(int(self.certified.sum()), len(self.margins))


def certified_accuracy(
    model: nn.Module | Graph,
    inputs: Any,
    labels: Any,
    radius: float,
    *,
    domain: tuple[float, float] | None = None,
    norm: float = math.inf,
    method: str = "crown",
    level: str = "real",
) -> CertifiedAccuracy:
    """Bound the accuracy of a classifier from below over `|x - input| <= radius` in the infinity or
    2-norm, cut to the domain.

    inputs: (samples, *shape); labels: (samples,) integers; radius in units of the inputs. Every
    margin `logit_label - logit_k` is bounded as one linear function of the output, which is tighter
    than a bound per logit. Raises `InputError` on labels that do not fit, and as `graph_of` and
    `bound` do."""
    x, reach = as_array("inputs", inputs), as_array("radius", radius)
    if x.ndim == 0 or reach.shape != ():
        raise InputError(
            f"inputs (samples, *shape) and one radius are needed, got shapes {x.shape} and"
            f" {reach.shape}"
        )
    graph = model if isinstance(model, Graph) else graph_of(model, x.shape[1:])
    shape = graph.nodes[-1].shape
    if len(shape) != 1 or shape[0] < 2:
        raise InputError(
            f"a classifier needs at least two logits per sample, got an output of shape {shape}"
        )
    y = as_array("labels", labels)
    if y.shape != x.shape[:1] or np.any(y != np.floor(y)) or np.any(y < 0) or np.any(y >= shape[0]):
        raise InputError(
            f"labels: {len(x)} integers in 0..{shape[0] - 1} are needed, got shape {y.shape}"
        )
    one = np.eye(shape[0])[y.astype(int)]
    others = np.nonzero(1 - one)[1].reshape(len(y), shape[0] - 1)
    rows = one[:, None] - np.eye(shape[0])[others]
    found = bound(graph, ball(x, reach, domain, norm), method=method, level=level, objective=rows)
    return CertifiedAccuracy(
        found.lower.min(1), float(reach), norm, level, method, found.assumptions
    )
