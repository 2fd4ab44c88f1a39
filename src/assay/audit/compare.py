"""How far the parts of two sets of scores on the same examples agree, matched one to one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from assay.attribution.scores import Scores
from assay.core.values import columns, unravel
from assay.errors import InputError

ACTIVE = 3
"""In how many examples a part has a score other than zero where its correlation says anything."""


@dataclass(frozen=True)
class Comparison:
    """Parts of two sets of scores, matched one to one within a group so that the sum of their
    similarities is largest.

    `table` has a row for every match: first, second, similarity, size. `stability` is the mean
    similarity weighted by the size, the mean |score| in the first set; None where every score is
    zero, and `reason` says so. `left_out` counts the parts of the first set that have a score in
    fewer examples than a correlation takes."""

    table: pl.DataFrame
    stability: float | None
    reason: str = ""
    left_out: int = 0

    def summary(self) -> dict[str, float | int | str | None]:
        """Return the numbers that `--json` shows, and what they mean."""
        similarity = self.table["similarity"].to_numpy()
        found = {
            "matched": self.table.height,
            "stability": self.stability,
            "above_0.9": float((similarity > 0.9).mean()) if len(similarity) else None,
            "left_out": self.left_out,
            "similarity": "A similarity is the absolute correlation of two parts' scores over the"
            " examples; stability is its mean weighted by mean |score|, and above_0.9 the share of"
            f" matches with more than 0.9. Parts with a score in fewer than {ACTIVE} examples are"
            " left out.",
        }
        return found | ({"reason": self.reason} if self.reason else {})


def compare(left: Scores, right: Scores) -> Comparison:
    """Match the parts of two sets of scores by how they vary over the same examples.

    The similarity of two parts is the absolute correlation of their per-example scores. Parts that
    have a score in fewer than three examples are left out: any two with one in the same example
    correlate perfectly. Raises InputError when the groups or the numbers of
    examples differ."""
    if set(left.values) != set(right.values) or len(left.mechanisms.batch) != len(
        right.mechanisms.batch
    ):
        raise InputError(
            "the two cannot be compared: they differ in gate groups or in the number of examples"
        )
    frames, left_out = [], 0
    for name in left.values:
        (first, one), (second, two) = (columns(entry.values[name]) for entry in (left, right))
        kept, others = ((flat != 0).sum(0) >= ACTIVE for flat in (first, second))
        left_out += int((~kept).sum())
        first, one, second, two = first[:, kept], one[kept], second[:, others], two[others]
        similarity = (_standard(first).T @ _standard(second)).abs().cpu().numpy()
        rows, matches = linear_sum_assignment(-similarity)
        frames.append(
            pl.DataFrame(
                {
                    "first": _describe(left, name, one[rows.tolist()]),
                    "second": _describe(right, name, two[matches.tolist()]),
                    "similarity": similarity[rows, matches],
                    "size": first[:, rows.tolist()].abs().mean(0).tolist(),
                },
                schema={
                    "first": pl.String,
                    "second": pl.String,
                    "similarity": pl.Float64,
                    "size": pl.Float64,
                },
            )
        )
    table = pl.concat(frames).sort("size", descending=True, maintain_order=True)
    if not table["size"].sum() > 0:
        reason = f"no part has a score other than zero in {ACTIVE} examples of both"
        return Comparison(table, None, reason, left_out)
    stability = np.average(table["similarity"].to_numpy(), weights=table["size"].to_numpy())
    return Comparison(table, float(stability), left_out=left_out)


def _standard(flat: Tensor) -> Tensor:
    flat = flat - flat.mean(0)
    return flat / flat.norm(dim=0).clamp_min(torch.finfo(flat.dtype).tiny)


def _describe(scores: Scores, name: str, places: Tensor) -> list[str]:
    axes = tuple(scores.values[name].shape[1:])
    return [
        scores.mechanisms.describe(name, tuple(index)) for index in unravel(places, axes).tolist()
    ]
