"""The scores that the tests of a guard read, larger for stranger inputs.

With bins v of the features and y of the root: `likelihood` is -log P(v, y) of a forest in which
every feature has one parent (the root where it has a root table, else its edge's parent, else
none); `dependence` is the sum over edges of log p(v_i) p(v_j) / p(v_i, v_j); `distance` and
`root_distance` are squared Mahalanobis distances of the values from the mean, and from that of the
predicted class (arXiv 1807.03888); `confidence` is minus the largest softmax probability (arXiv
1610.02136), `energy` minus the log of the summed exponentials of the logits (arXiv 2010.03759)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

PLAIN = ("likelihood", "dependence", "distance")
ROOTED = ("root_distance", "confidence", "energy")
TWO_SIDED = ("likelihood", "distance")
"""An input can be too likely, or too near to the mean, as mixtures are."""
WEIGHTS = {
    "likelihood": 0.25,
    "dependence": 0.25,
    "distance": 0.75,
    "root_distance": 1.0,
    "confidence": 1.5,
    "energy": 0.5,
}
"""Votes in the combination. The dependence score is a part of the likelihood, and energy sees much
of what confidence sees. Chosen on anomalies of two digits networks; the level holds for any."""


@dataclass(frozen=True)
class Mahalanobis:
    """Means (groups, features) and a whitening matrix (features, features) of values."""

    means: Float[Tensor, "groups features"]
    whiten: Float[Tensor, "features features"]

    def __call__(
        self, values: Float[Tensor, "inputs features"], group: Int[Tensor, " inputs"] | None = None
    ) -> Float[Tensor, " inputs"]:
        """Return squared distances to the mean of each input's group."""
        # In float64, rounded once: equal inputs tie whatever the number that is scored at once.
        whiten = self.whiten.double()
        moved, means = values.double() @ whiten, self.means.double() @ whiten
        found = (moved - (means[0] if group is None else means[group])).square().sum(1)
        return found.float()


def mahalanobis(
    values: Float[Tensor, "inputs features"],
    group: Int[Tensor, " inputs"] | None = None,
    groups: int = 1,
    *,
    ridge: float = 1e-3,
) -> Mahalanobis:
    """Fit means of groups and one covariance within them, with `ridge` of the mean variance added;
    a group without inputs has the mean of all.
    """
    wide = values.double()
    means = wide.mean(0).expand(groups, -1).clone()
    place = torch.zeros(len(wide), dtype=torch.long) if group is None else group
    for one in place.unique().tolist():
        means[one] = wide[place == one].mean(0)
    centred = wide - means[place]
    covariance = centred.T @ centred / max(len(wide) - 1, 1)
    scale = covariance.diagonal().mean().clamp_min(1e-12)
    covariance.diagonal().add_(ridge * scale)
    values_, vectors = torch.linalg.eigh(covariance)
    whiten = vectors / values_.clamp_min(1e-12 * float(scale)).sqrt()
    return Mahalanobis(means.float(), whiten.float())


def confidence(logits: Float[Tensor, "inputs classes"]) -> Float[Tensor, " inputs"]:
    return -logits.softmax(1).max(1).values


def energy(logits: Float[Tensor, "inputs classes"]) -> Float[Tensor, " inputs"]:
    return -logits.logsumexp(1)
