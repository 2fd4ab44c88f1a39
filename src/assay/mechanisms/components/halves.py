"""One component as two equal halves: the control that says which numbers count parts and which
measure what the parts do."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from assay.errors import InputError
from assay.mechanisms.components.decomposition import Decomposition
from assay.mechanisms.components.importance import Importance, Named


class Doubled(Importance):
    """An importance function with the logit of one component of one site given twice: the second
    is the site's last."""

    def __init__(self, whole: Importance, site: str, component: int) -> None:
        super().__init__(
            [
                replace(own, components=own.components + 1) if own.name == site else own
                for own in whole.sites
            ]
        )
        self.whole, self.site, self.component = whole, site, component
        self.reads_inner, self.reads_shares = whole.reads_inner, whole.reads_shares

    def forward(
        self, inputs: Named, inner: Named, shares: Named | None = None
    ) -> dict[str, Tensor]:
        before = {
            name: entry[..., :-1] if name == self.site else entry for name, entry in inner.items()
        }
        joined = None
        if shares is not None:  # the whole writes twice what a half does
            own = shares[self.site]
            last = own.shape[-1] - 1
            times = torch.where(torch.arange(last) == self.component, 2.0, 1.0)
            joined = {**shares, self.site: own[..., :-1] * times.to(own)}
        found: dict[str, Tensor] = self.whole(inputs, before, joined)
        z = found[self.site]
        return {**found, self.site: torch.cat([z, z[..., self.component, None]], -1)}


@torch.no_grad()
def split_component(found: Decomposition, site: str, component: int) -> Decomposition:
    """Return a decomposition in which a component is two halves, `V_c (U_c / 2)` twice, with the
    importance of the whole each.

    Raises InputError for a site or a component that is not there."""
    v, u = found.factors(site)
    if not 0 <= component < len(u):
        raise InputError(f"{site!r} has components 0 to {len(u) - 1}, got {component}")
    half = u[component : component + 1] / 2
    doubled = Doubled(found.importance, site, component)
    halves = Decomposition(doubled.sites, doubled, torch.Generator().manual_seed(0)).to(v)
    for own, new_v, new_u, old_v, old_u in zip(
        found.sites, halves.V, halves.U, found.V, found.U, strict=True
    ):
        if own.name == site:
            new_v.copy_(torch.cat([old_v, old_v[:, component : component + 1]], 1))
            new_u.copy_(torch.cat([old_u, half]))
            new_u[component] /= 2
        else:
            new_v.copy_(old_v)
            new_u.copy_(old_u)
    return halves
