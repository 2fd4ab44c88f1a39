"""Claims about max-of-K transformers: how many inputs are answered right, and the mean
cross-entropy.
"""

from typing import Any

import numpy as np

from assay_check.envelope import Envelope, Task, Verdict
from assay_check.max_of_k import accuracy, cross_entropy
from assay_check.max_of_k.execution import logit_error
from assay_check.max_of_k.margins import Margins
from assay_check.max_of_k.measure import Measure
from assay_check.max_of_k.model import Model
from assay_check.reading import need

RULES = {**dict.fromkeys(accuracy.RULES, accuracy), cross_entropy.RULE: cross_entropy}


def check(envelope: Envelope, weights: bytes | None) -> Verdict:
    """Recompute a claim about a network; what is read from the certificate is the claim, and
    advice that is tested.
    """
    rule = envelope.rule
    need(isinstance(rule, str) and rule in RULES, f"unknown rule {rule!r}; known: {sorted(RULES)}")
    model = Model(envelope.needs(weights))
    measure = Measure(envelope.own["measure"], model.V, model.K)
    RULES[rule].read(envelope, measure)
    if envelope.level == "float64":
        reason = "level float64 is a search in unproved arithmetic, not a proof"
    elif envelope.model != model.entry:
        reason = "the certificate is about other weights"
    else:
        found = RULES[rule].recompute(
            envelope, measure, lambda: Margins(model, _error(envelope, model))
        )
        return _verdict(envelope, measure, *found)
    return _verdict(envelope, measure, False, reason)


def _verdict(envelope: Envelope, measure: Measure, *found: Any) -> Verdict:
    accepted, reason, *rest = found
    about = (RULES[envelope.rule].describe(measure), envelope.level, _assumptions(envelope))
    return Verdict(accepted, reason, *about, *rest)


def _error(envelope: Envelope, model: Model) -> np.ndarray:
    """Return how far executed logits may be from the real ones, (query, token)."""
    if envelope.level == "float32":
        return logit_error(model, envelope.assumptions.get("exp_ulp"))
    return np.zeros((model.V, model.V))


def _assumptions(envelope: Envelope) -> tuple[str, ...]:
    """Return what a verdict takes for granted, in words."""
    if envelope.level != "float32":
        return ()
    ulps = envelope.assumptions.get("exp_ulp")
    stated = ulps if type(ulps) in (int, float) else "an unstated number of"
    return (
        f"the float32 exponential is accurate to {stated} units in the last place",
        "products are rounded to float32, not to a lower precision",
    )


MAX_OF_K = Task(frozenset({"measure"}), check)
