"""First-order attribution: the gradient in the gates, for all parts at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from assay.attribution.method import Estimate, Method
from assay.core.mechanisms import Mechanisms, differentiable
from assay.core.parts import Gates, mix
from assay.core.sites import Seen
from assay.core.values import add, compact


class SiteGradient(NamedTuple):
    """What is seen at a site, and the gradient of the metric in the value that is written there."""

    site: str
    seen: Seen
    gradient: Tensor | None


@dataclass(frozen=True)
class Gradient(Method):
    """attribution_k = dF/dgate_k at all ones: one forward and one backward for all parts
    (attribution patching).

    Gates shared over the batch take one forward-mode derivative each, so that examples stay apart.
    """

    name = "gradient"

    def estimate(self, mechanisms: Mechanisms) -> Estimate:
        return Estimate(*gate_gradient(mechanisms))


def gate_gradient(
    mechanisms: Mechanisms, gates: Gates | None = None, names: Iterable[str] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the metric (examples,) and dF/dgate by group (examples, *axes), both float64, at
    `gates` (all ones by default).

    Only what each site saw is kept; the parts are computed again one site at a time, so that a
    large dictionary is never in the graph at all ones, nor in memory at more than one site."""
    chosen = list(mechanisms.groups if names is None else names)
    reverse = [name for name in chosen if mechanisms.group(name).per_example]
    found: dict[str, Tensor] = {}
    values = torch.empty(0)
    if reverse:
        values, found = _reverse(mechanisms, gates or {}, set(reverse))
    for name in chosen:
        if name not in found:
            values, found[name] = _forward(mechanisms, gates or {}, name)
    return values.detach().double(), {name: found[name] for name in chosen}


def site_gradients(
    mechanisms: Mechanisms, gates: Gates | None = None, names: Iterable[str] | None = None
) -> tuple[Tensor, Iterator[SiteGradient]]:
    """Return the metric (examples,) and, site by site, what is seen there and dF/dvalue, by one
    forward and backward pass; None where the metric does not depend on the site.

    Only sites where one of the named groups acts are given, each once, and nothing of a site is
    held after its turn. Gates are ones by default."""
    gates = gates or {}
    chosen = set(mechanisms.groups if names is None else names)
    tape: dict[str, tuple[Seen, Tensor]] = {}
    sites = mechanisms.sites

    def watch(site: str, seen: Seen) -> Tensor:
        present = any(name in gates for name in sites[site])
        mixed = mix(seen, mechanisms.parts(site, seen), gates) if present else seen.written
        tracked = mixed if mixed.requires_grad else mixed.detach().requires_grad_()
        earlier = {place: entry.detach() for place, entry in seen.earlier.items()}
        tape[site] = (replace(seen.detach(), earlier=earlier), tracked)
        # A later in-place change must not reach the tensor that is differentiated.
        return tracked.clone()

    watched = mechanisms.edits_of(mechanisms.groups, watch)
    with torch.enable_grad():
        values = mechanisms.target.values(mechanisms.batch, watched)
        reached = [site for site in tape if chosen & set(sites[site])]
        tracked = [tape[site][1] for site in reached]
        # A metric that no site reaches, as with every path cut, has no gradient to ask for.
        found = (
            torch.autograd.grad(values.double().sum(), tracked, allow_unused=True)
            if values.requires_grad
            else [None] * len(reached)
        )
    turns = [SiteGradient(site, tape[site][0], g) for site, g in zip(reached, found, strict=True)]
    del found, tracked
    tape.clear()
    turns.reverse()
    return values.detach(), (turns.pop() for _ in range(len(turns)))


def _reverse(
    mechanisms: Mechanisms, gates: Gates, names: set[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    values, turns = site_gradients(mechanisms, gates, names)
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for site, seen, cotangent in turns:
            for name, parts in mechanisms.parts(site, seen).items():
                if name in names:
                    gradient = (
                        torch.zeros(parts.shape, dtype=torch.float64)
                        if cotangent is None
                        else parts.dot(cotangent).double()
                    )
                    gradient = compact(gradient)
                    found[name] = add(found[name], gradient) if name in found else gradient
    return values, found


def _forward(mechanisms: Mechanisms, gates: Gates, name: str) -> tuple[Tensor, Tensor]:
    group = mechanisms.group(name)
    start = gates[name] if name in gates else mechanisms.ones([name])[name]
    basis = torch.eye(start.numel(), dtype=start.dtype, device=start.device).reshape(
        -1, *start.shape
    )

    def metric(gate: Tensor) -> Tensor:
        return mechanisms.values({**gates, name: gate})

    def column(tangent: Tensor) -> Tensor:
        return torch.func.jvp(metric, (start,), (tangent,))[1]

    rows = differentiable(lambda: torch.func.vmap(column, chunk_size=32)(basis))
    with torch.no_grad():
        values = metric(start)
    return values, rows.detach().double().T.reshape(-1, *group.axes)
