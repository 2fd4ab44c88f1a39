"""The standard sparse autoencoder: a linear map, a bias and a ReLU."""

from __future__ import annotations

import torch
from torch import Tensor

from assay.dictionaries.linear import Linear


class ReLU(Linear):
    """`f = relu((x - subtract * b_dec) W_enc + b_enc)` (Bricken et al. 2023, Towards
    Monosemanticity).
    """

    architecture = "relu"

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(self.before(x))
