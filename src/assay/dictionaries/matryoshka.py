"""BatchTopK whose first features rebuild on their own: dictionaries of growing size, nested."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from assay.dictionaries.batchtopk import BatchTopK
from assay.errors import InputError


class Matryoshka(BatchTopK):
    """BatchTopK in which the first `nested[i]` features are a dictionary themselves (Bussmann et
    al. 2025, arXiv 2503.17547).

    `nested` are increasing sizes, the last one all features. Raises InputError for others."""

    architecture = "matryoshka"

    def __init__(
        self,
        d_in: int,
        size: int,
        d_out: int | None = None,
        *,
        k: float,
        nested: Sequence[int],
        by_norm: bool = False,
        subtract: bool | None = None,
        skip: int | bool = False,
    ):
        super().__init__(d_in, size, d_out, k=k, by_norm=by_norm, subtract=subtract, skip=skip)
        self.nested = tuple(int(count) for count in nested)
        rising = all(a < b for a, b in zip((0, *self.nested), self.nested, strict=False))
        if not self.nested or not rising or self.nested[-1] != size:
            raise InputError(
                f"nested must be increasing sizes that end with all {size} features, got"
                f" {list(nested)}"
            )

    def config(self) -> dict[str, Any]:
        return {**super().config(), "nested": list(self.nested)}

    def decode_nested(self, codes: Tensor, x: Tensor) -> Tensor:
        """Return what each nested dictionary rebuilds, (dictionaries, *positions, d_out); the last
        is `decode`.
        """
        rebuilt, found, first = self.rest(x), [], 0
        for last in self.nested:
            rebuilt = rebuilt + codes[..., first:last] @ self.W_dec[first:last]
            found.append(rebuilt)
            first = last
        return torch.stack(found)
