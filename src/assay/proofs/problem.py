"""What is bounded: a plain function of gates, and of inputs and references where those move too,
with its region.

Where inputs move, the untouched and the gated network are one function of (gates, x), so that what
both share cancels: its value is minus the damage. Where references move, a gate of zero brings in
any value of the box around those of a data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay.bounds.regions import ball
from assay.errors import InputError
from assay.proofs.answers import margins_of, run_margins
from assay.proofs.boxed import Boxed
from assay.proofs.bracket import Claim

Hull = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Moving:
    """What moves beside the gates: inputs within `radius` of each example's, in every entry, cut to
    the domain; and references, within the hull of those of a data set (ends by group).
    """

    radius: float | None = None
    domain: tuple[float, float] | None = None
    hull: Hull | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """What a bound says of it."""
        found = []
        if self.radius is not None:
            found.append(f"every input entry moves by up to {self.radius:g}")
        if self.hull:
            found.append(
                "a gate of zero brings in any value of the box around the references of the data"
            )
        return tuple(found)


@dataclass(frozen=True)
class Problem:
    """A function of tensors, the box of each, and the point where it is the untouched network's.

    names: of the groups whose gates come first; kinds: "gates", "references" or "inputs" for every
    argument. sign: 1 where a higher value is right. offset: whether the damage is measured from the
    value at `point` (else the value is minus the damage); answer: whether it is margins."""

    function: Callable[..., Tensor]
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    lows: tuple[Tensor, ...]
    highs: tuple[Tensor, ...]
    point: tuple[Tensor, ...]
    sign: float
    offset: bool
    answer: bool

    @property
    def moves(self) -> bool:
        """Whether anything moves."""
        return bool(self.kinds)

    def full(self) -> np.ndarray:
        """Return the value of the function at its point."""
        found: np.ndarray = self.function(*self.point).detach().double().numpy()
        return found

    def rows(self, full: np.ndarray) -> list[np.ndarray]:
        """Return the linear functions of the value whose least values make the claim, the value
        that is nearest to breaking it first.
        """
        rows = np.eye(full.size).reshape(full.size, *full.shape) * self.sign
        return [rows[index] for index in np.argsort(full.reshape(-1))]


def pose(part: Boxed, mask: Mapping[str, Tensor], claim: Claim, moving: Moving) -> Problem:
    """Return the problem of one example.

    Raises InputError where inputs cannot move: token numbers, several tensors, and parts that were
    fixed when their kind was bound."""
    ones = part.ones()
    lows = {name: torch.where(mask[name] == 0, part.lows[name], ones[name]) for name in part.groups}
    names = tuple(name for name in part.groups if bool((lows[name] < ones[name]).any()))
    hull = dict(moving.hull or {})
    regions: list[tuple[str, Tensor, Tensor, Tensor]] = [
        ("gates", lows[name], ones[name], ones[name]) for name in names
    ]
    own = {name: ends for name, ends in hull.items() if bool((ends[0] < ends[1]).any())}
    regions += [("references", low, high, (low + high) / 2) for low, high in own.values()]
    if moving.radius is not None:
        regions.append(("inputs", *_region(part, moving.radius, moving.domain)))
    margins = margins_of(part) if claim == "same-answer" else None
    sign = 1.0 if margins is not None or part.target.higher_is_right else -1.0
    kinds = tuple(kind for kind, *_ in regions)
    over = "inputs" in kinds

    def function(*given: Tensor) -> Tensor:
        gates = dict(zip(names, given, strict=False))
        rest = given[len(names) :]
        references = dict(zip(own, rest, strict=False))
        x = given[-1] if over else part.batch.inputs
        here = part.on(x, references) if over or references else part
        if margins is not None:
            return run_margins(here, gates, margins)
        found = here.values(gates)
        if not over:
            return found
        return sign * (found - here.target.values(here.batch))

    difference = over and margins is None
    return Problem(
        function,
        names,
        kinds,
        tuple(low for _, low, _, _ in regions),
        tuple(high for _, _, high, _ in regions),
        tuple(point for _, _, _, point in regions),
        1.0 if difference else sign,
        margins is None and not difference,
        margins is not None,
    )


def _region(
    part: Boxed, radius: float, domain: tuple[float, float] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ends of the inputs' region, and the inputs; ends are numbers of their type."""
    x = part.batch.inputs
    if not (isinstance(x, Tensor) and x.is_floating_point()):
        raise InputError(
            "radius: inputs that move must be one tensor of floating-point numbers, got"
            f" {x.dtype if isinstance(x, Tensor) else type(x).__name__}"
        )
    fixed = [name for name, group in part.groups.items() if group.fixed]
    if fixed:
        raise InputError(
            f"radius: the parts of {fixed[0]!r} were fixed when they were bound, and do not follow"
            " inputs that move"
        )
    region = ball(x, radius, domain)
    low = _beyond(torch.from_numpy(region.lo), x, -torch.inf)
    return low, _beyond(torch.from_numpy(region.hi), x, torch.inf), x.detach()


def _beyond(end: Tensor, x: Tensor, side: float) -> Tensor:
    """Return the nearest numbers of the type of x at or beyond an end."""
    near = end.to(x.dtype)
    inside = near.double() < end if side > 0 else near.double() > end
    return torch.where(inside, torch.nextafter(near, torch.full_like(near, side)), near)


def descend(
    problem: Problem, row: np.ndarray, start: list[Tensor], steps: int = 24
) -> list[Tensor]:
    """Return a point of the region where a row of the value is small: steps along the sign of the
    gradient, of a size that falls.
    """
    weight = torch.from_numpy(row)
    point, best, least = [x.clone() for x in start], start, float("inf")
    for step in range(steps):
        moved = [x.detach().requires_grad_(True) for x in point]
        value = (problem.function(*moved).double() * weight).sum()
        if float(value.detach()) < least:
            best, least = [x.detach() for x in moved], float(value.detach())
        slopes = torch.autograd.grad(value, moved, allow_unused=True)
        share = 0.5 * (1 - step / steps)
        point = [
            x.detach() if g is None else torch.clamp(x - share * (high - low) * g.sign(), low, high)
            for x, g, low, high in zip(moved, slopes, problem.lows, problem.highs, strict=True)
        ]
        point = [x.detach() for x in point]
    return best


def moving_of(
    mechanisms: Any, radius: float | None, domain: tuple[float, float] | None, references: Any
) -> tuple[Any, Moving]:
    """Return the mechanisms with the parts that moving references ask for, and what moves."""
    if radius is None and domain is not None:
        raise InputError("domain: it cuts the region of inputs that move; give radius= too")
    if radius is not None and not (np.isfinite(radius) and radius >= 0):
        raise InputError(f"radius: a finite number >= 0 is needed, got {radius}")
    if references is None:
        return mechanisms, Moving(radius, domain)
    found, hull = mechanisms.references(references)
    return found, Moving(radius, domain, hull)


def hull_of(moving: Moving, index: int) -> Moving:
    """Return what moves in one example."""
    if not moving.hull:
        return moving
    some = {
        name: tuple(end[index : index + 1] if len(end) > 1 else end for end in ends)
        for name, ends in moving.hull.items()
    }
    return Moving(moving.radius, moving.domain, some)  # type: ignore[arg-type]
