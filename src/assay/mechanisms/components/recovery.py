"""Whether a decomposition found known mechanisms: alive components, MMCS, ML2R, errors of the
importance matrix, monosemantic components."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from assay.errors import InputError
from assay.mechanisms.components.decomposition import Decomposition

ALIVE = 0.1
TOLERANCE = 0.1
PROBE = 0.75


def probes(features: int, value: float = PROBE) -> Float[Tensor, "features features"]:
    """Return one input for each feature: that feature alone, at a value."""
    return value * torch.eye(features)


def alive(
    importance: Float[Tensor, "probes components"], threshold: float = ALIVE
) -> Bool[Tensor, " components"]:
    """Return which components are alive: the largest importance over the probes is above the
    threshold.
    """
    return importance.amax(0) > threshold


def monosemantic(
    importance: Float[Tensor, "features components"], threshold: float = ALIVE
) -> Bool[Tensor, " components"]:
    """Return which components are important, above the threshold, on the probe of exactly one
    feature.
    """
    return (importance > threshold).sum(0) == 1


def identity_order(importance: Float[Tensor, "features components"]) -> list[int]:
    """Return an order of the components in which the importance matrix is nearest to the identity:
    the one matched to each feature in turn (Hungarian, the largest sum), then the others.
    """
    rows, columns = linear_sum_assignment(-importance.double().numpy())
    matched = [int(column) for _, column in sorted(zip(rows, columns, strict=True))]
    return matched + [c for c in range(importance.shape[1]) if c not in set(matched)]


def identity_error(
    importance: Float[Tensor, "features components"], tolerance: float = TOLERANCE
) -> int:
    """Return IdentityCIError: after matching components to features, how many entries are off the
    identity by more than the tolerance; unmatched components must be below it.
    """
    ordered = importance[:, identity_order(importance)]
    wanted = torch.eye(*ordered.shape, dtype=ordered.dtype)
    return int(((ordered - wanted).abs() > tolerance).sum())


def dense_error(
    importance: Float[Tensor, "features components"], rank: int, tolerance: float = TOLERANCE
) -> int:
    """Return how many components too many, or too few, are alive in a matrix whose known answer is
    `rank` components for all features: | number alive - rank |.
    """
    return abs(int(alive(importance, tolerance).sum()) - rank)


@dataclass(frozen=True)
class Recovery:
    """How well alive components hold the true mechanisms of one matrix W (hidden, features).

    `cosines` (features,) are `max_c cos((V_c U_c)[:, j], W[:, j])` over alive components c, and
    `ratios` the norms' ratio at that component; `mmcs` and `ml2r` are their means."""

    cosines: Float[Tensor, " features"]
    ratios: Float[Tensor, " features"]
    component: Float[Tensor, " features"]
    alive: int

    @property
    def mmcs(self) -> float:
        return float(self.cosines.mean())

    @property
    def ml2r(self) -> float:
        return float(self.ratios.mean())


@torch.no_grad()
def recover(
    model: nn.Module,
    found: Decomposition,
    name: str,
    importance: Float[Tensor, "probes components"],
    *,
    features: Literal["inputs", "outputs"] = "inputs",
) -> Recovery:
    """Compare the alive components of a site with the columns of its matrix, one per feature.

    `features` says which side of y = x W the features are on: the other one is the hidden one.
    Raises InputError when no component is alive."""
    kept = alive(importance)
    if not bool(kept.any()):
        raise InputError(f"no component of {name!r} is alive (largest importance above {ALIVE})")
    matrix = found.site(name).matrix(model).detach().double()
    v, u = (entry.double() for entry in found.factors(name))
    # Column j of component c is reader[j, c] * writer[c], with the features on the reader's side.
    reader, writer = (v[:, kept], u[kept]) if features == "inputs" else (u[kept].T, v[:, kept].T)
    columns = matrix if features == "inputs" else matrix.T
    sizes = columns.norm(dim=1)
    cosines = (columns @ writer.T) * reader.sign()
    cosines = cosines / (sizes[:, None] * writer.norm(dim=1)).clamp_min(1e-30)
    best, component = cosines.max(1)
    held = reader.abs().gather(1, component[:, None])[:, 0] * writer.norm(dim=1)[component]
    return Recovery(best, held / sizes, kept.nonzero()[:, 0][component], int(kept.sum()))
