"""Divergences between the outputs at `W` and at `W0`, and the exact metric each one puts on output
changes.

A divergence and its gradient vanish at `W0`, so its Hessian in the parameters is exactly `J^T M J`
with `J = dz/dW`: no derivative of the network beyond the first is needed (the Gauss-Newton
identity; arXiv 1412.1193)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from assay.errors import unknown


class Divergence(Protocol):
    """The outputs' last axis is the class or coordinate axis; every method broadcasts over the
    axes before it.
    """

    def value(self, output: Tensor, reference: Tensor) -> Tensor:
        """Return `D(output, reference)`, `(...)`; `reference` is the output at `W0` and takes no
        gradient.
        """

    def metric(self, tangent: Tensor, reference: Tensor) -> Tensor:
        """Return `M t`, `(..., o)`."""

    def form(self, tangent: Tensor, reference: Tensor) -> Tensor:
        """Return `t^T M t`, `(...)`."""

    def root(self, tangent: Tensor, reference: Tensor) -> Tensor:
        """Return a square root of the metric applied to `t`, `(..., o)`: `||root(t)||^2 =
        form(t)`.
        """

    def pull(self, output: Tensor, other: Tensor) -> Tensor:
        """Return the gradient of the divergence from another output, `d D(output, other) / d
        output`, `(..., o)`.
        """


@dataclass(frozen=True)
class KL:
    """`KL(p0 || p)` of softmax outputs, or `KL(p || p0)` with `reverse`; both have `M = diag(p0) -
    p0 p0^T`.

    `t^T M t` is the variance of the logit tangents under `p0`. Classes of probability zero never
    contribute."""

    reverse: bool = False

    def value(self, output: Tensor, reference: Tensor) -> Tensor:
        now, then = output.log_softmax(-1), reference.detach().log_softmax(-1)
        if self.reverse:
            return _expectation_of_difference(now.exp(), now, then)
        return _expectation_of_difference(then.exp(), then, now)

    def metric(self, tangent: Tensor, reference: Tensor) -> Tensor:
        p, centred = _centred(tangent, reference)
        return p * centred

    def form(self, tangent: Tensor, reference: Tensor) -> Tensor:
        p, centred = _centred(tangent, reference)
        return torch.einsum("...o,...o->...", centred.square_(), p)

    def root(self, tangent: Tensor, reference: Tensor) -> Tensor:
        p, centred = _centred(tangent, reference)
        return p.sqrt() * centred

    def pull(self, output: Tensor, other: Tensor) -> Tensor:
        p = output.softmax(-1)
        if not self.reverse:
            return p - other.softmax(-1)
        difference = torch.where(p > 0, output.log_softmax(-1) - other.log_softmax(-1), 0.0)
        return p * (difference - (p * difference).sum(-1, keepdim=True))


@dataclass(frozen=True)
class CrossEntropy(KL):
    """Cross-entropy against the soft labels `p0`, less its value at `W0`: `H(p0, p) - H(p0)`, which
    is `KL(p0 || p)`.

    Without the subtraction the cross-entropy is not zero at `W0`; its gradient and its Hessian are
    the same."""

    def value(self, output: Tensor, reference: Tensor) -> Tensor:
        then = reference.detach().log_softmax(-1)
        zero = torch.zeros_like(then)
        return _expectation_of_difference(
            then.exp(), zero, output.log_softmax(-1)
        ) - _expectation_of_difference(then.exp(), zero, then)


@dataclass(frozen=True)
class MSE:
    """`(1/o) ||y - y0||^2` of vector outputs; `M = (2/o) I`."""

    def value(self, output: Tensor, reference: Tensor) -> Tensor:
        return (output - reference.detach()).square().mean(-1)

    def metric(self, tangent: Tensor, reference: Tensor) -> Tensor:
        return tangent * (2 / tangent.shape[-1])

    def form(self, tangent: Tensor, reference: Tensor) -> Tensor:
        return 2 * tangent.square().mean(-1)

    def root(self, tangent: Tensor, reference: Tensor) -> Tensor:
        return tangent * (2 / tangent.shape[-1]) ** 0.5

    def pull(self, output: Tensor, other: Tensor) -> Tensor:
        return (output - other) * (2 / output.shape[-1])


DIVERGENCES: dict[str, Divergence] = {
    "kl": KL(),
    "reverse-kl": KL(reverse=True),
    "cross-entropy": CrossEntropy(),
    "mse": MSE(),
}


def divergence(name: str | Divergence) -> Divergence:
    """Return a divergence by its name (kl, reverse-kl, cross-entropy, mse)."""
    if not isinstance(name, str):
        return name
    if name not in DIVERGENCES:
        raise unknown("divergence", name, DIVERGENCES)
    return DIVERGENCES[name]


def _centred(tangent: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    p = reference.softmax(-1)
    if bool(torch.isinf(reference).any()):
        tangent = torch.where(p > 0, tangent, 0.0)
    # Two passes: the variance as a difference of moments cancels when the tangents share a large
    # mean.
    return p, tangent - torch.einsum("...o,...o->...", tangent, p).unsqueeze(-1)


def _expectation_of_difference(p: Tensor, a: Tensor, b: Tensor) -> Tensor:
    # The unused side of the outer `where` must be finite as well: its derivative is multiplied by
    # zero, not skipped.
    live = p > 0
    return torch.where(live, p * (torch.where(live, a, 0.0) - torch.where(live, b, 0.0)), 0.0).sum(
        -1
    )
