"""Importance minimality: the price of importances that are not zero, in two forms.

Both take the *global* sum of a component's values over all positions of all processes before the
logarithm: `M log2(1 + S)` is convex in S, so the mean of every process's own estimate is too
large."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from assay.errors import InputError
from assay.mechanisms.components.sites import WeightSite

Reduce = Callable[[Tensor], Tensor]


class RunningMeans(nn.Module):
    """Debiased running means of every component's frequency, saved with the training state."""

    def __init__(self, sites: Sequence[WeightSite], half_life: float):
        super().__init__()
        self.rate = math.log(2) / half_life
        self.names = [site.name for site in sites]
        for index, site in enumerate(sites):
            self.register_buffer(f"mean_{index}", torch.zeros(site.components))
        self.register_buffer("steps", torch.zeros(()))

    @torch.no_grad()
    def update(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take in one step's means and return the debiased running ones."""
        steps = self.get_buffer("steps").add_(1)
        found = {}
        for index, name in enumerate(self.names):
            mean = self.get_buffer(f"mean_{index}").lerp_(
                means[name].detach(), -math.expm1(-self.rate)
            )
            found[name] = mean / -torch.expm1(-self.rate * steps)
        return found


class Minimality(ABC):
    """A penalty on upper importances a, summed over sites and components."""

    coefficient: float
    half_life: float | None = None

    @abstractmethod
    def values(self, upper: Tensor, done: float) -> Tensor:
        """Return what each importance counts for at a share `done` of training."""

    @abstractmethod
    def price(self, total: Tensor, count: float, smooth: Tensor | None = None) -> Tensor:
        """Return the penalty of components whose values add up to `total` over `count` positions.

        `smooth` is the running mean at which a frequency term is taken instead of `total / count`.
        """

    def __call__(
        self,
        upper: Mapping[str, Float[Tensor, "*positions components"]],
        *,
        count: float,
        done: float = 1.0,
        weights: Float[Tensor, " rows"] | None = None,
        reduce: Reduce | None = None,
        state: RunningMeans | None = None,
    ) -> Float[Tensor, ""]:
        """Return the penalty of all sites at a share `done` of training.

        `count` is the number of positions N over all processes, `weights` how many of them each row
        stands for, `reduce` the sum over processes, `state` the running means, which this call
        updates."""
        totals = {}
        for name, entry in upper.items():
            values = self.values(entry.flatten(0, -2), done)
            total = values.sum(0) if weights is None else weights.to(values) @ values
            totals[name] = total if reduce is None else reduce(total)
        smooth: Mapping[str, Tensor] = {}
        if state is not None:
            smooth = state.update({name: total / count for name, total in totals.items()})
        prices = [
            self.price(total, count, smooth.get(name)).sum() for name, total in totals.items()
        ]
        return torch.stack(prices).sum()


@dataclass(frozen=True)
class LpMinimality(Minimality):
    """`coefficient sum_s sum_c M (1 + beta log2(1 + S))` with `S = sum_i (a_i + eps)^p` and
    `M = S / N` (arXiv 2506.20790; the logarithm is of its successors).

    p falls linearly from `p_start` to `p` between the shares `begin` and `end` of training."""

    coefficient: float = 3e-3
    beta: float = 0.0
    p: float = 1.0
    p_start: float | None = None
    begin: float = 0.0
    end: float = 1.0
    eps: float = 1e-12

    def __post_init__(self) -> None:
        started = () if self.p_start is None else ("p_start",)
        _require(self, ("coefficient", "p", "eps", *started), ("beta",))

    def exponent(self, done: float) -> float:
        """Return p at a share of training."""
        start = self.p if self.p_start is None else self.p_start
        return _between(start, self.p, done, self.begin, self.end)

    def values(self, upper: Tensor, done: float) -> Tensor:
        p = self.exponent(done)
        raised = upper + self.eps
        # The gradient of a power takes a power: products are many times cheaper.
        return raised if p == 1 else raised.square() if p == 2 else raised**p

    def price(self, total: Tensor, count: float, smooth: Tensor | None = None) -> Tensor:
        mean = total / count
        if self.beta:
            mean = mean * (1 + self.beta * (1 + total).log2())
        return self.coefficient * mean


@dataclass(frozen=True)
class SmoothL0(Minimality):
    """`coefficient sum f + frequency sum f log2(1 + references f)` with f the mean of
    `a^2 / (a^2 + gamma^2)`.

    The reference count is explicit, so that the penalty depends on neither the batch nor the number
    of processes; `references = N` and `frequency = beta coefficient` give the form of
    `LpMinimality`. gamma falls linearly from `gamma_start` to `gamma`. With a `half_life` in steps
    the frequency term is taken at the debiased running mean of f, with the full gradient of the
    current one: a noisy f, in a convex term, overcharges rare components."""

    coefficient: float = 3e-3
    frequency: float = 0.0
    references: float = 1.0
    gamma: float = 0.01
    gamma_start: float = 1.0
    begin: float = 0.0
    end: float = 1.0
    half_life: float | None = None

    def __post_init__(self) -> None:
        _require(self, ("coefficient", "references", "gamma", "gamma_start"), ("frequency",))
        if self.half_life is not None and not self.half_life > 0:
            raise InputError(f"half_life must be above 0 steps, got {self.half_life}")

    def width(self, done: float) -> float:
        """Return gamma at a share of training."""
        return _between(self.gamma_start, self.gamma, done, self.begin, self.end)

    def values(self, upper: Tensor, done: float) -> Tensor:
        squares = upper.square()
        return squares / (squares + self.width(done) ** 2)

    def price(self, total: Tensor, count: float, smooth: Tensor | None = None) -> Tensor:
        mean = total / count
        at = mean if smooth is None else smooth + (mean - mean.detach())
        frequent = at * (1 + self.references * at).log2()
        return self.coefficient * mean + self.frequency * frequent


def _between(first: float, last: float, done: float, begin: float, end: float) -> float:
    if end == begin:
        return last if done >= begin else first
    return first + (last - first) * min(max((done - begin) / (end - begin), 0.0), 1.0)


def _require(
    form: LpMinimality | SmoothL0, positive: Sequence[str], at_least_zero: Sequence[str]
) -> None:
    for name in positive:
        if not getattr(form, name) > 0:
            raise InputError(f"{name} must be above 0, got {getattr(form, name)}")
    for name in at_least_zero:
        if not getattr(form, name) >= 0:
            raise InputError(f"{name} must be at least 0, got {getattr(form, name)}")
    if not 0 <= form.begin <= form.end <= 1:
        raise InputError(
            f"the annealing must satisfy 0 <= begin <= end <= 1, got {form.begin}..{form.end}"
        )
