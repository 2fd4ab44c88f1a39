"""Tiny networks in float64 on which first order fails in known ways: saturated attention,
cancelling paths, products.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from assay.core.target import Batch, Target


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.c_attn(x).chunk(3, dim=-1)
        )
        seen = torch.ones(x.shape[1], x.shape[1]).tril().bool()
        weights = (q @ k.transpose(2, 3)).masked_fill(~seen, float("-inf")).softmax(-1)
        return self.c_proj((weights @ v).transpose(1, 2).flatten(2)), weights


class Mlp(nn.Module):
    def __init__(self, width: int, power: int):
        super().__init__()
        self.power = power
        self.c_fc = nn.Linear(width, 2 * width, bias=False)
        self.c_proj = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.c_fc(x) ** self.power)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, power: int):
        super().__init__()
        self.attn, self.mlp = Attention(width, heads), Mlp(width, power)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)[0]
        return x + self.mlp(x)


class Plain(nn.Module):
    """Attention and MLPs without norms, laid out like GPT-2; the output is the residual stream
    at the last position.
    """

    def __init__(
        self,
        *,
        layers: int = 1,
        width: int = 4,
        heads: int = 2,
        power: int = 1,
        attention: float = 1.0,
        scale: float = 0.4,
    ):
        super().__init__()
        self.config = SimpleNamespace(
            model_type="gpt2", num_attention_heads=heads, hidden_size=width
        )
        self.transformer = nn.ModuleDict(
            {"h": nn.ModuleList(Block(width, heads, power) for _ in range(layers))}
        )
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.named_parameters():
            parameter.data = scale * torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )
            if name.endswith("c_attn.weight"):
                parameter.data[: 2 * width] *= attention

    def forward(self, x: Tensor) -> Tensor:
        for block in self.transformer["h"]:
            x = block(x)
        return x[:, -1]


def first_coordinate(output: Tensor, batch: Batch) -> Tensor:
    return output[:, 0] - 0.5 * output[:, 1]


def plain_target(**options) -> Target:
    return Target(Plain(**options), first_coordinate)


def prompts(
    examples: int = 4, positions: int = 5, width: int = 4, seed: int = 0
) -> tuple[Batch, Batch]:
    """Return clean and patch inputs of the residual stream, all positions different."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, examples, positions, width, generator=generator, dtype=torch.float64)
    return Batch(both[0]), Batch(both[1])


class Cancelling(nn.Module):
    """Two layers read the same value; their slopes at zero cancel, their effects away from zero
    do not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.start, self.bend, self.back = nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Identity()
        self.start.weight.data = torch.ones(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        value = self.start(x)
        return (self.bend(value) - self.back(value)).sum((1, 2))
