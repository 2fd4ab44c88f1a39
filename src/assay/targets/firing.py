"""A network whose features are known to make one another fire, or merely to fire together."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

RATE = 0.3
"""How often A and C fire."""
STOPPED = 0.1
"""How often an inhibitor stops what A or C would make fire."""
FEATURES = ("first[0]", "first[1]", "first[2]", "second[0]", "second[1]", "second[2]")
"""A, C, twin; B, D, E."""


class Firing(nn.Module):
    """Two layers of ReLU features with weights set by hand, over five standard normal inputs.

    `first` holds A (input 0), C (input 1), and a twin of C that fires when C does but reaches
    nothing; `second` holds B, which A makes fire unless input 2 stops it, and D and E, which C
    makes fire unless input 3 or 4 stops them. So B fires given A in 90 % of inputs because of A;
    D fires with the twin as often, and E with D in 90 %, because of C alone."""

    def __init__(self) -> None:
        super().__init__()
        normal = torch.distributions.Normal(0.0, 1.0)
        fires = float(normal.icdf(torch.tensor(1 - RATE)))
        stops = float(normal.icdf(torch.tensor(1 - STOPPED)))
        read, write = nn.Linear(5, 6), nn.Linear(6, 3)
        self.head = nn.Linear(3, 2)
        with torch.no_grad():
            read.weight.zero_()
            write.weight.zero_()
            for row, column in enumerate((0, 1, 1, 2, 3, 4)):  # A, C, the twin, three inhibitors
                read.weight[row, column] = 1
            for row, (cause, inhibitor) in enumerate(((0, 3), (1, 4), (1, 5))):
                write.weight[row, cause], write.weight[row, inhibitor] = 1.0, -100.0
            read.bias.copy_(torch.tensor([-fires] * 3 + [-stops] * 3))
            write.bias.zero_()
            self.head.weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]))
            self.head.bias.zero_()
        self.first = nn.Sequential(read, nn.ReLU())
        self.second = nn.Sequential(write, nn.ReLU())
        self.requires_grad_(False).eval()

    def forward(self, x: Float[Tensor, "inputs 5"]) -> Float[Tensor, "inputs 2"]:
        found: Tensor = self.head(self.second(self.first(x)))
        return found


def draw_inputs(count: int, seed: int = 0) -> Float[Tensor, "inputs 5"]:
    """Return standard normal inputs of the network."""
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
