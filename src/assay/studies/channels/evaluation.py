"""How right the attributions of a bilinear network's channels are, and how much of that is
certified.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from torch import Tensor

from assay.errors import InputError
from assay.mechanisms.channels.ablation import ablate_channels
from assay.mechanisms.channels.attribution import alignments, attribute_channels, measure_steps
from assay.mechanisms.channels.certify import certify_channels, certify_relative
from assay.mechanisms.channels.clean import Clean
from assay.mechanisms.channels.constants import closed_form_steps, error_constants
from assay.mechanisms.channels.second_order import half_curvatures
from assay.studies.channels.words import BOUNDS

_ESTIMATES = {
    "first_order_bound": "attribution",
    "second_order_bound": "second_order",
    "second_order_plus_remainder_bound": "attribution",
}


@dataclass(frozen=True)
class Evaluation:
    """The largest channels of every input.

    `table` has a row each; `summary` counts, medians and shares over the channels that need a
    certificate, since those of the last block are exact by construction; `certified` the shares of
    these whose relative error is proved to be within tolerance, by certificate; `refused` what does
    not exist here and why. `second_bound` (examples, blocks, hidden) bounds the error of the
    second-order estimate, None where there is no bound."""

    table: pl.DataFrame
    summary: dict[str, Any]
    certified: dict[str, float | None]
    refused: dict[str, str]
    second_bound: Tensor | None


@torch.no_grad()
def evaluate(clean: Clean, groups: Tensor, *, top: int = 5, tolerance: float = 0.1) -> Evaluation:
    """Measure and certify the `top` channels of each input by |attribution|, over all blocks.

    `groups` numbers the inputs by their content. The relative error is |attribution - exact| /
    |exact|; a certificate B counts when B <= rho |attr| / (1 + rho)."""
    attribution, ablation = attribute_channels(clean), ablate_channels(clean)
    columns = {
        "attribution": attribution,
        "exact": ablation.effects,
        "error": ablation.errors,
        "step": measure_steps(clean),
        "alignment": alignments(clean),
    }
    refused: dict[str, str] = {}
    second_bound = None
    exact = torch.zeros_like(attribution, dtype=torch.bool)
    try:
        curvature = half_curvatures(clean)
        columns["second_order"] = attribution - curvature
        columns["second_error"] = ablation.errors - curvature
    except InputError as error:
        refused["second order"] = str(error)
    try:
        found = certify_channels(clean, tight=not clean.live)
        exact, columns["rounding"] = found.exact, found.rounding
        columns["first_order_bound"] = columns["bound"] = found.first
        if found.second is None:
            refused["second-order bound"] = (
                "a live RMSNorm adds a remainder that the second-order bound does not cover"
            )
        else:
            second_bound = found.second
            columns["second_order_bound"] = found.second
            columns["second_order_plus_remainder_bound"] = columns["bound"] = found.first_tight
        constants = error_constants(clean, ablation, found)
        columns["realised_constant"] = constants.realised
        columns["certified_constant"] = constants.certified
        limits = closed_form_steps(attribution, constants.norms, constants.later, tolerance)
        columns["closed_form_step"] = limits
        columns["norm_product"] = constants.norms[:, None].expand_as(attribution)
    except InputError as error:
        refused["certificates"] = str(error)
    columns["exact_by_construction"] = exact
    examples, blocks, hidden = attribution.shape
    count = min(top, blocks * hidden)
    chosen = attribution.flatten(1).abs().topk(count, dim=1).indices
    table = pl.DataFrame(
        {
            "example": torch.arange(examples).repeat_interleave(count).tolist(),
            "group": groups.repeat_interleave(count).tolist(),
            "block": (chosen // hidden).flatten().tolist(),
            "channel": (chosen % hidden).flatten().tolist(),
            **{
                name: values.flatten(1).gather(1, chosen).flatten().tolist()
                for name, values in columns.items()
            },
        }
    ).with_columns(
        relative_error=_ratio(pl.col("error").abs(), pl.col("exact").abs()),
    )
    if "bound" in columns:
        table = table.with_columns(score=_ratio(pl.col("bound"), pl.col("attribution").abs()))
    needing = table.filter(~pl.col("exact_by_construction"))
    certified = {
        name: _certified_share(needing, name, tolerance) for name in BOUNDS if name in columns
    }
    return Evaluation(
        table, _summarise(table, needing, tolerance), certified, refused, second_bound
    )


def _summarise(table: pl.DataFrame, needing: pl.DataFrame, tolerance: float) -> dict[str, Any]:
    within = int((needing["relative_error"] <= tolerance).sum())
    summary: dict[str, Any] = {
        "channels": table.height,
        "exact_by_construction": table.height - needing.height,
        "need_certificate": needing.height,
        "within_tolerance_first": within,
        "share_within_tolerance_first": within / needing.height if needing.height else None,
        "median_relative_error_first": needing["relative_error"].median(),
        "median_alignment": table["alignment"].median(),
        "median_step": table["step"].median(),
    }
    if "second_order" in table.columns:
        second = _ratio((pl.col("second_order") - pl.col("exact")).abs(), pl.col("exact").abs())
        summary["median_relative_error_second"] = needing.select(second.median()).item()
    return summary


def summarise_constants(table: pl.DataFrame) -> pl.DataFrame:
    """Return quantiles, by block, of the realised constant `|error| / delta^2` of the largest
    channels, beside the product of norms of L and R and the certified constant.
    """
    if "realised_constant" not in table.columns:
        return pl.DataFrame()
    rows = table.filter(~pl.col("exact_by_construction") & (pl.col("step") > 0))
    realised = pl.col("realised_constant")
    return (
        rows.group_by("block")
        .agg(
            pl.len().alias("channels"),
            realised.quantile(0.05).alias("realised, 5 %"),
            realised.median().alias("realised, median"),
            realised.quantile(0.95).alias("realised, 95 %"),
            realised.max().alias("realised, largest"),
            pl.col("certified_constant").median().alias("certified, median"),
            pl.col("norm_product").first().alias("product of norms of L and R"),
        )
        .sort("block")
    )


def _ratio(above: pl.Expr, below: pl.Expr) -> pl.Expr:
    # Nothing of nothing is nothing: a channel without any effect and without any score is right.
    return pl.when(above == 0).then(0.0).otherwise(above / below)


def _certified_share(needing: pl.DataFrame, name: str, tolerance: float) -> float | None:
    if not needing.height:
        return None
    bound, estimate = (
        torch.tensor(needing[column].to_list()) for column in (name, _ESTIMATES[name])
    )
    return float(certify_relative(bound.double(), estimate.double(), tolerance).double().mean())
