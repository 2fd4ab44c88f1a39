"""What the audit of a graph found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

from assay.audit.claims import Claims


@dataclass(frozen=True)
class GraphAudit:
    """The claims of a graph's nodes and edges beside exact effects; `about` says what was measured
    on what.
    """

    nodes: Claims
    edges: Claims
    about: dict[str, Any]

    def sentences(self) -> list[str]:
        """Say how many nodes and edges hold, and how the graph's own numbers differ, if they do."""
        differences = self.about.get("differences")
        verdicts = [self.nodes.sentence("nodes"), self.edges.sentence("edges")]
        return [*verdicts, *([differences] if differences else [])]

    def summary(self) -> dict[str, Any]:
        """Return everything but the rows, as plain values."""
        first, second, *_ = self.sentences()
        return {
            **self.about,
            "verdict_nodes": first,
            "verdict_edges": second,
            "of_nodes": self.nodes.summary(),
            "of_edges": self.edges.summary(),
        }

    def top(self, count: int = 20) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Return the first rows of nodes and of edges."""
        return self.nodes.table.head(count), self.edges.table.head(count)
