"""Faithfulness of circuits that are sets of edges: every edge outside the circuit carries its
value in the patch run.
"""

from __future__ import annotations

from collections.abc import Iterable

import polars as pl
import torch
from jaxtyping import Bool
from torch import Tensor

from assay.audit.faithfulness import TRACK, Faithfulness, summarise
from assay.core.target import Batch, Target
from assay.edges.patching import patch_edges
from assay.edges.scores import EdgeScores
from assay.edges.wiring import wire
from assay.progress import progress


def edge_faithfulness(
    target: Target, clean: Batch, patch: Batch, keep: Bool[Tensor, "sources receivers"]
) -> Faithfulness:
    """Return faithfulness and completeness of the kept edges; see `Faithfulness`. With no edge
    kept the run is the patch run.
    """
    wiring = wire(target.model)
    keep = keep & wiring.graph.mask
    nothing = torch.zeros_like(keep)
    with torch.no_grad():
        full = target.values(clean).double()
    empty, circuit, rest = (
        patch_edges(target, clean, patch, mask, wiring=wiring)
        for mask in (nothing, keep, wiring.graph.mask & ~keep)
    )
    return summarise(full, empty, circuit, rest, float(keep.sum()) / wiring.graph.edges)


def edge_curve(
    target: Target, clean: Batch, patch: Batch, scores: EdgeScores, shares: Iterable[float] = TRACK
) -> pl.DataFrame:
    """Return faithfulness and completeness over shares of kept edges, the largest |mean score|
    first; `areas` gives CPR and CMD.

    `edges` counts those that lie on a path from the input to the logits: the others do nothing.
    """
    rows = []
    for share in progress(shares, "faithfulness"):
        keep = scores.keep_top(share)
        found = edge_faithfulness(target, clean, patch, keep)
        rows.append(
            {"share": share, "edges": int(scores.graph.prune(keep).sum()), **found.__dict__}
        )
    return pl.DataFrame(rows)
