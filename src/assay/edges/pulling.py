"""How a derivative at one site reaches the sites before it: not at all, unchanged, position by
position, or in general.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pull:
    """The sites before a read site by the Jacobian between them: `identity`, `local` (a position
    reaches itself alone) and `general`; those that it does not reach are left out.
    """

    identity: tuple[str, ...]
    local: tuple[str, ...]
    general: tuple[str, ...]

    def without(self, sites: Collection[str]) -> Pull:
        """Return the same with some sites among those that nothing is known of."""
        moved = [site for site in (*self.identity, *self.local) if site in sites]
        return Pull(
            tuple(site for site in self.identity if site not in sites),
            tuple(site for site in self.local if site not in sites),
            (*self.general, *moved),
        )


def pull_of(value: Tensor, leaves: Mapping[str, Tensor], wanted: Collection[str]) -> Pull:
    """Say what the Jacobian of a value (examples, positions, width) in each wanted leaf is, by
    random cotangents: pulled back unchanged it is the identity, and a position that reaches no
    other is found at the last one, which in a causal network sees all.
    """
    asked = {site: leaf for site, leaf in leaves.items() if site in wanted and value.requires_grad}
    generator = torch.Generator().manual_seed(0)
    everywhere = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    everywhere = everywhere.to(value)
    last = torch.zeros_like(everywhere)
    last[:, -1] = everywhere[:, -1]
    kinds: dict[str, list[str]] = {"identity": [], "local": [], "general": []}
    tolerance = 64 * torch.finfo(value.dtype).eps * float(everywhere.abs().max())
    rest: dict[str, Tensor] = {}
    for site, found in pull_back(value, asked, everywhere).items():
        if found is None or not found.any():
            continue
        same = found.shape == everywhere.shape
        if same and float((found - everywhere).abs().max()) <= tolerance:
            kinds["identity"].append(site)
        else:
            rest[site] = asked[site]
    for site, found in pull_back(value, rest, last).items():
        flat = found is not None and found.ndim == 3 and found.shape[1] == value.shape[1]
        alone = flat and found is not None and not found[:, :-1].any()
        kinds["local" if alone else "general"].append(site)
    return Pull(**{name: tuple(sites) for name, sites in kinds.items()})


def pull_back(
    value: Tensor, leaves: Mapping[str, Tensor], cotangent: Tensor | None = None
) -> dict[str, Tensor | None]:
    """Return J^T c by leaf, None where the value does not depend on one; c is 1 by default."""
    if not leaves:
        return {}
    found = torch.autograd.grad(
        value, list(leaves.values()), cotangent, retain_graph=True, allow_unused=True
    )
    return dict(zip(leaves, found, strict=True))
