"""Importance minimality from its keys."""

from __future__ import annotations

from assay.mechanisms.components import LpMinimality, SmoothL0
from assay.mechanisms.components.minimality import Minimality
from assay.studies.component_config import PenaltyConfig


def make_penalty(chosen: PenaltyConfig, references: float) -> Minimality:
    """Return the penalty; `references` is the reference count of the smooth form."""
    if chosen.form == "lp":
        return LpMinimality(
            chosen.coefficient,
            chosen.beta,
            chosen.p,
            chosen.p_start,
            end=chosen.end,
            eps=chosen.eps,
        )
    return SmoothL0(
        chosen.coefficient,
        frequency=chosen.beta * chosen.coefficient,
        references=references,
        gamma=chosen.gamma,
        gamma_start=max(1.0, chosen.gamma),
        end=chosen.end,
    )
