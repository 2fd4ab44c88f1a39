"""Audit: how far an attribution, a circuit or an explanation can be trusted."""

from assay.audit.adversary import WorstCase, exhaustive, worst_case
from assay.audit.agreement import Agreement, agreement
from assay.audit.audit import Audit, audit
from assay.audit.bars import Bars, Rows, calibrate, conformal_quantile
from assay.audit.faithfulness import Faithfulness, areas, curve, faithfulness, keep_top
from assay.audit.scrubbing import Scrubbed, scrub

__all__ = [
    "Agreement",
    "Audit",
    "Bars",
    "Faithfulness",
    "Rows",
    "Scrubbed",
    "WorstCase",
    "agreement",
    "areas",
    "audit",
    "calibrate",
    "conformal_quantile",
    "curve",
    "exhaustive",
    "faithfulness",
    "keep_top",
    "scrub",
    "worst_case",
]
