"""Random small networks of mixed operations on random boxes, with their values by brute force."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as f

Step = Callable[[list[Tensor]], Tensor]
WIDTH = 3


@dataclass(frozen=True)
class Case:
    """A function of tensors of three numbers, the box of each, and a row of its value."""

    function: Callable[..., Tensor]
    lows: tuple[Tensor, ...]
    highs: tuple[Tensor, ...]
    row: np.ndarray
    words: str

    def points(self, rng: np.random.Generator, inside: int) -> list[Tensor]:
        """Return all corners of the box, and random points inside."""
        lo, hi = (torch.cat(ends).numpy() for ends in (self.lows, self.highs))
        free = np.flatnonzero(lo < hi)
        corners = np.tile(lo, (1 << min(len(free), 9), 1))
        for index, sides in enumerate(itertools.product((0, 1), repeat=min(len(free), 9))):
            chosen = free[: len(sides)]
            corners[index, chosen] = np.where(sides, hi[chosen], lo[chosen])
        found = lo + rng.uniform(size=(inside, len(lo))) * (hi - lo)
        points = np.clip(np.concatenate([corners, found]), lo, hi)
        return list(torch.from_numpy(points).to(self.lows[0].dtype).split(WIDTH, 1))

    def values(self, points: list[Tensor]) -> Tensor:
        """Return `row . function` at points."""
        value = torch.func.vmap(self.function)(*points)
        return value.double() @ torch.from_numpy(self.row)

    def slopes(self, points: list[Tensor]) -> list[np.ndarray]:
        """Return the derivatives at points by every input."""
        points = [p.detach().clone().requires_grad_(True) for p in points]
        found = torch.autograd.grad(self.values(points).sum(), points, allow_unused=True)
        return [
            np.zeros(p.shape) if g is None else g.double().numpy()
            for g, p in zip(found, points, strict=True)
        ]

    def lowest(self, rng: np.random.Generator, inside: int = 64, steps: int = 12) -> float:
        """Return the least value at corners, random points, and after descents from the best."""
        points = self.points(rng, inside)
        values = self.values(points)
        best = float(values.min())
        few = values.argsort()[:8]
        at = [p[few].double() for p in points]
        width = [hi.double() - lo.double() for lo, hi in zip(self.lows, self.highs, strict=True)]
        for step in range(steps):
            slopes = self.slopes([x.to(self.lows[0].dtype) for x in at])
            rate = 0.3 * 0.7**step
            at = [
                torch.clamp(x - rate * w * torch.from_numpy(g).sign(), lo.double(), hi.double())
                for x, w, g, lo, hi in zip(at, width, slopes, self.lows, self.highs, strict=True)
            ]
            best = min(best, float(self.values([x.to(self.lows[0].dtype) for x in at]).min()))
        return best


def draw_case(seed: int, dtype: torch.dtype = torch.float64) -> Case:
    """Return a random case: one to three inputs, gates at two sites, kinks at the ends of boxes,
    entries of no width.
    """
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 4))
    steps: list[Step] = []
    words: list[str] = []
    for place in range(int(rng.integers(3, 9))):
        known = count + place
        name = str(rng.choice(sorted(MADE)))
        recent = int(rng.integers(max(0, known - 3), known))
        steps.append(MADE[name](_Draw(rng, dtype), recent, int(rng.integers(0, known))))
        words.append(name)
    mixed = [_Draw(rng, dtype).numbers(WIDTH, WIDTH) for _ in range(2)]

    def function(*xs: Tensor) -> Tensor:
        nodes = list(xs)
        for step in steps:
            nodes.append(step(nodes))
        return nodes[-1] @ mixed[0] + nodes[len(nodes) // 2] @ mixed[1]

    lows, highs = zip(*(_box(rng, dtype) for _ in range(count)), strict=True)
    row = rng.choice([0.0, 1.0, -1.0, 0.7], WIDTH)
    row[int(rng.integers(WIDTH))] = rng.choice([1.0, -1.0])
    return Case(function, lows, highs, row, " ".join(words))


def _box(rng: np.random.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    low = rng.choice([0.0, -1.0, 0.5, 1.0, rng.normal()], WIDTH)
    width = rng.choice([0.0, 1.0, 0.5, 1e-3, 1e-9, rng.uniform()], WIDTH)
    if rng.uniform() < 0.5:  # gates
        width = rng.choice([0.0, 0.01, 0.1, 0.5, 1.0], WIDTH)
        low = 1 - width
    ends = (torch.from_numpy(x).to(dtype) for x in (low, low + width))
    return next(ends), next(ends)


@dataclass(frozen=True)
class _Draw:
    rng: np.random.Generator
    dtype: torch.dtype

    def numbers(self, *shape: int) -> Tensor:
        """Return numbers of which some are zero, one or halves, so that kinks are met exactly."""
        plain = self.rng.normal(size=shape)
        round_ = self.rng.choice([0.0, 1.0, -1.0, 0.5], shape)
        mine = round_ if self.rng.uniform() < 0.5 else plain
        return torch.from_numpy(np.asarray(mine)).to(self.dtype)


Maker = Callable[[_Draw, int, int], Step]


def _of_one(function: Callable[[Tensor], Tensor]) -> Maker:
    return lambda draw, i, j: lambda nodes: function(nodes[i])


def _of_two(function: Callable[[Tensor, Tensor], Tensor]) -> Maker:
    return lambda draw, i, j: lambda nodes: function(nodes[i], nodes[j])


def _with_weight(function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> Maker:
    def made(draw: _Draw, i: int, j: int) -> Step:
        weight = draw.numbers(*shape)
        return lambda nodes: function(nodes[i], weight)

    return made


def _attention(x: Tensor, weight: Tensor) -> Tensor:
    h = x[:, None] * weight
    mask = torch.ones(WIDTH, WIDTH).tril() > 0
    scores = (h @ h.transpose(-1, -2) * 0.3).masked_fill(~mask, float("-inf"))
    return (torch.softmax(scores, -1) @ h)[-1]


def _affine(draw: _Draw, i: int, j: int) -> Step:
    weight, bias = draw.numbers(WIDTH, WIDTH), draw.numbers(WIDTH)
    return lambda nodes: f.linear(nodes[i], weight, bias)


def _picked(draw: _Draw, i: int, j: int) -> Step:
    """Entries of two nodes, some taken several times and some never."""
    index = torch.from_numpy(draw.rng.integers(0, 2 * WIDTH, WIDTH))
    return lambda nodes: torch.cat([nodes[i], nodes[j]])[index]


def _skewed(draw: _Draw, i: int, j: int) -> Step:
    """One entry in many places, summed up again."""
    many = int(draw.rng.integers(2, 40))
    weight = draw.numbers(many, WIDTH) * 0.3
    return lambda nodes: nodes[i][:1].expand(many) @ weight + nodes[j]


def _gated(draw: _Draw, i: int, j: int) -> Step:
    """`r + g (x - r)`, of a constant and of a node."""
    rest = draw.numbers(WIDTH)
    return lambda nodes: rest + nodes[i] * (nodes[j] - rest)


MADE: dict[str, Maker] = {
    "affine": _affine,
    "abs": _of_one(torch.abs),
    "add": _of_two(lambda x, y: x + y),
    "attention": _with_weight(_attention, WIDTH, WIDTH),
    "broadcast": _of_two(lambda x, y: x * y.mean(-1, keepdim=True)),
    "by itself": _of_one(lambda x: x * (x + 0.0)),
    "clamp": _of_one(lambda x: x.clamp(0.0, 1.0)),
    "cube": _of_one(lambda x: 0.1 * x.pow(3)),
    "divide": _of_one(lambda x: x / -1.7),
    "exp": _of_one(lambda x: torch.exp(x.clamp(-3, 1))),
    "gated": _gated,
    "gelu": _of_one(f.gelu),
    "gelu tanh": _of_one(lambda x: f.gelu(x, approximate="tanh")),
    "kink": _of_one(lambda x: torch.relu(torch.relu(x) - torch.relu(-x))),
    "layer norm": _of_one(lambda x: f.layer_norm(x, (WIDTH,), eps=1e-2)),
    "leaky": _of_one(lambda x: f.leaky_relu(x, 0.1)),
    "maximum": _of_two(torch.maximum),
    "nothing": _of_two(lambda x, y: x + 0.0 * torch.exp(5 * y)),
    "outer": _of_two(lambda x, y: (x[:, None] @ y[None, :]).sum(0) * 0.5),
    "picked": _picked,
    "product": _of_two(lambda x, y: x * y),
    "relu": _of_one(torch.relu),
    "relu of a map": _with_weight(lambda x, w: torch.relu(x @ w), WIDTH, WIDTH),
    "rms norm": _of_one(lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.05)),
    "scale": _with_weight(lambda x, w: x * w, WIDTH),
    "share": _of_two(lambda x, y: x / (1 + y.pow(2))),
    "shift": _with_weight(lambda x, w: x + w, WIDTH),
    "sigmoid": _of_one(torch.sigmoid),
    "silu": _of_one(f.silu),
    "skewed": _skewed,
    "softmax": _of_one(lambda x: torch.softmax(3 * x, -1)),
    "square": _of_one(torch.square),
    "subtract": _of_two(lambda x, y: x - y),
    "tanh": _of_one(torch.tanh),
}
