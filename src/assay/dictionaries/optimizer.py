"""The optimiser of dictionaries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Adam(torch.optim.Adam):
    """Adam (Kingma and Ba 2015, arXiv 1412.6980), in one pass over every parameter.

    The fused step of PyTorch copies a matrix that is laid out by columns, with its gradient and
    moments, to rows and back. Here it is given the transposed ones, which lie in rows already."""

    def __init__(self, parameters: Any, rate: float) -> None:
        super().__init__(parameters, lr=rate, fused=True)

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        found: bool = super()._init_group(group, *lists)
        turned = [
            one.ndim == 2 and not one.is_contiguous() and one.T.is_contiguous() for one in lists[0]
        ]
        for entries in lists[:4]:  # parameters, gradients, first and second moments
            entries[:] = [e.T if t else e for e, t in zip(entries, turned, strict=True)]
        return found
