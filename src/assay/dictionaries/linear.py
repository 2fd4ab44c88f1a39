"""What most architectures share: one linear map before the activation function, and one after."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from assay.dictionaries.base import Dictionary
from assay.errors import InputError


class Linear(Dictionary):
    """`before = (x - subtract * b_dec) W_enc + b_enc`, `out = f W_dec + b_dec + x W_skip`.

    Without `d_out` it is an autoencoder. With `d_out` it is a transcoder: it writes another value,
    of that width, and does not subtract `b_dec` unless told to. For a cross-layer transcoder
    `d_out` is the sum of the widths of its sites. `skip` is the number of output columns, from the
    first on, that a skip connection `W_skip` (d_in, skip) writes (True: all, the default: none).

    Raises InputError for sizes below 1, and for a subtracted bias of another width than the input.
    """

    def __init__(
        self,
        d_in: int,
        size: int,
        d_out: int | None = None,
        *,
        subtract: bool | None = None,
        skip: int | bool = False,
    ):
        super().__init__()
        width = d_in if d_out is None else d_out
        columns = width if skip is True else int(skip)
        for name, value in (("d_in", d_in), ("size", size), ("d_out", width)):
            if value < 1:
                raise InputError(f"{name} of a dictionary must be at least 1, got {value}")
        if not 0 <= columns <= width:
            raise InputError(f"skip must be between 0 and d_out = {width} columns, got {columns}")
        self.subtract = d_out is None if subtract is None else subtract
        if self.subtract and width != d_in:
            raise InputError(
                f"subtract = True needs d_out = d_in, got d_in = {d_in} and d_out = {width}"
            )
        self.W_enc = nn.Parameter(torch.zeros(d_in, size))
        self.b_enc = nn.Parameter(torch.zeros(size))
        self.W_dec = nn.Parameter(torch.zeros(size, width))
        self.b_dec = nn.Parameter(torch.zeros(width))
        self.W_skip = nn.Parameter(torch.zeros(d_in, columns)) if columns else None

    @property
    def d_in(self) -> int:
        return int(self.W_enc.shape[0])

    def config(self) -> dict[str, Any]:
        return {
            "d_in": self.d_in,
            "size": self.size,
            "d_out": self.d_out,
            "subtract": self.subtract,
            "skip": 0 if self.W_skip is None else int(self.W_skip.shape[1]),
        }

    def centred(self, x: Tensor) -> Tensor:
        """Return what the encoder multiplies: `x`, less `b_dec` if that is subtracted."""
        return x - self.b_dec if self.subtract else x

    def before(self, x: Tensor) -> Tensor:
        """Return the features before their activation function, (*positions, size)."""
        return self.centred(x) @ self.W_enc + self.b_enc

    def encode_training(self, x: Tensor) -> Tensor:
        """Return the features as training computes them, where that differs from `encode`: a
        choice over the whole batch, or derivatives of a step.
        """
        return self.encode(x)

    def rest(self, x: Tensor) -> Tensor:
        if self.W_skip is None:
            return self.b_dec
        skipped = x @ self.W_skip
        return self.b_dec + functional.pad(skipped, (0, self.d_out - skipped.shape[-1]))
