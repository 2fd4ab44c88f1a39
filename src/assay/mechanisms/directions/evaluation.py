"""How good a set of directions is: against known circuits, as a summary of gradients, and by
what moving along it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from assay.errors import InputError
from assay.mechanisms.directions.divergence import Divergence, divergence
from assay.mechanisms.directions.factors import Factors
from assay.mechanisms.directions.local import Local
from assay.mechanisms.directions.space import Space


@dataclass(frozen=True)
class Recovery:
    """Directions against known circuits.

    `purity (k,)` is the largest share of `||u||^2` on one circuit and `circuit (k,)` which one;
    `match` gives for each circuit that has a clean direction (purity above the threshold) the one
    of highest score."""

    purity: Tensor
    circuit: Tensor
    match: dict[int, int]

    @property
    def clean(self) -> int:
        """The number of circuits with a clean direction of their own."""
        return len(self.match)

    @property
    def worst_purity(self) -> float:
        """The lowest purity among matched directions (NaN when there is none)."""
        return float(self.purity[list(self.match.values())].min()) if self.match else float("nan")


def recover(directions: Tensor, owner: Tensor, *, threshold: float = 0.9) -> Recovery:
    """Compare directions `(k, size)`, in order of score, with the circuit that owns each parameter
    entry.

    `owner (size,)` holds circuit numbers; entries of -1 are shared by all circuits and left out of
    the purity."""
    circuits = int(owner.max()) + 1
    if circuits < 1:
        raise InputError(
            "owner names no circuit; purity needs at least one parameter entry that belongs to a"
            " circuit"
        )
    members = (
        torch.nn.functional.one_hot(owner.clamp_min(0), circuits).to(directions.dtype)
        * (owner >= 0)[:, None]
    )
    shares = directions.square() @ members
    shares = shares / shares.sum(1, keepdim=True).clamp_min(torch.finfo(shares.dtype).tiny)
    purity, circuit = shares.max(1)
    match: dict[int, int] = {}
    for index in range(directions.shape[0]):
        if float(purity[index]) > threshold:
            match.setdefault(int(circuit[index]), index)
    return Recovery(purity, circuit, match)


def reconstruction_error(factors: Factors, directions: Tensor) -> float:
    """Return `sum ||g - P g||^2 / sum ||g||^2` over all factor rows, `P` the projection onto the
    span of the directions.
    """
    basis = torch.linalg.qr(directions.T).Q.T
    return 1 - float(factors.dot(basis).square().sum() / factors.traces().sum())


def path_coefficients(
    space: Space, directions: Tensor, first: str = "W_in", second: str = "W_out"
) -> Tensor:
    """Return what each direction's own weights do to each input, `U_second U_first`, `(k,
    outputs, inputs)`.
    """
    parts = space.split(directions)
    return parts[second] @ parts[first]


def coefficient_r2(coefficients: Tensor, paths: Tensor, match: dict[int, int]) -> float:
    """Return r2 between the columns of `A (outputs, inputs)` and the matched directions' paths, one
    scale per direction.

    Column `j` of `A` is what input `j`, circuit `j`, does to every output; an unmatched circuit
    counts as predicted by zero."""
    residual = 0.0
    for circuit in range(coefficients.shape[1]):
        wanted = coefficients[:, circuit].double()
        if circuit in match:
            path = paths[match[circuit]][:, circuit].double()
            wanted = wanted - path * (path @ wanted) / path.square().sum().clamp_min(1e-30)
        residual += float(wanted.square().sum())
    centred = coefficients.double() - coefficients.double().mean()
    return 1 - residual / float(centred.square().sum())


def effective_directions(activity: Tensor) -> Tensor:
    """Return the participation ratio `(sum_k d)^2 / sum_k d^2` of each sample, `(samples,)`: how
    many directions are active.
    """
    return activity.sum(1).square() / activity.square().sum(1).clamp_min(
        torch.finfo(activity.dtype).tiny
    )


def overlap(first: Tensor, second: Tensor) -> float:
    """Return the overlap of two spans, `||Q1 Q2^T||_F^2 / min(k1, k2)`: one when the smaller
    lies in the larger.
    """
    left, right = (torch.linalg.qr(rows.T).Q for rows in (first, second))
    return float((left.T @ right).square().sum()) / min(first.shape[0], second.shape[0])


def stability(runs: Sequence[Tensor]) -> float:
    """Return the mean matched `|<u, u'>|` over all pairs of runs (seeds); one when every direction
    comes back.

    Raises InputError with fewer than two runs.
    """
    if len(runs) < 2:
        raise InputError(f"stability compares at least two runs, got {len(runs)}")
    found = []
    for index, first in enumerate(runs):
        for second in runs[index + 1 :]:
            cosines = (first @ second.T).abs().cpu().numpy()
            found.append(cosines[linear_sum_assignment(-cosines)].mean())
    return float(sum(found) / len(found))


def intervention_curve(
    local: Local, direction: Tensor, amounts: Sequence[float], measure: str | Divergence = "kl"
) -> Tensor:
    """Return `D(f(x, W0 + a u), f(x, W0))`, `(amounts, samples)` or with positions last,
    exactly.
    """
    measure = divergence(measure)
    with torch.no_grad():
        reference = local.output()
        return torch.stack(
            [measure.value(local.moved(direction, amount), reference) for amount in amounts]
        )


def top_inputs(activity: Tensor, direction: int, count: int = 10) -> list[tuple[int, float]]:
    """Return the samples on which a direction's activity is largest, with the activity."""
    values, index = activity[:, direction].topk(min(count, activity.shape[0]))
    return list(zip(index.tolist(), values.tolist(), strict=True))


def top_outputs(
    local: Local, direction: Tensor, sample: int, count: int = 5
) -> list[tuple[int, float]]:
    """Return the outputs that a step along the direction raises and lowers most on one sample (last
    position), strongest first.

    Changes are less their mean over outputs, since a common shift of all logits changes nothing.
    """
    _, tangent = local.take(slice(sample, sample + 1)).tangents(direction[None])
    change = tangent.reshape(-1, tangent.shape[-1])[-1].double()
    change = change - change.mean()
    index = change.abs().topk(min(count, change.numel())).indices
    return [(int(entry), float(change[entry])) for entry in index]
