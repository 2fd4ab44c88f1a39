"""The clean pass: the states of every block, and the gradient of the functional there, in closed
form.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.errors import InputError, unknown
from assay.io.files import require_finite
from assay.mechanisms.channels.weights import ChannelWeights, Layer
from assay.targets.bilinear import GATES

Functional = Literal["logit", "cross_entropy"]

_PER_ROW = ("before", "left", "right", "hidden", "sums", "gradients")


@dataclass(frozen=True)
class Clean:
    """What the network computes on a batch when no channel is ablated.

    Rows are examples times positions (one position unless the network reads patches). For block l,
    `before[l]` is the state it reads, `left[l]`, `right[l]` its two projections, `hidden[l]` the
    channels' coefficients h, `sums[l]` the state before the norm (the state after the block where
    there is none) and `gradients[l]` the gradient of the functional there. With `frozen`, the root
    mean squares of the norms are constants: gradients, effects and certificates are those of a
    network that keeps them under ablation."""

    weights: ChannelWeights
    functional: Functional
    labels: Int[Tensor, " examples"]
    frozen: bool
    before: tuple[Float[Tensor, "rows width"], ...]
    left: tuple[Float[Tensor, "rows hidden"], ...]
    right: tuple[Float[Tensor, "rows hidden"], ...]
    hidden: tuple[Float[Tensor, "rows hidden"], ...]
    sums: tuple[Float[Tensor, "rows width"], ...]
    gradients: tuple[Float[Tensor, "rows width"], ...]
    logits: Float[Tensor, "examples classes"]

    @property
    def positions(self) -> int:
        return self.weights.positions

    @property
    def live(self) -> bool:
        """Whether the network has norms whose scale moves under ablation."""
        return self.weights.normed and not self.frozen

    def pool(self, rows: Tensor) -> Tensor:
        """Sum rows over the positions of each example."""
        return (
            rows
            if self.positions == 1
            else rows.reshape(-1, self.positions, *rows.shape[1:]).sum(1)
        )

    def scale(self, block: int) -> Float[Tensor, "rows width"] | None:
        """Return the factor, entry by entry, of a frozen norm: gain / rms; None where there is
        no norm.
        """
        layer = self.weights.layers[block]
        return (
            None
            if layer.gain is None
            else layer.gain / root_mean_square(self.sums[block], layer.epsilon)
        )

    def take(self, examples: slice) -> Clean:
        """Return the clean pass of some of the examples."""
        start, stop, _ = examples.indices(len(self.labels))
        rows = slice(start * self.positions, stop * self.positions)
        parts: dict[str, Any] = {
            name: tuple(tensor[rows] for tensor in getattr(self, name)) for name in _PER_ROW
        }
        return replace(self, labels=self.labels[examples], logits=self.logits[examples], **parts)


def run_clean(
    weights: ChannelWeights,
    inputs: Tensor,
    labels: Tensor,
    functional: Functional = "logit",
    *,
    frozen: bool = False,
    check: bool = True,
) -> Clean:
    """Run the network and differentiate the functional F: the logit of the label, or the
    cross-entropy.

    `g_{m-1} = g_m + L^T (R x * D^T g_m) + R^T (L x * D^T g_m)`, written as tensor operations so
    that a loss may be built on it. `labels` are classes, one per example. With `check`, inputs and
    labels are validated, which reads them back to the host.

    Raises InputError for an unknown functional, wrong shapes, labels out of range, NaN, or `frozen`
    without a norm."""
    if functional not in ("logit", "cross_entropy"):
        raise unknown("functional", functional, ("logit", "cross_entropy"))
    if frozen and not weights.normed:
        raise InputError("frozen=True needs a network with RMSNorm; this one has none")
    if check:
        _check(weights, inputs, labels)
    state = weights.first(inputs)
    before, left, right, hidden, sums = [], [], [], [], []
    for layer in weights.layers:
        a, r = state @ layer.left.T, state @ layer.right.T
        h = (a if weights.gate is None else GATES[weights.gate](a)) * r
        before.append(state)
        left.append(a)
        right.append(r)
        hidden.append(h)
        sums.append(state + h @ layer.down.T)
        state = normalise(layer, sums[-1])
    clean = Clean(
        weights,
        functional,
        labels,
        frozen,
        tuple(before),
        tuple(left),
        tuple(right),
        tuple(hidden),
        tuple(sums),
        gradients=(),
        logits=logits(weights, state),
    )
    return replace(clean, gradients=_gradients(clean))


def logits(weights: ChannelWeights, states: Tensor) -> Tensor:
    """Return the head's output on the last states, averaged over positions."""
    if weights.positions > 1:
        states = states.reshape(-1, weights.positions, weights.width).mean(1)
    return states @ weights.head.T


def last_gradient(clean: Clean) -> Float[Tensor, "rows width"]:
    """Return the gradient at the last state: `W_y`, or `W^T (p - y)`, shared evenly by the
    positions.
    """
    weights = clean.weights
    if clean.functional == "logit":
        gradient = weights.head[clean.labels]
    else:
        errors = clean.logits.softmax(-1) - torch.nn.functional.one_hot(
            clean.labels, clean.logits.shape[1]
        )
        gradient = errors.to(weights.head.dtype) @ weights.head
    return (
        gradient
        if clean.positions == 1
        else (gradient / clean.positions).repeat_interleave(clean.positions, 0)
    )


def root_mean_square(sums: Tensor, epsilon: float) -> Tensor:
    """Return `sqrt(mean(y^2) + epsilon)` of every row, with a trailing axis of one."""
    return (sums.square().mean(-1, keepdim=True) + epsilon).sqrt()


def normalise(layer: Layer, sums: Tensor) -> Tensor:
    """Return RMSNorm of the last axis, or the sums themselves where the block has no norm."""
    return sums if layer.gain is None else layer.gain * sums / root_mean_square(sums, layer.epsilon)


def norm_transpose(clean: Clean, block: int, gradient: Tensor) -> Tensor:
    """Return `DN^T g`, the gradient before the norm of a block, given the one after it (arXiv
    1910.07467).
    """
    layer = clean.weights.layers[block]
    if layer.gain is None:
        return gradient
    sums = clean.sums[block]
    rms = root_mean_square(sums, layer.epsilon)
    scaled = layer.gain * gradient / rms
    if clean.frozen:
        return scaled
    return scaled - sums * (sums * scaled).mean(-1, keepdim=True) / rms.square()


def _gradients(clean: Clean) -> tuple[Tensor, ...]:
    weights = clean.weights
    gradient = last_gradient(clean)
    found = []
    for block in reversed(range(len(weights.layers))):
        layer, a, r = weights.layers[block], clean.left[block], clean.right[block]
        gradient = norm_transpose(clean, block, gradient)
        found.append(gradient)
        back = gradient @ layer.down
        if weights.gate is None:
            on_left, on_right = back * r, back * a
        else:
            slope: Tensor = torch.func.jvp(GATES[weights.gate], (a,), (torch.ones_like(a),))[1]
            on_left, on_right = back * r * slope, back * GATES[weights.gate](a)
        gradient = gradient + on_left @ layer.left + on_right @ layer.right
    return tuple(reversed(found))


def _check(weights: ChannelWeights, inputs: Tensor, labels: Tensor) -> None:
    if not isinstance(inputs, Tensor) or inputs.ndim < 2 or not len(inputs):
        raise InputError("inputs must be a tensor (examples, entries) with at least one example")
    if labels.shape != (len(inputs),) or labels.is_floating_point():
        raise InputError(
            f"labels must be {len(inputs)} integer classes, got {labels.dtype} of shape"
            f" {tuple(labels.shape)}"
        )
    classes = weights.head.shape[0]
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise InputError(
            f"labels must lie in 0..{classes - 1}, got {int(labels.min())}..{int(labels.max())}"
        )
    require_finite(inputs, "inputs")
