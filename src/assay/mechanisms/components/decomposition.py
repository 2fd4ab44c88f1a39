"""The unbound kind: matrices V and U of every weight site, and the importance function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from assay.core.kind import Kind, Reference
from assay.core.sites import Edit, Seen, run_edited
from assay.core.target import Batch, Target, evaluating
from assay.errors import InputError
from assay.io.files import require_finite
from assay.mechanisms.components.importance import Importance, make_importance
from assay.mechanisms.components.sites import WeightSite, match_sites, read_inner
from assay.mechanisms.components.squash import lower
from assay.memory import require_memory

if TYPE_CHECKING:
    from assay.mechanisms.components.kind import ComponentMechanisms


@dataclass(frozen=True)
class Reading:
    """One clean run of the network: its output, and what every site's first use read."""

    output: Tensor
    inputs: Mapping[str, Tensor]


class Decomposition(nn.Module, Kind):
    """Rank-one components of chosen weight matrices, and the function that says which of them
    matter (arXiv 2506.20790).

    For a site with W (in, out): V (in, C), U (C, out), component c is `V[:, c] U[c, :]`, and the
    delta part is `W - V U`. The network itself is not held: it is given where it is needed."""

    name = "components"

    def __init__(
        self, sites: Sequence[WeightSite], importance: Importance, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.sites = tuple(sites)
        self.importance = importance
        self.V, self.U = nn.ParameterList(), nn.ParameterList()
        for site in self.sites:
            inner, outer = (site.inputs, site.components), (site.components, site.outputs)
            self.V.append(torch.randn(inner, generator=generator) / site.inputs**0.5)
            self.U.append(torch.randn(outer, generator=generator) / site.components**0.5)

    def site(self, name: str) -> WeightSite:
        """Return a site by its name; InputError when there is none."""
        for site in self.sites:
            if site.name == name:
                return site
        raise InputError(
            f"no site {name!r}; the sites are {', '.join(site.name for site in self.sites)}"
        )

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return V (in, C) and U (C, out) of a site."""
        index = self.sites.index(self.site(name))
        return self.V[index], self.U[index]

    def inner(self, reading: Reading) -> dict[str, Float[Tensor, "*positions components"]]:
        """Return h = x V of every site on a clean run."""
        return {
            site.name: self._inner(reading, site, factor)
            for site, factor in zip(self.sites, self.V, strict=True)
        }

    def shares(
        self, inner: Mapping[str, Float[Tensor, "*positions components"]]
    ) -> dict[str, Float[Tensor, "*positions components"]]:
        """Return `|h_c| |U_c| / |h U|`: the length of what each component writes over that of what
        all of them write together.
        """
        found = {}
        for site, factor in zip(self.sites, self.U, strict=True):
            h = inner[site.name]
            whole = (h @ factor).norm(dim=-1, keepdim=True)
            tiny = torch.finfo(whole.dtype).tiny ** 0.5
            found[site.name] = h.abs() * factor.norm(dim=1) / whole.clamp_min(tiny)
        return found

    def logits(self, reading: Reading) -> dict[str, Float[Tensor, "*positions components"]]:
        """Return the importance function's logits on a clean run."""
        wide = next(self.parameters()).dtype
        inputs = {
            name: entry.to(wide) if entry.is_floating_point() else entry
            for name, entry in reading.inputs.items()
        }
        narrow = Reading(reading.output, inputs)
        inner = {
            site.name: self._inner(narrow, site, factor)
            for site, factor in zip(self.sites, self.V, strict=True)
            if self.importance.reads_inner or site.lookup
        }
        shares = self.shares(inner) if self.importance.reads_shares else None
        found: dict[str, Tensor] = self.importance(inputs, inner, shares)
        return found

    def _inner(self, reading: Reading, site: WeightSite, factor: Tensor) -> Tensor:
        seen = Seen(reading.output, reading.output, (reading.inputs[site.name],))
        return read_inner(site.uses[0], seen, factor)

    @torch.no_grad()
    def importances(
        self, model: nn.Module, inputs: Any
    ) -> dict[str, Float[Tensor, "*positions components"]]:
        """Return the causal importances in [0, 1] of every site on a batch."""
        return self.importances_of(read_clean(model, inputs, self.sites))

    def importances_of(self, reading: Reading) -> dict[str, Float[Tensor, "*positions components"]]:
        """Return the causal importances in [0, 1] of every site on a clean run; InputError where
        the importance function gives NaN, or another shape than one number per component.
        """
        found = {name: lower(z) for name, z in self.logits(reading).items()}
        require_importances(self.sites, found, reading.inputs)
        return found

    def deltas(self, model: nn.Module) -> dict[str, Float[Tensor, "inputs outputs"]]:
        """Return `W - V U` of every site."""
        return {
            site.name: site.matrix(model).detach() - v @ u
            for site, v, u in zip(self.sites, self.V, self.U, strict=True)
        }

    def bind(
        self, target: Target, batch: Batch, reference: Reference | None = None
    ) -> ComponentMechanisms:
        """Return the components as gates on a batch, with the importances there.

        The base is zero: a matrix with every gate at zero is gone. Raises InputError for a
        reference, and where the sites do not fit the target."""
        from assay.mechanisms.components.kind import components

        self.refuse_reference(reference)
        return components(target, batch, self)


def decomposition(
    model: nn.Module,
    patterns: str | Sequence[str] | Mapping[str, int],
    components: int | None = None,
    *,
    importance: str = "scalar",
    generator: torch.Generator | None = None,
    **options: int,
) -> Decomposition:
    """Return an untrained decomposition of the matrices whose module paths match the patterns.

    `importance` is "scalar", "vector", "shared", "relative" or "transformer", and `options` are its
    sizes; see `match_sites` for the other arguments and the errors. Raises InputError too for more
    components than fit the memory."""
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    sites = match_sites(model, patterns, components)
    factors = sum(site.components * (site.inputs + site.outputs) for site in sites)
    require_memory(
        4 * factors, f"a decomposition into {sum(site.components for site in sites):,} components"
    )
    found = make_importance(importance, sites, generator, **options)
    return Decomposition(sites, found, generator)


@torch.no_grad()
def read_clean(model: nn.Module, inputs: Any, sites: Sequence[WeightSite]) -> Reading:
    """Run the frozen network once and keep its output and the sites' inputs."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Edit:
        def edit(seen: Seen) -> Tensor:
            found[name] = seen.input
            return seen.written

        return edit

    with evaluating(model):
        output = run_edited(model, inputs, {site.name: keep(site.name) for site in sites})
    missing = [site.name for site in sites if site.name not in found]
    if missing:
        raise InputError(f"site {missing[0]!r} was not reached in the forward pass")
    return Reading(plain_output(output), found)


def require_importances(
    sites: Sequence[WeightSite], importance: Mapping[str, Tensor], read: Mapping[str, Tensor]
) -> None:
    """Raise InputError unless there is one importance in [0, 1] for every component of every site
    at every position that the site reads.
    """
    for site in sites:
        inputs, found = read[site.name], importance.get(site.name)
        shape = (*(inputs.shape if site.lookup else inputs.shape[:-1]), site.components)
        if found is None or found.shape != shape or not found.is_floating_point():
            came = "none" if found is None else f"{tuple(found.shape)} of {found.dtype}"
            raise InputError(
                f"the importances of {site.name!r} must be real numbers of shape {shape}, got"
                f" {came}"
            )
        require_finite(found, f"the importances of {site.name!r}")
        low, high = found.detach().aminmax()
        if float(low) < 0 or float(high) > 1:
            raise InputError(
                f"the importances of {site.name!r} must lie in [0, 1], got {float(low):.3g} to"
                f" {float(high):.3g}"
            )


def plain_output(output: Any) -> Tensor:
    """Return the tensor of a network's output: itself, its logits, or its first entry."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    found = logits if logits is not None else output[0]
    if not isinstance(found, Tensor):
        raise InputError(f"the model returned a {type(output).__name__} without logits")
    return found
