"""The hinge of certificates of a bilinear block, whose interactions are exact and quadratic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.mechanisms.crosscoder.objective import Folded
from assay.targets.bilinear import BilinearNetwork


@dataclass(frozen=True)
class QuadraticHinge:
    """How far the proved margins of a network of one bilinear block lie below `margin`, mean over
    rows: that of rhat_0 less `||g|| ||eps_0|| + lambda ||eps_0||^2`, see
    `assay.proofs.crosscoder.bilinear`.
    """

    network: BilinearNetwork
    labels: Int[Tensor, " points"]
    margin: float = 1.0
    weight: float = 1.0

    name = "certificate"

    def __call__(self, step: Folded) -> Tensor:
        assert step.rows is not None
        block, unembed = self.network.blocks[0], self.network.head.weight
        left, right, down = (block.get_submodule(name).weight for name in ("left", "right", "down"))
        assert isinstance(left, Tensor)
        assert isinstance(right, Tensor)
        assert isinstance(down, Tensor)
        labels = self.labels[step.rows]
        rebuilt = step.codes @ step.W_dec[:, 0] + step.b_dec[0]
        size = (step.states[:, 0] - rebuilt).square().sum(1).add(1e-12).sqrt()
        inner = unembed @ down  # (outputs, hidden)
        read, other = rebuilt @ left.T, rebuilt @ right.T
        logits = rebuilt @ unembed.T + (read * other) @ inner.T
        slopes = unembed + self._slopes(inner, read, right) + self._slopes(inner, other, left)
        own = slopes.gather(1, labels[:, None, None].expand(-1, 1, slopes.shape[2]))
        steep = (own - slopes).square().sum(2).add(1e-12).sqrt()
        forms = torch.einsum("kn,nd,ne->kde", inner, left, right)
        forms = (forms + forms.transpose(1, 2)) / 2
        bent = (forms[:, None] - forms).square().sum((2, 3)).add(1e-12).sqrt()[labels]
        lead = logits.gather(1, labels[:, None]) - logits
        bound = lead - steep * size[:, None] - bent * size[:, None].square()
        mine = torch.zeros_like(bound).scatter(1, labels[:, None], 1.0).bool()
        return torch.relu(self.margin - bound).masked_fill(mine, 0).amax(1).mean()

    @staticmethod
    def _slopes(
        inner: Float[Tensor, "outputs hidden"], held: Float[Tensor, "rows hidden"], read: Tensor
    ) -> Float[Tensor, "rows outputs width"]:
        return torch.einsum("kn,bn,nd->bkd", inner, held, read)
