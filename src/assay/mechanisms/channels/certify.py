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
from assay.mechanisms.channels.clean import Clean, last_gradient
from assay.mechanisms.channels.forms import interaction_forms, jacobians, norm_jacobian
from assay.mechanisms.channels.second_order import half_curvatures

# Relative slack on every norm: far above the rounding of float64 singular values, far below
# anything reported.
SLACK = 1e-10

Norms = Literal["spectral", "frobenius"]
Ablated = Literal["plain", "frozen", "live"]


@dataclass(frozen=True)
class Certificates:
    """Bounds on the error of the given attribution, each (examples, blocks, hidden).

    `|Delta - attribution| <= first` (scalar), and, where the tight recursion holds, `|Delta -
    (attribution - q)| <= second` and `|Delta - attribution| <= |q| + second`, `q` the curvature.
    `level` is "float64" (true for the computed numbers, with slack on the norms) or "real" (true
    for the network over the real numbers). `ablation` says whether norms move when a channel is
    ablated: "frozen" certifies only the network that keeps their scale, "live" the real ablation,
    "plain" a network without norms."""

    attribution: Float[Tensor, "examples blocks hidden"]
    first: Float[Tensor, "examples blocks hidden"]
    curvature: Float[Tensor, "examples blocks hidden"] | None
    second: Float[Tensor, "examples blocks hidden"] | None
    level: Literal["float64", "real"]
    ablation: Ablated

    @property
    def first_tight(self) -> Float[Tensor, "examples blocks hidden"]:
        """The bound `|q| + second` on first-order attribution."""
        if self.curvature is None or self.second is None:
            raise InputError("the tight certificate was not computed; certify with tight=True")
        total = self.curvature.abs() + self.second
        return torch.where(
            self.second == 0, total, torch.nextafter(total, torch.full_like(total, math.inf))
        )


def certify_channels(
    clean: Clean, *, tight: bool = True, norms: Norms = "spectral", budget: int = BUDGET
) -> Certificates:
    """Return certificates for every channel on every example, at level float64.

    With `alpha_m >= ||J_m||`, `beta_m = ||D_m|| min(||L_m||_{2,inf} ||R_m||, ||R_m||_{2,inf}
    ||L_m||)` and the step `delta = ||D[:,k]|| |h_k|`, the scalar certificate is

        eps_l = delta,   eps_m = alpha_m eps_{m-1} + beta_m eps_{m-1}^2,   B1 = sum_{m>l} ||Q_m||
        eps_{m-1}^2,

    and the tight one carries the linear part t exactly and bounds the rest by rho. Cross-entropy
    adds `range(W e)^2 / 8`; a live norm adds its remainder `(sqrt d max|gain| / sqrt 3) u^2 /
    (||y|| - u)^2`. Norms come from singular values or are Frobenius norms, never from power
    iteration, which bounds from below.

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
            _certify(clean.take(chunk), tight, norms) for chunk in chunk_examples(clean, budget)
        ]
    first, curvature, second = (
        torch.cat(column) if tight or not index else None
        for index, column in enumerate(zip(*parts, strict=True))
    )
    assert first is not None
    attribution = attribute_channels(clean).detach()
    ablation: Ablated = "live" if clean.live else "frozen" if clean.weights.normed else "plain"
    return Certificates(attribution, first, curvature, second, "float64", ablation)


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


def _certify(clean: Clean, tight: bool, norms: Norms) -> tuple[Tensor, Tensor, Tensor]:
    blocks = len(clean.weights.layers)
    sizes = _Sizes(clean, norms)
    first = torch.stack([_scalar(clean, block, sizes) for block in range(blocks)], 1)
    if not tight:
        return first, first, first
    second = torch.stack([_tight(clean, block, sizes) for block in range(blocks)], 1)
    return first, half_curvatures(clean), second


class _Sizes:
    """Norms, from above, of everything that the recursions need, shared by the channels of a
    block.
    """

    def __init__(self, clean: Clean, norms: Norms):
        blocks = range(1, len(clean.weights.layers))
        self.jacobian, self.form = jacobians(clean, blocks), interaction_forms(clean, blocks)
        self.state = {m: _norm(jacobian, norms) for m, jacobian in self.jacobian.items()}
        self.bend = {m: _symmetric_norm(form, norms) for m, form in self.form.items()}
        self.through = dict(self.state)
        self.norm: dict[int, Tensor] = {}
        self.product: dict[int, Tensor | float] = {
            m: _product_bound(clean, m, norms) for m in blocks
        }
        for m in range(len(clean.weights.layers)):
            scale = clean.scale(m)
            if scale is None:
                continue
            derivative = norm_jacobian(clean, m)
            assert derivative is not None
            self.norm[m] = (
                scale.abs().amax(-1, keepdim=True) * (1 + SLACK)
                if clean.frozen
                else _norm(derivative, norms)
            )
            if m:
                self.through[m] = _norm(derivative @ self.jacobian[m], norms)
        head = clean.weights.head
        self.spread = float(
            torch.cdist(head, head, compute_mode="donot_use_mm_for_euclid_dist").max()
        ) * (1 + SLACK)


def _scalar(clean: Clean, block: int, sizes: _Sizes) -> Tensor:
    step = clean.weights.layers[block].down.norm(dim=0) * clean.hidden[block].abs()
    scale = clean.scale(block)
    if clean.frozen and scale is not None:
        step = (scale.square() @ clean.weights.layers[block].down.square()).sqrt() * clean.hidden[
            block
        ].abs()
    step, bound = step * (1 + SLACK), torch.zeros_like(step)
    if clean.live:
        left_over = _norm_remainder(clean, block, step, sizes)
        bound = bound + _behind(clean, block, sizes) * left_over
        step = sizes.norm[block] * step + left_over
    for m in range(block + 1, len(clean.weights.layers)):
        bound = bound + sizes.bend[m] * step.square()
        curved = sizes.product[m] * step.square()
        if clean.live:
            left_over = _norm_remainder(clean, m, sizes.state[m] * step + curved, sizes)
            bound = bound + _behind(clean, m, sizes) * left_over
            step = sizes.through[m] * step + sizes.norm[m] * curved + left_over
        else:
            step = sizes.through[m] * step + (sizes.norm[m] * curved if m in sizes.norm else curved)
    bound = clean.pool(bound)
    if clean.functional == "cross_entropy":
        bound = bound + (sizes.spread * clean.pool(step) / clean.positions).square() / 8
    # Infinity times zero: an overflowed norm bounds nothing.
    return torch.nan_to_num(bound * (1 + SLACK), nan=math.inf, posinf=math.inf)


def _tight(clean: Clean, block: int, sizes: _Sizes) -> Tensor:
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


def _norm_remainder(clean: Clean, block: int, step: Tensor, sizes: _Sizes) -> Tensor:
    """Bound `||N(y + u) - N(y) - DN u||` for `||u|| <= step`: the Taylor remainder, or, far out,
    the diameter of N's range.
    """
    layer, sums = clean.weights.layers[block], clean.sums[block]
    assert layer.gain is not None
    width = sums.shape[-1]
    # An epsilon acts like one more, constant, entry of the state; so it lengthens y.
    length = (sums.square().sum(-1, keepdim=True) + width * layer.epsilon).sqrt()
    reach = math.sqrt(width) * float(layer.gain.abs().max())
    far = 2 * reach + sizes.norm[block] * step
    near = reach / math.sqrt(3) * step.square() / (length - step).square()
    return torch.where(step < length, torch.minimum(near, far), far) * (1 + SLACK)


def _behind(clean: Clean, block: int, sizes: _Sizes) -> Tensor:
    """Return the norm of the gradient behind the block's norm, (rows, 1)."""
    if block == len(clean.weights.layers) - 1:
        gradient = last_gradient(clean)
    else:
        gradient = (clean.gradients[block + 1].unsqueeze(-2) @ sizes.jacobian[block + 1]).squeeze(
            -2
        )
    return gradient.norm(dim=-1, keepdim=True) * (1 + SLACK)


def _product_bound(clean: Clean, block: int, norms: Norms) -> Tensor:
    layer = clean.weights.layers[block]
    rows = [
        matrix.norm(dim=1).max() * _norm(other, norms)
        for matrix, other in ((layer.left, layer.right), (layer.right, layer.left))
    ]
    return (_norm(layer.down, norms) * torch.minimum(*rows)).squeeze() * (1 + SLACK)


def _norm(matrix: Tensor, norms: Norms) -> Tensor:
    """Return an upper bound of the spectral norm with a trailing axis of one; infinite where the
    matrix overflowed.
    """
    finite = torch.isfinite(matrix).all(-1).all(-1)
    safe = torch.where(finite[..., None, None], matrix, torch.zeros_like(matrix))
    size = (
        torch.linalg.svdvals(safe)[..., 0]
        if norms == "spectral"
        else torch.linalg.matrix_norm(safe)
    )
    return torch.where(finite, size * (1 + SLACK), torch.full_like(size, math.inf)).unsqueeze(-1)


def _symmetric_norm(matrix: Tensor, norms: Norms) -> Tensor:
    if norms == "frobenius":
        return _norm(matrix, norms)
    finite = torch.isfinite(matrix).all(-1).all(-1)
    safe = torch.where(finite[..., None, None], matrix, torch.zeros_like(matrix))
    size = torch.linalg.eigvalsh(safe).abs().amax(-1)
    return torch.where(finite, size * (1 + SLACK), torch.full_like(size, math.inf)).unsqueeze(-1)
