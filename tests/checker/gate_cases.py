"""Small traced functions of gates with their certificates."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from assay.bounds.search.branch import least
from assay.bounds.search.leaves import Budget
from assay.bounds.trace import trace
from assay.proofs.gate_certificate import Evidence, write_gates
from assay.proofs.problem import Problem
from assay_check.gates import constants_digest, graphs_digest

Function = Callable[[Tensor], Tensor]
QUICK = Budget(seconds=5, boxes=6, steps=(4, 2), whole=0)
GATES = 5


class Network(nn.Module):
    """A random network of one sort of operation, with a gate on every unit of its first layer."""

    def __init__(self, sort: str, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> nn.Parameter:
            found = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return nn.Parameter(found, requires_grad=False)

        self.sort = sort
        self.x, self.one, self.two = draw(4), draw(4, GATES), draw(GATES, GATES)
        self.last, self.bias = draw(GATES, 3), draw(GATES)

    def forward(self, gates: Tensor) -> Tensor:
        h = (self.x @ self.one) * gates
        z = h @ self.two + self.bias
        match self.sort:
            case "relu":
                y = torch.relu(z)
            case "bilinear":
                y = (h @ self.two) * (h @ self.two.T + 0.5)
            case "gelu":
                y = nn.functional.gelu(z)
            case "tanh":
                y = torch.tanh(z) + torch.sigmoid(z) * 0.5 + nn.functional.silu(z)
            case "norm":
                y = nn.functional.layer_norm(z, (GATES,))
            case "rms":
                y = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 0.1)
            case "jump":
                y = torch.relu(z) * (z > 0.3)
            case "largest":
                p = torch.relu(z + 1.0)
                sizes = p * self.two.norm(dim=1)
                chosen = sizes.topk(2, dim=-1).indices
                y = torch.zeros_like(p).scatter(-1, chosen, p.gather(-1, chosen))
            case "open":
                y = torch.relu(z) * (h @ self.two.T > 0.1)
            case _:
                scores = torch.softmax(z[:, None] * h[None, :] * 0.3, -1)
                y = (scores @ torch.stack([z, h], -1)).sum(-1)
        return y @ self.last


SORTS = (
    *("relu", "bilinear", "gelu", "tanh", "norm", "rms", "attention"),
    *("jump", "largest", "open"),
)


def metric(network: nn.Module) -> Function:
    return lambda gates: network(gates)[..., :1]


def write_case(
    path: Path, sort: str, seed: int = 0, low: float = 0.4, budget: Budget = QUICK
) -> tuple[Network, Path]:
    """Write the certificate of the damage of the first logit, and the network's weights."""
    network = Network(sort, seed)
    function = metric(network)
    ones, lows = (
        torch.ones(GATES, dtype=torch.float64),
        torch.full((GATES,), low, dtype=torch.float64),
    )
    lows[-1] = 1.0
    traced = trace(function, ones, regions=[(lows, ones)])
    row = np.ones(1)
    found = least(traced, [lows], [ones], row, budget=budget)
    proved = float(function(ones)) - found.bound
    problem = Problem(function, ("gates",), ("gates",), (lows,), (ones,), (ones,), 1.0, True, False)
    one = Evidence(0, traced, problem, (found,), proved)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_gates(path, [one], claim="damage", metric="logit", model=network, examples=1)
    weights = path.with_name("weights.safetensors")
    save_file({name: p.data for name, p in network.named_parameters()}, weights)
    return network, weights


@torch.no_grad()
def largest_damage(network: Network, low: float, points: int = 400) -> float:
    """Return the largest damage at corners and random points of the region."""
    function, generator = metric(network), torch.Generator().manual_seed(1)
    shares = [[float(code >> bit & 1) for bit in range(GATES)] for code in range(1 << GATES)]
    shares += torch.rand(points, GATES, generator=generator).tolist()
    gates = low + torch.tensor(shares, dtype=torch.float64) * (1 - low)
    gates[:, -1] = 1.0
    values = torch.cat([function(gate) for gate in gates])
    return float(function(torch.ones(GATES, dtype=torch.float64)) - values.min())


class Forged:
    """A copy of a certificate whose parts are changed and whose digests are made right again."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = folder / path.name
        shutil.copy(path, self.path)
        self.entry: dict[str, Any] = json.loads(path.read_text())
        self.held = load_file(path.with_suffix(".advice.safetensors"))

    @property
    def example(self) -> dict[str, Any]:
        found: dict[str, Any] = self.entry["examples"]["0"]
        return found

    @property
    def goal(self) -> dict[str, Any]:
        found: dict[str, Any] = self.example["goals"][0]
        return found

    def write(self, *, honest: bool = True) -> Path:
        """Write it; honest: with digests that fit."""
        import hashlib

        advice = self.path.with_suffix(".advice.safetensors")
        save_file({name: x.contiguous() for name, x in self.held.items()}, advice)
        if honest:
            held = {name: x.numpy() for name, x in self.held.items()}
            self.entry["model"]["constants"] = constants_digest(held)
            self.entry["model"]["graph"] = graphs_digest(self.entry["examples"])
        digest = hashlib.sha256(advice.read_bytes()).hexdigest()
        self.entry["advice"] = {"file": advice.name, "sha256": digest}
        self.path.write_text(json.dumps(self.entry))
        return self.path
