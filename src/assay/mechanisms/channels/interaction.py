"""What a block computes in one output direction, from the weights alone: a symmetric matrix and
its eigenvectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from assay.errors import InputError
from assay.mechanisms.channels.forms import quadratic_form
from assay.mechanisms.channels.weights import ChannelWeights, read_weights

# Relative slack for the rounding of the eigendecomposition in float64.
_SLACK = 1e-10


@dataclass(frozen=True)
class Interaction:
    """A block's quadratic form in one output direction, `z(x) = x^T Q x = sum_i lambda_i (v_i .
    x)^2`, in float64.

    Eigenvalues come by decreasing size; `vectors[:, i]` belongs to `values[i]`. `rank` is how many
    are kept."""

    matrix: Float[Tensor, "width width"]
    values: Float[Tensor, " width"]
    vectors: Float[Tensor, "width width"]
    rank: int

    def truncate(self, rank: int) -> Interaction:
        """Return the same form with the `rank` eigenvectors of largest eigenvalue, by size,
        kept.
        """
        if not 0 <= rank <= len(self.values):
            raise InputError(f"rank must lie in 0..{len(self.values)}, got {rank}")
        return Interaction(self.matrix, self.values, self.vectors, rank)

    def evaluate(self, states: Float[Tensor, "rows width"]) -> Float[Tensor, " rows"]:
        """Return `z_r(x)`, the sum over the kept eigenvectors."""
        along = states.to(self.vectors.dtype) @ self.vectors[:, : self.rank]
        return along.square() @ self.values[: self.rank]

    def error_bound(self, states: Float[Tensor, "rows width"]) -> Float[Tensor, " rows"]:
        """Return a certified bound `|z - z_r| <= max_{i > r} |lambda_i| ||x||^2`, at level
        float64.
        """
        dropped = self.values[self.rank :].abs()
        largest = dropped.max() if len(dropped) else self.values.new_zeros(())
        slack = _SLACK * self.values.abs().max()
        return (largest + slack) * states.to(self.values.dtype).square().sum(-1) * (1 + _SLACK)


def interaction_matrix(
    model: nn.Module | ChannelWeights, block: int, direction: Float[Tensor, " width"]
) -> Interaction:
    """Return the form `Q = 1/2 sum_j (D^T u)_j (L_j R_j^T + R_j L_j^T)` of a block in the output
    direction `u`.

    `x^T Q x = u . D (L x * R x)` is what the block writes along `u` when it reads `x` (arXiv
    2410.08417); for a class, take its row of the head's weight. `block` may be negative, counting
    from the end.

    Raises InputError for a gate nonlinearity, a block that does not exist, or a direction of
    another width or not finite."""
    weights = model if isinstance(model, ChannelWeights) else read_weights(model)
    weights.require_polynomial("the interaction matrix of a block")
    count = len(weights.layers)
    if not -count <= block < count:
        raise InputError(f"block must lie in 0..{count - 1}, got {block}")
    if direction.shape != (weights.width,) or not bool(torch.isfinite(direction).all()):
        raise InputError(
            f"direction must be {weights.width} finite numbers, got shape {tuple(direction.shape)}"
        )
    layer = weights.layers[block]
    wide = type(layer)(layer.left.double(), layer.right.double(), layer.down.double())
    with torch.no_grad():
        matrix = quadratic_form(wide, direction.double())
        values, vectors = torch.linalg.eigh(matrix)
    order = values.abs().argsort(descending=True)
    return Interaction(matrix, values[order], vectors[:, order], len(values))
