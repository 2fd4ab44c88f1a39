"""Audits of graph files that other tools made."""

from __future__ import annotations

from assay.studies.graph_audit.audit import audit_graph
from assay.studies.graph_audit.result import GraphAudit

__all__ = ["GraphAudit", "audit_graph"]
