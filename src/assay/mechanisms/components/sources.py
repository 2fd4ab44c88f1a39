"""Mask sources: where the number r in [0, 1] of `m = g + (1 - g) r` comes from, as data, and the
adversary's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from assay.errors import InputError, unknown
from assay.mechanisms.components.minimality import Reduce
from assay.mechanisms.components.sites import WeightSite

Sampling = Literal["uniform", "binary"]
Watch = Literal["ci", "rounded", "unmasked", "zero"]


@dataclass(frozen=True)
class Stochastic:
    """r independent for every position, component and delta part: uniform on [0, 1], or `binary`,
    0 or 1 with equal probability.

    Uniform sources reward writing a part of one component's effect into another: on average half of
    it is there when its own component is masked. Binary ones do not, because it is either all there
    or gone."""

    sampling: Sampling = "uniform"

    def __post_init__(self) -> None:
        if self.sampling not in get_args(Sampling):
            raise unknown("sampling", str(self.sampling), get_args(Sampling))


@dataclass(frozen=True)
class Fresh:
    """Projected gradient ascent from a uniform start: `steps` steps of `rate` by the sign of the
    gradient, one r per component shared over the batch.

    The budget `steps * rate` says how far a source can go; about 2 reaches every corner."""

    steps: int = 20
    rate: float = 0.1

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.rate > 0:
            raise InputError(
                f"an adversary needs at least 1 step and a rate above 0, got {self.steps} and"
                f" {self.rate}"
            )


@dataclass(frozen=True)
class Persistent:
    """Sources that live across training steps: Adam ascent and clipping, `warm` ascents a step and
    one more from the main backward pass.

    One r per component, shared over the batch; with `positions`, one for each position of the
    sequence."""

    rate: float = 0.01
    warm: int = 2
    betas: tuple[float, float] = (0.5, 0.99)
    positions: int | None = None

    def __post_init__(self) -> None:
        if self.warm < 0 or not self.rate > 0:
            raise InputError(
                f"a persistent adversary needs warm of at least 0 and a rate above 0, got"
                f" {self.warm} and {self.rate}"
            )


@dataclass(frozen=True)
class Merged:
    """Each example takes the persistent adversary's sources with probability `share` and uniform
    ones otherwise: both in one forward pass.
    """

    adversary: Persistent = field(default_factory=Persistent)
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InputError(f"share must lie in [0, 1], got {self.share}")


@dataclass(frozen=True)
class Monitor:
    """Fixed masks that are watched and never trained on, the delta part at zero: "ci" (m = g),
    "rounded" (m = 1 where g > 1/2, else 0), "unmasked" (m = 1), "zero" (m = 0).
    """

    masks: Watch = "ci"

    def __post_init__(self) -> None:
        if self.masks not in get_args(Watch):
            raise unknown("monitored mask", str(self.masks), get_args(Watch))


Source = Stochastic | Fresh | Persistent | Merged | Monitor


class Sources(nn.Module):
    """The state of one persistent adversary: every site's sources (C + 1, the last for the delta
    part) with Adam's moments, saved with the training state."""

    def __init__(
        self, sites: Sequence[WeightSite], plan: Persistent, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.plan = plan
        self.names = [site.name for site in sites]
        lead = () if plan.positions is None else (plan.positions,)
        for index, site in enumerate(sites):
            shape = (*lead, site.components + 1)
            self.register_buffer(f"source_{index}", torch.rand(shape, generator=generator))
            self.register_buffer(f"first_{index}", torch.zeros(shape))
            self.register_buffer(f"second_{index}", torch.zeros(shape))
        self.register_buffer("steps", torch.zeros(()))
        self.pending: dict[str, Tensor] = {}

    def leaves(self) -> dict[str, Tensor]:
        """Return the sources of every site as leaves that take a gradient."""
        return {
            name: self.get_buffer(f"source_{index}").detach().clone().requires_grad_()
            for index, name in enumerate(self.names)
        }

    @torch.no_grad()
    def ascend(self, gradients: Mapping[str, Tensor], reduce: Reduce | None = None) -> None:
        """Take one Adam step up the gradients, summed over processes, and clip to [0, 1]."""
        begin, end = self.plan.betas
        steps = self.get_buffer("steps").add_(1)
        for index, name in enumerate(self.names):
            gradient = gradients[name] if reduce is None else reduce(gradients[name])
            first = self.get_buffer(f"first_{index}").lerp_(gradient, 1 - begin)
            second = self.get_buffer(f"second_{index}").lerp_(gradient.square(), 1 - end)
            size = (second / (1 - end**steps)).sqrt_().add_(1e-8)
            step = self.plan.rate * first / (1 - begin**steps) / size
            self.get_buffer(f"source_{index}").add_(step).clamp_(0, 1)

    def finish(self, reduce: Reduce | None = None) -> None:
        """Ascend along what the main backward pass left on the leaves that it used."""
        found = {
            name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            for name, leaf in self.pending.items()
        }
        if found:
            self.ascend(found, reduce)
        self.pending = {}
