"""How right the attributions of a bilinear network's channels are, and how much of that is
certified.
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor

from assay.errors import InputError
from assay.mechanisms.channels.ablation import ablate_channels
from assay.mechanisms.channels.attribution import attribute_channels, measure_steps
from assay.mechanisms.channels.certify import certify_channels, certify_relative
from assay.mechanisms.channels.clean import Clean
from assay.mechanisms.channels.second_order import half_curvatures


@dataclass(frozen=True)
class Evaluation:
    """The largest channels of every input: `table` has a row each, `summary` medians and shares,
    `certified` the shares whose relative error is proved to be within tolerance by each
    certificate, `refused` what does not exist here and why.

    `second_bound` (examples, blocks, hidden) bounds the error of the second-order estimate, None
    where there is no bound."""

    table: pl.DataFrame
    summary: dict[str, float]
    certified: dict[str, float]
    refused: dict[str, str]
    second_bound: Tensor | None


@torch.no_grad()
def evaluate(clean: Clean, *, top: int = 5, tolerance: float = 0.1) -> Evaluation:
    """Measure and certify the `top` channels of each input by |attribution|, over all blocks.

    The relative error is |attribution - exact| / |exact|; a certificate B counts when B <= rho
    |attr| / (1 + rho)."""
    attribution, exact = attribute_channels(clean), ablate_channels(clean).effects
    columns = {"attribution": attribution, "exact": exact, "step": measure_steps(clean)}
    refused: dict[str, str] = {}
    second_bound = None
    try:
        columns["second"] = attribution - half_curvatures(clean)
    except InputError as error:
        refused["second order"] = str(error)
    try:
        found = certify_channels(clean, tight=not clean.live)
        columns["B1"] = found.first
        if found.second is None:
            refused["tight certificate"] = (
                "a live RMSNorm adds a remainder that the tight certificate does not bound"
            )
        else:
            second_bound = found.second
            columns |= {"B3": found.second, "bound": found.first_tight}
        columns.setdefault("bound", found.first)
    except InputError as error:
        refused["certificates"] = str(error)
    examples, blocks, hidden = attribution.shape
    count = min(top, blocks * hidden)
    chosen = attribution.flatten(1).abs().topk(count, dim=1).indices
    picked = {
        name: values.flatten(1).gather(1, chosen).flatten() for name, values in columns.items()
    }
    table = pl.DataFrame(
        {
            "example": torch.arange(examples).repeat_interleave(count).tolist(),
            "block": (chosen // hidden).flatten().tolist(),
            "channel": (chosen % hidden).flatten().tolist(),
            **{name: values.tolist() for name, values in picked.items()},
            "relative_error": _relative(picked["attribution"], picked["exact"]).tolist(),
        }
    )
    summary = {
        "median_relative_error_first": _median(_relative(picked["attribution"], picked["exact"])),
        "share_within_tolerance_first": float(
            (_relative(picked["attribution"], picked["exact"]) <= tolerance).double().mean()
        ),
    }
    if "second" in picked:
        summary["median_relative_error_second"] = _median(
            _relative(picked["second"], picked["exact"])
        )
    certified = {}
    for name, bound, estimate in (
        ("B1", "B1", "attribution"),
        ("B3", "B3", "second"),
        ("q+B3", "bound", "attribution"),
    ):
        if bound in picked and (name != "q+B3" or "B3" in picked):
            certified[name] = float(
                certify_relative(picked[bound], picked[estimate], tolerance).double().mean()
            )
    return Evaluation(table, summary, certified, refused, second_bound)


def _relative(estimate: Tensor, exact: Tensor) -> Tensor:
    error = (estimate - exact).abs()
    # A channel without any effect and without any score is right.
    return torch.where(error == 0, error, error / exact.abs())


def _median(values: Tensor) -> float:
    return float(values.median())
