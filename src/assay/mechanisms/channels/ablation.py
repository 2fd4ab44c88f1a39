"""Exact ablation of every channel, by carrying the error of the state through the later blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from assay.mechanisms.channels.attribution import attribute_channels
from assay.mechanisms.channels.chunks import BUDGET, chunk_examples
from assay.mechanisms.channels.clean import Clean, last_gradient, normalise
from assay.mechanisms.channels.forms import interaction_forms, jacobians
from assay.progress import progress
from assay.targets.bilinear import GATES


@dataclass(frozen=True)
class Ablation:
    """The exact effect of switching off every channel, and how far first-order attribution is from
    it.

    `effects = F - F(channel k ablated)` and `errors = attribution - effects`. Where the blocks are
    polynomial the errors are summed on their own, so that they keep their relative accuracy however
    small they are."""

    effects: Float[Tensor, "examples blocks hidden"]
    errors: Float[Tensor, "examples blocks hidden"]


@torch.no_grad()
def ablate_channels(clean: Clean, *, budget: int = BUDGET) -> Ablation:
    """Return the exact effect of ablating every channel, one at a time, on every example.

    Ablating channel k of block l puts the error `e_l = -D[:,k] h_k` on the state, and then, exactly
    (arXiv 2410.08417 for the network),

        e_m = J_m e_{m-1} + b_m(e_{m-1}),   Delta_k = attr_k - sum_{m>l} e_{m-1}^T Q_m e_{m-1}.

    The last block's errors are zero and the last but one's come from static tables. Cross-entropy
    subtracts its own remainder `log sum p exp(W e) - p . W e` on top. With live norms or a gate
    nonlinearity the errors are carried through the blocks as they are, which is exact as well but
    costs more. `budget` bounds the bytes of the working arrays.

    Raises InputError when the budget does not hold one example.
    """
    attribution = attribute_channels(clean)
    polynomial = clean.weights.gate is None and not clean.live
    errors = torch.empty_like(attribution)
    for chunk in progress(chunk_examples(clean, budget), "ablating channels"):
        part = clean.take(chunk)
        errors[chunk] = (
            _polynomial_errors(part) if polynomial else attribution[chunk] - _carried_effects(part)
        )
    return Ablation(attribution - errors, errors)


def _polynomial_errors(clean: Clean) -> Tensor:
    count = len(clean.weights.layers)
    logit = clean.functional == "logit"
    jacobian = jacobians(clean, range(1, count - 1 if logit else count))
    last_form = interaction_forms(clean, [count - 1])[count - 1] if logit and count > 2 else None
    return torch.stack(
        [_block_errors(clean, block, jacobian, last_form) for block in range(count)], 1
    )


def _block_errors(
    clean: Clean, block: int, jacobian: dict[int, Tensor], last_form: Tensor | None
) -> Tensor:
    layers, last = clean.weights.layers, len(clean.weights.layers) - 1
    h = clean.hidden[block]
    total = torch.zeros_like(h)
    error = None
    for later in range(block + 1, last + 1):
        layer, scale = layers[later], clean.scale(later)
        weight = clean.gradients[later] @ layer.down
        ends = later == last and clean.functional == "logit"
        if error is None and not clean.weights.normed:
            # The error is still -h_k D[:,k], so both projections of it are tables of weights alone.
            table = (layer.left @ layers[block].down) * (layer.right @ layers[block].down)
            total += h.square() * (weight @ table)
            if not ends:
                error = h.square().unsqueeze(-1) * (layer.down @ table).T
                error -= h.unsqueeze(-1) * (jacobian[later] @ layers[block].down).mT
            continue
        if error is None:
            error = _first_error(clean, block)
        if ends and last_form is not None:
            total += ((error @ last_form) * error).sum(-1)
            continue
        product = (error @ layer.left.T).mul_(error @ layer.right.T)
        total += (product @ weight.unsqueeze(-1)).squeeze(-1)
        if not ends:
            error = torch.baddbmm(product @ layer.down.T, error, jacobian[later].mT)
            error = error if scale is None else error.mul_(scale.unsqueeze(1))
    total = clean.pool(total)
    if clean.functional == "cross_entropy":
        total += _remainder(clean, _first_error(clean, block) if error is None else error)
    return total


def _first_error(clean: Clean, block: int) -> Tensor:
    """Return `-D[:,k] h_k` behind the block's frozen norm, (rows, hidden, width)."""
    error = -clean.hidden[block].unsqueeze(-1) * clean.weights.layers[block].down.T
    scale = clean.scale(block)
    return error if scale is None else error * scale.unsqueeze(1)


def _remainder(clean: Clean, error: Tensor) -> Tensor:
    """Return what the cross-entropy gains over its linear part at the logits: `log sum p exp(dz)
    - p . dz`, never negative.
    """
    change = _logit_change(clean, error)
    log_p = clean.logits.log_softmax(-1).unsqueeze(1)
    p = log_p.exp()
    centred = change - (p * change).sum(-1, keepdim=True)
    # Small changes by the series of exp(c) - 1 - c: the logarithm of a sum near one would round the
    # remainder away.
    series = (
        centred.square()
        / 2
        * (
            1
            + centred
            / 3
            * (1 + centred / 4 * (1 + centred / 5 * (1 + centred / 6 * (1 + centred / 7))))
        )
    )
    small = (p * series).sum(-1).log1p()
    large = (log_p + centred).logsumexp(-1)
    return torch.where(centred.abs().amax(-1) < 0.03, small, large).clamp(min=0)


def _logit_change(clean: Clean, error: Tensor) -> Tensor:
    return clean.pool(error @ clean.weights.head.T) / clean.positions


def _carried_effects(clean: Clean) -> Tensor:
    layers = clean.weights.layers
    effects = []
    for block in range(len(layers)):
        error = _behind_norm(
            clean, block, -clean.hidden[block].unsqueeze(-1) * layers[block].down.T
        )
        for later in range(block + 1, len(layers)):
            layer = layers[later]
            left = clean.left[later].unsqueeze(1) + error @ layer.left.T
            gated = left if clean.weights.gate is None else GATES[clean.weights.gate](left)
            change = gated * (
                clean.right[later].unsqueeze(1) + error @ layer.right.T
            ) - clean.hidden[later].unsqueeze(1)
            error = _behind_norm(clean, later, error + change @ layer.down.T)
        linear = clean.pool((error @ last_gradient(clean).unsqueeze(-1)).squeeze(-1))
        effects.append(
            -linear - _remainder(clean, error) if clean.functional == "cross_entropy" else -linear
        )
    return torch.stack(effects, 1)


def _behind_norm(clean: Clean, block: int, error: Tensor) -> Tensor:
    if not clean.weights.normed:
        return error
    scale, layer = clean.scale(block), clean.weights.layers[block]
    if clean.frozen and scale is not None:
        return error * scale.unsqueeze(1)
    sums = clean.sums[block].unsqueeze(1)
    return normalise(layer, sums + error) - normalise(layer, sums)
