"""A residual MLP that computes more functions than it has neurons: the toy of arXiv 2501.14926."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from assay.errors import InputError
from assay.targets.toys import draw_linear


class ResidualMLP(nn.Module):
    """`h = x E`, then `h += relu(h W_in) W_out` in every layer, read out as `h E^T`.

    E (features, width) is fixed, its rows random and of unit length, or `orthonormal`;
    `layers.l.mlp_in` and `layers.l.mlp_out` have no bias. Trained for `y = x + relu(x)`, feature by
    feature.

    With orthonormal rows and fewer neurons than features, a neuron shared by two features leaves
    the same error as one that serves the first and ignores the second, and training ends with
    functions that are hardly computed. Random rows overlap, and every feature has a share in taking
    the overlap out: all functions are computed, about equally well."""

    def __init__(
        self,
        features: int = 100,
        width: int = 512,
        hidden: int = 50,
        layers: int = 1,
        generator: torch.Generator | None = None,
        *,
        orthonormal: bool = False,
    ):
        super().__init__()
        if min(features, width, hidden, layers) < 1:
            raise InputError(
                "features, width, hidden and layers must be at least 1, got"
                f" {features}, {width}, {hidden} and {layers}"
            )
        if orthonormal and width < features:
            raise InputError(
                f"{features} orthonormal rows need a width of at least {features}, got {width}"
            )
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        drawn = torch.randn(features, width, generator=generator)
        drawn = torch.linalg.qr(drawn.T).Q.T if orthonormal else drawn
        self.register_buffer("embed", drawn / drawn.norm(dim=1, keepdim=True))
        self.layers = nn.ModuleList(_Block(width, hidden, generator) for _ in range(layers))

    def forward(self, x: Float[Tensor, "*rows features"]) -> Float[Tensor, "*rows features"]:
        embed = self.get_buffer("embed")
        stream = x @ embed
        for layer in self.layers:
            stream = layer(stream)
        return stream @ embed.T


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int, generator: torch.Generator):
        super().__init__()
        self.mlp_in = draw_linear(width, hidden, generator, bias=False)
        self.mlp_out = draw_linear(hidden, width, generator, bias=False)

    def forward(self, stream: Tensor) -> Tensor:
        return stream + self.mlp_out(torch.relu(self.mlp_in(stream)))
