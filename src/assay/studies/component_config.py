"""The keys of importance minimality, which studies of components share."""

from __future__ import annotations

from typing import Literal

from assay.studies.fields import Amount, Config, Positive, Probability


class PenaltyConfig(Config):
    """Importance minimality: `smooth-l0` with gamma falling from 1, or `lp` with p falling from
    `p_start`; beta is the coefficient of the entropy part.
    """

    form: Literal["smooth-l0", "lp"] = "smooth-l0"
    coefficient: Positive = 2.6e-3
    gamma: Positive = 0.03
    p: Positive = 1.0
    p_start: Positive = 1.0
    eps: Positive = 1e-12
    beta: Amount = 0.0
    end: Probability = 0.8
