"""A small bidirectional transformer: pre-norm blocks, rotary positions, exact GELU."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as f

from assay.errors import InputError


class Bidirectional(nn.Module):
    """Blocks of attention in both directions and an MLP on a stream (examples, positions, width).

    `present` (examples, positions) is false at padding, which nothing attends to."""

    def __init__(
        self, width: int, blocks: int, heads: int, hidden: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        if width % (2 * heads):
            raise InputError(
                f"width {width} cannot be split into {heads} heads of an even width; give a"
                f" multiple of {2 * heads}"
            )
        self.blocks = nn.ModuleList(_Block(width, heads, hidden, generator) for _ in range(blocks))

    def forward(
        self,
        stream: Float[Tensor, "examples positions width"],
        present: Tensor | None = None,
    ) -> Float[Tensor, "examples positions width"]:
        allowed = None if present is None else present[:, None, None, :]
        for block in self.blocks:
            stream = block(stream, allowed)
        return stream


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, generator: torch.Generator):
        super().__init__()
        self.heads = heads

        def draw(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns, generator=generator) / rows**0.5)

        self.qkv, self.out = draw(width, 3 * width), draw(width, width)
        self.up, self.down = draw(width, hidden), draw(hidden, width)
        self.up_bias = nn.Parameter(torch.zeros(hidden))
        self.down_bias = nn.Parameter(torch.zeros(width))

    def forward(self, stream: Tensor, allowed: Tensor | None) -> Tensor:
        normed = f.rms_norm(stream, stream.shape[-1:])
        q, k, v = (normed @ self.qkv).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = f.scaled_dot_product_attention(_rotate(q), _rotate(k), v, attn_mask=allowed)
        stream = stream + mixed.transpose(1, 2).flatten(2) @ self.out
        normed = f.rms_norm(stream, stream.shape[-1:])
        return stream + f.gelu(normed @ self.up + self.up_bias) @ self.down + self.down_bias


def _rotate(x: Tensor) -> Tensor:
    positions, half = x.shape[-2], x.shape[-1] // 2
    rates = 10000.0 ** (-torch.arange(half, dtype=x.dtype, device=x.device) / half)
    angles = torch.arange(positions, dtype=x.dtype, device=x.device)[:, None] * rates
    left, right = x[..., :half], x[..., half:]
    return torch.cat(
        [left * angles.cos() - right * angles.sin(), left * angles.sin() + right * angles.cos()], -1
    )
