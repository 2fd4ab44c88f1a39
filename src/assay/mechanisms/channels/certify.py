"""Certificates: how far a channel's attribution can be from its exact ablation, computed without
ablating.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from assay.errors import InputError, unknown
from assay.mechanisms.channels.attribution import attribute_channels
from assay.mechanisms.channels.chunks import BUDGET, chunk_examples
from assay.mechanisms.channels.clean import Clean
from assay.mechanisms.channels.norms import SLACK, Norms, Sizes, norm_length
from assay.mechanisms.channels.rounding import Rounding
from assay.mechanisms.channels.second_order import half_curvatures
from assay.progress import progress

Ablated = Literal["plain", "frozen", "live"]


@dataclass(frozen=True)
class Certificates:
    """Bounds on the error of the given attribution, each (examples, blocks, hidden).

    `|Delta - attribution| <= first` (the first-order bound, from the size of the step alone), and,
    where the tight recursion holds, `|Delta - (attribution - q)| <= second` (the second-order
    bound) and `|Delta - attribution| <= |q| + second`, `q` the curvature.

    `level` is "float64" or "real". At float64 the bounds hold between numbers computed in float64,
    of the network with these weights: attributions and effects by the closed forms or through
    gates, with slack on the norms and with `rounding`, which is part of `first` and of `second`,
    for the rounding of those numbers. At real they hold for the network over the real numbers.
    `ablation` says whether norms move when a channel is ablated: "frozen" certifies only the
    network that keeps their scale, "live" the real ablation, "plain" a network without norms."""

    attribution: Float[Tensor, "examples blocks hidden"]
    first: Float[Tensor, "examples blocks hidden"]
    curvature: Float[Tensor, "examples blocks hidden"] | None
    second: Float[Tensor, "examples blocks hidden"] | None
    rounding: Float[Tensor, "examples blocks hidden"]
    level: Literal["float64", "real"]
    ablation: Ablated

    @property
    def exact(self) -> Bool[Tensor, "examples blocks hidden"]:
        """Where the attribution is exact but for rounding (the last block's): such a channel needs
        no certificate.
        """
        return self.first <= self.rounding

    @property
    def first_tight(self) -> Float[Tensor, "examples blocks hidden"]:
        """The bound `|q| + second` on first-order attribution."""
        if self.curvature is None or self.second is None:
            raise InputError("the tight certificate was not computed; certify with tight=True")
        total = self.curvature.abs() + self.second
        return torch.where(
            self.curvature == 0, total, torch.nextafter(total, torch.full_like(total, math.inf))
        )


def certify_channels(
    clean: Clean, *, tight: bool = True, norms: Norms = "spectral", budget: int = BUDGET
) -> Certificates:
    """Return certificates for every channel on every example, at level float64 (see
    `Certificates`).

    With `alpha_m >= ||J_m||`, `beta_m = ||D_m|| min(||L_m||_{2,inf} ||R_m||, ||R_m||_{2,inf}
    ||L_m||)` and the step `delta = ||D[:,k]|| |h_k|`, the first-order bound is

        sum_{m>l} ||Q_m|| eps_{m-1}^2,   eps_l = delta,   eps_m = alpha_m eps_{m-1} + beta_m
        eps_{m-1}^2,

    and the second-order one carries the linear part t exactly and bounds the rest by rho.
    Cross-entropy adds `range(W e)^2 / 8`; a live norm adds its remainder
    `(sqrt d max|gain| / sqrt 3) u^2 / (||y|| - u)^2`. Norms come from singular values or are
    Frobenius norms, never from power iteration, which bounds from below.

    Raises InputError for a gate nonlinearity, weights that are not float64, or `tight` with live
    norms."""
    if norms not in ("spectral", "frobenius"):
        raise unknown("norms", norms, ("spectral", "frobenius"))
    clean.weights.require_polynomial("a certificate")
    if clean.weights.head.dtype != torch.float64:
        raise InputError(
            f"certificates are computed in float64, the weights are {clean.weights.head.dtype}; use"
            " read_weights(model, torch.float64)"
        )
    if tight and clean.live:
        raise InputError(
            "the tight certificate needs norms whose scale does not move: a live RMSNorm adds a"
            " cubic remainder that it does not bound. Use tight=False, or run_clean(...,"
            " frozen=True) to certify the frozen ablation"
        )
    with torch.no_grad():
        parts = [
            _certify(clean.take(chunk), tight, norms)
            for chunk in progress(chunk_examples(clean, budget), "certifying channels")
        ]
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    first, rounding = columns[:2]
    attribution = attribute_channels(clean).detach()
    ablation: Ablated = "live" if clean.live else "frozen" if clean.weights.normed else "plain"
    curvature, second = (columns[2], columns[3]) if tight else (None, None)
    return Certificates(attribution, first, curvature, second, rounding, "float64", ablation)


def certify_relative(
    bound: Tensor, estimate: Tensor, tolerance: float = 0.1
) -> Bool[Tensor, "*any"]:
    """Return where a bound on `|Delta - estimate|` proves a relative error of at most `tolerance`.

    `B <= rho |estimate| / (1 + rho)` implies `|Delta - estimate| <= rho |Delta|`.

    Raises InputError when the tolerance is not positive.
    """
    if not tolerance > 0:
        raise InputError(f"tolerance must be above 0, got {tolerance}")
    return bound <= tolerance * estimate.abs() / (1 + tolerance)


def _certify(clean: Clean, tight: bool, norms: Norms) -> tuple[Tensor, ...]:
    blocks = range(len(clean.weights.layers))
    sizes = Sizes(clean, norms)
    rounding = Rounding(clean, sizes)
    bounds, slacks = zip(*(_scalar(clean, block, sizes, rounding) for block in blocks), strict=True)
    slack = torch.stack(slacks, 1)
    first = torch.stack(bounds, 1) + slack
    if not tight:
        return first, slack
    second = torch.stack([_tight(clean, block, sizes) for block in blocks], 1) + slack
    return first, slack, half_curvatures(clean), second


def _scalar(clean: Clean, block: int, sizes: Sizes, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """Return the first-order bound of a block's channels, and what rounding adds to it."""
    step = clean.weights.layers[block].down.norm(dim=0) * clean.hidden[block].abs()
    scale = clean.scale(block)
    if clean.frozen and scale is not None:
        step = (scale.square() @ clean.weights.layers[block].down.square()).sqrt() * clean.hidden[
            block
        ].abs()
    step, bound = step * (1 + SLACK), torch.zeros_like(step)
    if clean.live:
        left_over = _norm_remainder(clean, block, step, sizes)
        bound = bound + sizes.behind(clean, block) * left_over
        step = sizes.norm[block] * step + left_over
    steps = [step]
    for m in range(block + 1, len(clean.weights.layers)):
        bound = bound + sizes.bend[m] * step.square()
        curved = sizes.product[m] * step.square()
        if clean.live:
            left_over = _norm_remainder(clean, m, sizes.state[m] * step + curved, sizes)
            bound = bound + sizes.behind(clean, m) * left_over
            step = sizes.through[m] * step + sizes.norm[m] * curved + left_over
        else:
            step = sizes.through[m] * step + (sizes.norm[m] * curved if m in sizes.norm else curved)
        steps.append(step)
    bound = clean.pool(bound)
    if clean.functional == "cross_entropy":
        bound = bound + (sizes.spread * clean.pool(step) / clean.positions).square() / 8
    # Infinity times zero: an overflowed norm bounds nothing.
    bound = torch.nan_to_num(bound * (1 + SLACK), nan=math.inf, posinf=math.inf)
    return bound, rounding.slack(block, steps, bound)


def _tight(clean: Clean, block: int, sizes: Sizes) -> Tensor:
    layers, scale = clean.weights.layers, clean.scale(block)
    linear = -clean.hidden[block].unsqueeze(-1) * layers[block].down.T
    linear = linear if scale is None else linear * scale.unsqueeze(1)
    rest = torch.zeros_like(clean.hidden[block])
    bound = torch.zeros_like(rest)
    for m in range(block + 1, len(layers)):
        layer, scale = layers[m], clean.scale(m)
        size = linear.norm(dim=-1) * (1 + SLACK)
        slope = (linear @ sizes.form[m]).norm(dim=-1) * (1 + SLACK)
        bound = bound + 2 * slope * rest + sizes.bend[m] * rest.square()
        if m == len(layers) - 1 and clean.functional == "logit":
            break
        product = ((linear @ layer.left.T) * (linear @ layer.right.T)) @ layer.down.T
        linear = linear @ sizes.jacobian[m].mT
        if scale is not None:
            product, linear = product * scale.unsqueeze(1), linear * scale.unsqueeze(1)
        curved = sizes.product[m] * (2 * size * rest + rest.square())
        curved = sizes.norm[m] * curved if m in sizes.norm else curved
        rest = sizes.through[m] * rest + product.norm(dim=-1) * (1 + SLACK) + curved
    bound = clean.pool(bound)
    if clean.functional == "cross_entropy":
        change = clean.pool(linear @ clean.weights.head.T) / clean.positions
        spread = (
            change.amax(-1) - change.amin(-1) + sizes.spread * clean.pool(rest) / clean.positions
        )
        bound = bound + spread.square() / 8
    return torch.nan_to_num(bound * (1 + SLACK), nan=math.inf, posinf=math.inf)


def _norm_remainder(clean: Clean, block: int, step: Tensor, sizes: Sizes) -> Tensor:
    """Bound `||N(y + u) - N(y) - DN u||` for `||u|| <= step`: the Taylor remainder, or, far out,
    the diameter of N's range.
    """
    length, reach = norm_length(clean, block)
    far = 2 * reach + sizes.norm[block] * step
    near = reach / math.sqrt(3) * step.square() / (length - step).square()
    return torch.where(step < length, torch.minimum(near, far), far) * (1 + SLACK)
