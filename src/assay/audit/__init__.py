"""Audit: how far an attribution, a circuit or an explanation can be trusted."""

from assay.audit.adversary import WorstCase, exhaustive, worst_case
from assay.audit.agreement import Agreement, agreement
from assay.audit.audit import Audit, audit
from assay.audit.bars import Bars, conformal_quantile
from assay.audit.budgeted import Budgeted, budgeted
from assay.audit.coverage import Coverage
from assay.audit.edges import edge_curve, edge_faithfulness
from assay.audit.effects import ExactEffects
from assay.audit.faithfulness import Faithfulness, areas, curve, faithfulness, keep_top
from assay.audit.heat import heat
from assay.audit.scrubbing import Scrubbed, scrub
from assay.audit.intervals import ConfidenceInterval, mean_interval, ratio_interval
from assay.audit.totals import top_recall, totals

__all__ = [
    "Agreement",
    "Audit",
    "Bars",
    "Budgeted",
    "ConfidenceInterval",
    "Coverage",
    "ExactEffects",
    "Faithfulness",
    "Scrubbed",
    "WorstCase",
    "agreement",
    "areas",
    "audit",
    "budgeted",
    "conformal_quantile",
    "curve",
    "edge_curve",
    "edge_faithfulness",
    "exhaustive",
    "faithfulness",
    "heat",
    "keep_top",
    "mean_interval",
    "ratio_interval",
    "scrub",
    "top_recall",
    "totals",
    "worst_case",
]
