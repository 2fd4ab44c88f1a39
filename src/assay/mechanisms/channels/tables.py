"""Exact effects of the last two blocks' channels from static tables: no backward pass, no scan."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.errors import InputError
from assay.mechanisms.channels.weights import ChannelWeights


@dataclass(frozen=True)
class Tables:
    """What channels of the last two blocks do to the logits and to each other, for every input
    (arXiv 2410.08417).

    `last = W D_n` is a last-block channel's effect on the logits per unit of h, `skip = W D_{n-1}`
    the same for the block before along the residual stream, and `left = L_n D_{n-1}`, `right = R_n
    D_{n-1}` are what one of its channels adds to the projections that each last-block channel
    reads."""

    last: Float[Tensor, "classes hidden"]
    skip: Float[Tensor, "classes hidden"]
    left: Float[Tensor, "hidden hidden"]
    right: Float[Tensor, "hidden hidden"]


def build_tables(weights: ChannelWeights) -> Tables:
    """Return the tables of a network with at least two blocks.

    Raises InputError for one block, norms, or a gate nonlinearity: the tables would depend on the
    input."""
    weights.require_polynomial("a static table")
    if weights.normed:
        raise InputError(
            "static tables need a network without norms: a norm's scale depends on the input"
        )
    if len(weights.layers) < 2:
        raise InputError("static tables are those of the last two blocks; the network has one")
    before, last = weights.layers[-2:]
    return Tables(
        weights.head @ last.down,
        weights.head @ before.down,
        last.left @ before.down,
        last.right @ before.down,
    )


@torch.no_grad()
def ablate_last_two(
    tables: Tables,
    labels: Int[Tensor, " examples"],
    before: Float[Tensor, "examples hidden"],
    left: Float[Tensor, "examples hidden"],
    right: Float[Tensor, "examples hidden"],
) -> Float[Tensor, "examples 2 hidden"]:
    """Return the exact effect on the label's logit of ablating every channel of the last two
    blocks.

    `before` are the coefficients h of the last block but one, `left` and `right` the projections of
    the last block. With `w = (W D_n)_y`, a channel k of the last block is worth `w_k h_k`, and one
    of the block before `h_k (skip_yk + sum_j w_j (left_jk R_j + right_jk L_j)) - h_k^2 sum_j w_j
    left_jk right_jk`."""
    weight = tables.last[labels]
    linear = tables.skip[labels] + (weight * right) @ tables.left + (weight * left) @ tables.right
    bent = weight @ (tables.left * tables.right)
    return torch.stack([before * linear - before.square() * bent, weight * left * right], 1)
