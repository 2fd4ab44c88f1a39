"""Bins of feature values, so that what a feature does is one of a few events."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.errors import InputError


@dataclass(frozen=True)
class Quantiser:
    """Bins of every feature: `cuts` (features, bins - 1) in rising order, padded with infinity, and
    `fires` (features,), the first bin in which a feature fires (its value is above the threshold).

    A value at a cut is in the bin below it."""

    cuts: Float[Tensor, "features cuts"]
    fires: Int[Tensor, " features"]

    @property
    def bins(self) -> int:
        """The largest number of bins of a feature."""
        return self.cuts.shape[1] + 1

    @property
    def sizes(self) -> Int[Tensor, " features"]:
        """The number of bins of every feature."""
        return torch.isfinite(self.cuts).sum(1) + 1

    def __call__(self, values: Float[Tensor, "inputs features"]) -> Int[Tensor, "inputs features"]:
        """Return the bin of every value; NaN is above all cuts, so callers rule it out first."""
        return torch.searchsorted(self.cuts, values.T.to(self.cuts.dtype).contiguous()).T

    def describe(self, feature: int, bin: int) -> str:
        """Return the interval that a bin is, for tables."""
        cuts = self.cuts[feature][torch.isfinite(self.cuts[feature])].tolist()
        if bin < 0:
            return "not finite"
        low = f"{cuts[bin - 1]:.3g}" if bin else "-inf"
        return f"({low}, {cuts[bin]:.3g}]" if bin < len(cuts) else f"above {low}"


def quantise(
    values: Float[Tensor, "inputs features"],
    bins: int = 6,
    *,
    least: int = 20,
    threshold: float = 0.0,
) -> Quantiser:
    """Fit bins of about equal mass on either side of a threshold, each with at least `least`
    inputs.

    A constant side (the zeros of a ReLU) is one bin and leaves its share to the other side. The
    threshold is always a cut, so that firing is an event even where it was never seen. Raises
    InputError for fewer than two bins, no inputs, and values that are not finite."""
    if bins < 2 or least < 1:
        raise InputError(f"bins must be at least 2 and least at least 1, got {bins} and {least}")
    if not len(values):
        raise InputError("no inputs to fit bins on")
    if not bool(torch.isfinite(values).all()):
        raise InputError("the features hold NaN or infinite values; a laboratory must be finite")
    # In float32, as they are compared: a cut must not move when it is saved.
    rows = values.detach().float().T.contiguous()
    found, fires = [], []
    for row in rows:
        below, above = row[row <= threshold], row[row > threshold]
        constant = not len(below) or bool((below == below[0]).all())
        lower = _cuts(below, 1 if constant else max(1, bins // 2), least)
        upper = _cuts(above, bins - 1 - len(lower), least)
        lower = lower[lower < threshold]
        fires.append(len(lower) + 1)
        found.append(torch.cat([lower, torch.tensor([threshold]), upper]))
    width = max(map(len, found))
    cuts = torch.full((len(found), width), torch.inf)
    for place, row in enumerate(found):
        cuts[place, : len(row)] = row
    return Quantiser(cuts, torch.tensor(fires))


def _cuts(values: Tensor, wanted: int, least: int) -> Tensor:
    """Return the cuts between up to `wanted` bins of at least `least` values each."""
    count = min(wanted, len(values) // least)
    if count < 2:
        return values[:0]
    places = torch.arange(1, count) * len(values) // count
    inner = values.sort().values[places - 1].unique()
    return inner[inner < values.max()]


def without_knowledge(
    quantiser: Quantiser, values: Float[Tensor, "inputs features"]
) -> Float[Tensor, "features bins"]:
    """Return the shares that bins have for one who knows of a feature only where its values lie:
    uniform over their range, and `1/bins` for a bin whose values are all one (the zeros of a ReLU).
    """
    placed, size = quantiser(values), quantiser.bins
    shares = torch.zeros(len(quantiser.cuts), size, dtype=torch.float64)
    for feature, cuts in enumerate(quantiser.cuts.double()):
        inside, own = values[:, feature].double(), cuts[torch.isfinite(cuts)]
        bins = len(own) + 1
        ends = torch.cat([inside.min()[None], own, inside.max()[None]]).clamp(
            float(inside.min()), float(inside.max())
        )
        widths = ends.diff().clamp_min(0)
        spread = torch.tensor(
            [
                float(here.max() - here.min()) if len(here) else 0.0
                for here in (inside[placed[:, feature] == one] for one in range(bins))
            ]
        )
        single = spread == 0
        widths = torch.where(single, 0.0, widths)
        rest = 1 - float(single.sum()) / bins
        total = float(widths.sum())
        shares[feature, :bins] = torch.where(
            single, 1 / bins, rest * widths / total if total else 0.0
        )
    return shares
