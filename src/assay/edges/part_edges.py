"""Scores of edges between parts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from assay.core.mechanisms import Mechanisms
from assay.edges.cut import Node

METRIC = "metric"


@dataclass(frozen=True)
class PartEdges:
    """Edges between parts of one mechanism: `values` (examples, upstream, downstream) in float64,
    and `metric` (examples, upstream) straight from each part to the metric.

    Sign: what is lost of the attribution downstream when the upstream part is removed, to first
    order; the indirect effect is its negative. `switches` says how parts are taken that are active
    on one side only."""

    mechanisms: Mechanisms
    upstream: tuple[Node, ...]
    downstream: tuple[Node, ...]
    values: Float[Tensor, "examples upstream downstream"]
    metric: Float[Tensor, "examples upstream"]
    baseline: Float[Tensor, " examples"]
    switches: str = "local"
    cpu_seconds: float = 0.0

    def mean(self) -> Float[Tensor, "upstream downstream"]:
        """Return the mean over examples."""
        return self.values.mean(0)

    @cached_property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The names of the parts, upstream and downstream."""
        first, second = (
            tuple(self.mechanisms.describe(group, index) for group, index in nodes)
            for nodes in (self.upstream, self.downstream)
        )
        return first, second

    def table(self, threshold: float = 0.0) -> pl.DataFrame:
        """Return one row an edge with |mean| above a threshold: source, receiver, mean score,
        standard deviation over examples, n, mean |score|; the receiver of what goes straight to the
        metric is "metric".
        """
        whole = torch.cat([self.values, self.metric.unsqueeze(-1)], -1)
        sources, receivers = self.names
        receivers = (*receivers, METRIC)
        mean = whole.mean(0)
        up, down = ((mean.abs() > threshold) & (mean != 0)).nonzero(as_tuple=True)
        flat = whole[:, up, down]
        return pl.DataFrame(
            {
                "source": [sources[place] for place in up.tolist()],
                "receiver": [receivers[place] for place in down.tolist()],
                "score": flat.mean(0).tolist(),
                "sd": flat.std(0, correction=1 if len(flat) > 1 else 0).tolist(),
                "n": [len(flat)] * flat.shape[1],
                "size": flat.abs().mean(0).tolist(),
            },
            schema_overrides={"source": pl.String, "receiver": pl.String},
        )

    to_polars = table

    def top(self, count: int = 20) -> pl.DataFrame:
        """Return the edges with the largest |mean score|."""
        return self.table().sort(pl.col("score").abs(), descending=True).head(count)

    def over_positions(self) -> pl.DataFrame:
        """Return the edges between parts without their positions: group and last index of source
        and receiver, the sum over positions of mean scores, and the number of edges summed.
        """

        def bare(node: Node) -> str:
            group, index = node
            return f"{group}[{index[-1]}]" if len(index) > 1 else group

        rows = [
            {"source": bare(source), "receiver": bare(receiver), "score": float(score)}
            for source, line in zip(self.upstream, self.mean(), strict=True)
            for receiver, score in zip(self.downstream, line, strict=True)
            if score != 0
        ]
        schema = {"source": pl.String, "receiver": pl.String, "score": pl.Float64}
        table = pl.DataFrame(rows, schema=schema)
        found = table.group_by("source", "receiver", maintain_order=True)
        return found.agg(pl.col("score").sum(), pl.len().alias("edges")).sort(
            pl.col("score").abs(), descending=True, maintain_order=True
        )
