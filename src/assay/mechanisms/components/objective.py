"""The objective of a decomposition, as data: recon terms (routing x mask source x coefficient),
faithfulness and importance minimality (arXiv 2506.20790)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from assay.errors import InputError, unknown
from assay.mechanisms.components.decomposition import Decomposition
from assay.mechanisms.components.minimality import Minimality, SmoothL0
from assay.mechanisms.components.sources import Monitor, Source, Stochastic

Routing = Literal["all", "layerwise", "subset"]
Divergence = Literal["mse", "kl"]
Form = Literal["sum", "relative"]


@dataclass(frozen=True)
class Recon:
    """`coefficient` times the mean divergence of the masked network's output from the clean one's.

    Routing "all" masks every site at every position, "layerwise" one site at a time (the mean over
    sites), "subset" at every position k sites out of n, k uniform on 1..n."""

    source: Source = field(default_factory=Stochastic)
    routing: Routing = "all"
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        if self.routing not in get_args(Routing):
            raise unknown("routing", str(self.routing), get_args(Routing))
        _require_amount(self.coefficient)

    @property
    def name(self) -> str:
        return f"{type(self.source).__name__.lower()}_{self.routing}"


@dataclass(frozen=True)
class Faithfulness:
    """What is left of the matrices: `sum_s |W_s - V_s U_s|^2 / sum_s numel(W_s)` ("sum"), or
    `sum_s |W_s - V_s U_s|^2 / |W_s|^2` ("relative").

    The first dilutes with the number of sites, the second does not."""

    coefficient: float = 1.0
    form: Form = "relative"

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise unknown("form of faithfulness", str(self.form), get_args(Form))
        _require_amount(self.coefficient)

    def __call__(self, model: nn.Module, found: Decomposition) -> Float[Tensor, ""]:
        """Return the loss without its coefficient."""
        squares = {name: delta.square().sum() for name, delta in found.deltas(model).items()}
        if self.form == "sum":
            numel = sum(site.inputs * site.outputs for site in found.sites)
            return torch.stack(list(squares.values())).sum() / numel
        shares = [
            squares[site.name] / site.matrix(model).detach().to(squares[site.name]).square().sum()
            for site in found.sites
        ]
        return torch.stack(shares).sum()


@dataclass(frozen=True)
class Objective:
    """The sum of recon terms, importance minimality and faithfulness; fixed masks are refused as
    recon terms, because they are watched and never trained on."""

    recon: tuple[Recon, ...] = field(default_factory=lambda: (Recon(), Recon(routing="layerwise")))
    minimality: Minimality = field(default_factory=SmoothL0)
    faithfulness: Faithfulness | None = None
    divergence: Divergence = "mse"

    def __post_init__(self) -> None:
        if not self.recon:
            raise InputError("recon is empty; an objective needs at least one recon term")
        if self.divergence not in get_args(Divergence):
            raise unknown("divergence", str(self.divergence), get_args(Divergence))
        for term in self.recon:
            if isinstance(term.source, Monitor):
                raise InputError(
                    f"masks {term.source.masks!r} are watched and never trained on; give another"
                    " source"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The recon terms' names; a second one of the same kind is numbered."""
        names: list[str] = []
        for index, term in enumerate(self.recon):
            names.append(term.name if term.name not in names else f"{term.name}_{index}")
        return tuple(names)


def _require_amount(coefficient: float) -> None:
    if not coefficient >= 0:
        raise InputError(f"coefficient must be at least 0, got {coefficient}")
