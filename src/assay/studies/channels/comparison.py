"""The same data under other objectives and depths: what makes attributions of channels right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import polars as pl
import torch

from assay.io.runs import Run
from assay.mechanisms.channels import channels
from assay.mechanisms.channels.attribution import attribute_channels, hoyer
from assay.studies.channels.config import Config
from assay.studies.channels.evaluation import evaluate
from assay.studies.channels.networks import train_network
from assay.targets.bilinear import BilinearNetwork
from assay.targets.data import Data, group_inputs

OBJECTIVES = (
    (0.0, 0.0, 0.1),
    (1.0, 0.0, 0.1),
    (1.0, 10.0, 0.1),
    (1.0, 100.0, 0.1),
    (1.0, 100.0, 0.03),
)
"""Weights of the sparsity and of the step, and the step that costs nothing: `lam_sparse`,
`lam_delta` and `tau`."""


def compare_networks(config: Config, data: Data, run: Run) -> pl.DataFrame:
    """Train the networks that `compare` asks for, each in a folder of its own within the run, and
    return a row for each.

    Medians and shares are over the largest channels of every held-out input outside the last block,
    whose attributions are exact. The relative error of an attribution is
    `C delta / (||g|| |cos(g, D_k)|)`, so a row has the median of each factor; the norms of the
    weights beside them are the product `||L|| ||R||`, a mean over blocks."""
    rows = []
    for name, folder, varied in _networks(config):
        model = train_network(varied, data, run.child(folder))
        rows.append({"network": name, **_measure(varied, model, data)})
    return pl.DataFrame(rows)


def _networks(config: Config) -> Iterator[tuple[str, str, Config]]:
    if config.compare.objectives:
        for number, (sparse, delta, tau) in enumerate(OBJECTIVES):
            update = {"lam_sparse": sparse, "lam_delta": delta, "tau": tau}
            training = config.training.model_copy(update=update)
            said = f"lam_sparse {sparse:g}, lam_delta {delta:g}"
            said += f", tau {tau:g}" if delta else ""
            yield said, f"objective-{number}", config.model_copy(update={"training": training})
    for depth in dict.fromkeys(config.compare.depths):
        model = config.model.model_copy(update={"blocks": depth})
        yield f"{depth} blocks", f"depth-{depth}", config.model_copy(update={"model": model})


@torch.no_grad()
def _measure(config: Config, model: BilinearNetwork, data: Data) -> dict[str, Any]:
    audit = config.audit
    x, y = data.distinct_test(audit.examples)
    clean = channels(model.double(), x.double(), y, audit.functional).clean
    found = evaluate(clean, group_inputs(x), top=audit.top, tolerance=audit.tolerance)
    sparsity, defined = hoyer(attribute_channels(clean))
    rows = found.table.filter(~pl.col("exact_by_construction") & (pl.col("step") > 0))
    aligned = rows.filter(pl.col("alignment") > 0)
    gradient = pl.col("attribution").abs() / (pl.col("step") * pl.col("alignment"))
    row: dict[str, Any] = {
        "accuracy": float((clean.logits.argmax(-1) == clean.labels).double().mean()),
        "Hoyer": float(sparsity.sum() / defined.sum().clamp(min=1)),
        "right within tolerance": found.summary["share_within_tolerance_first"],
        "certified": found.certified.get("second_order_plus_remainder_bound"),
        "|cos|": rows["alignment"].median(),
        "step": rows["step"].median(),
        "||g||": aligned.select(gradient.median()).item(),
        "relative error": rows["relative_error"].median(),
    }
    if "realised_constant" in rows.columns:
        realised = rows["realised_constant"]
        row |= {
            "C, 5 %": realised.quantile(0.05),
            "C, median": realised.median(),
            "C, 95 %": realised.quantile(0.95),
            "C certified, median": rows["certified_constant"].median(),
            "||L|| ||R||": rows["norm_product"].mean(),
        }
    return row
