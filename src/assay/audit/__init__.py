"""Audit: how far an attribution, a circuit or an explanation can be trusted."""

from assay.audit.adversary import WorstCase, exhaustive, worst_case
from assay.audit.agreement import Agreement, agreement
from assay.audit.applied import Applied, apply_bars
from assay.audit.audit import Audit, audit, disagreement
from assay.audit.auto import Choice, choose_method
from assay.audit.bars import Bars, conformal_quantile
from assay.audit.budgeted import Budgeted, budgeted
from assay.audit.circuits import (
    CircuitCurve,
    Ranking,
    circuit_curve,
    node_masks,
    rank_parts,
    track_counts,
)
from assay.audit.compare import Comparison, compare
from assay.audit.coverage import Coverage
from assay.audit.edges import edge_curve, edge_faithfulness
from assay.audit.effects import ExactEffects
from assay.audit.faithfulness import Faithfulness, areas, curve, faithfulness, keep_top
from assay.audit.heat import heat
from assay.audit.intervals import ConfidenceInterval, mean_interval, ratio_interval
from assay.audit.means import exact_top, mean_effects
from assay.audit.refinement import Refined, refine_circuit
from assay.audit.saved import bars_from_json, bars_to_json
from assay.audit.scrubbing import Scrubbed, scrub
from assay.audit.totals import top_recall, totals

__all__ = [
    "Agreement",
    "Applied",
    "Audit",
    "Bars",
    "Budgeted",
    "Choice",
    "CircuitCurve",
    "Comparison",
    "ConfidenceInterval",
    "Coverage",
    "ExactEffects",
    "Faithfulness",
    "Ranking",
    "Refined",
    "Scrubbed",
    "WorstCase",
    "agreement",
    "apply_bars",
    "areas",
    "audit",
    "bars_from_json",
    "bars_to_json",
    "budgeted",
    "choose_method",
    "circuit_curve",
    "compare",
    "conformal_quantile",
    "curve",
    "disagreement",
    "edge_curve",
    "edge_faithfulness",
    "exact_top",
    "exhaustive",
    "faithfulness",
    "heat",
    "keep_top",
    "mean_effects",
    "mean_interval",
    "node_masks",
    "rank_parts",
    "ratio_interval",
    "refine_circuit",
    "scrub",
    "top_recall",
    "totals",
    "track_counts",
    "worst_case",
]
