"""Two decompositions of one network: which components they share."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from assay.errors import InputError
from assay.mechanisms.components.decomposition import Decomposition
from assay.mechanisms.components.recovery import alive


@torch.no_grad()
def match_components(
    first: Decomposition,
    second: Decomposition,
    importances: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
) -> pl.DataFrame:
    """Match the alive components of two decompositions of the same matrices one to one, by the
    cosine of their rank-one matrices, `cos(V_c, V_d) cos(U_c, U_d)`; the matching maximises the
    sum.

    `importances` are those of both on the same probes (probes, components), and say what is alive.
    One row per alive component of either; unmatched ones have a cosine of null. Raises InputError
    when the sites differ."""
    names = [site.name for site in first.sites]
    if names != [site.name for site in second.sites]:
        raise InputError(
            f"the decompositions are of other sites: {names} and"
            f" {[site.name for site in second.sites]}"
        )
    rows = []
    for name in names:
        kept = [alive(own[name].flatten(0, -2)).nonzero()[:, 0].tolist() for own in importances]
        cosines = rank_one_cosines(first.factors(name), second.factors(name))[kept[0]][:, kept[1]]
        ours, theirs = linear_sum_assignment(-cosines.numpy())
        pairs = {
            (kept[0][one], kept[1][two]): float(cosines[one, two])
            for one, two in zip(ours, theirs, strict=True)
        }
        rows += [
            {"site": name, "first": one, "second": two, "cosine": value}
            for (one, two), value in sorted(pairs.items())
        ]
        rows += [
            {"site": name, "first": one, "second": None, "cosine": None}
            for one in sorted(set(kept[0]) - {pair[0] for pair in pairs})
        ]
        rows += [
            {"site": name, "first": None, "second": two, "cosine": None}
            for two in sorted(set(kept[1]) - {pair[1] for pair in pairs})
        ]
    schema = {"site": pl.String, "first": pl.Int64, "second": pl.Int64, "cosine": pl.Float64}
    return pl.DataFrame(rows, schema=schema)


def rank_one_cosines(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]
) -> Float[Tensor, "ours theirs"]:
    """Return the cosines of all pairs of rank-one matrices `V_c U_c`, without forming them."""
    (v, u), (other_v, other_u) = ((pair[0].double(), pair[1].double()) for pair in (first, second))
    tiny = torch.finfo(torch.float64).tiny
    v, other_v = (entry / entry.norm(dim=0).clamp_min(tiny) for entry in (v, other_v))
    u, other_u = (entry / entry.norm(dim=1, keepdim=True).clamp_min(tiny) for entry in (u, other_u))
    return (v.T @ other_v) * (u @ other_u.T)
