"""The audit of an attribution: exact ablations of what is read and of a random sample, agreement,
and a bar for every part.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import polars as pl
from torch import Tensor

from assay.attribution.gradient import Gradient
from assay.attribution.scores import Scores
from assay.audit.agreement import agreement, agreement_table
from assay.audit.calibration import Ablated, folds
from assay.audit.effects import ExactEffects
from assay.audit.population import population
from assay.audit.result import Audit, Options, barred
from assay.audit.sampling import design, list_length, shared_parts
from assay.audit.selections import select
from assay.core.values import add
from assay.errors import InputError

__all__ = ["Audit", "audit", "disagreement"]


def audit(
    scores: Scores,
    *,
    exact: int = 64,
    top: int = 20,
    alpha: float = 0.1,
    seed: int = 0,
    against: Scores | None = None,
    scales: Mapping[str, Mapping[str, Tensor]] | None = None,
    scale: str | None = None,
    merge: bool = False,
    budget: int | None = None,
    effects: ExactEffects | Scores | None = None,
) -> Audit:
    """Ablate `exact` parts of every input exactly and say how far to trust `scores`.

    A quarter of the inputs tunes: from its scores come the list of the `top` parts by mean |score|,
    and from its ablations the scale of the bars, among a constant, |score|, the norm of the part,
    |score - other score| when `against` is given, and further `scales` (examples, *axes by group; a
    certificate, say), or the one named by `scale`. Half of the inputs calibrate; coverage and width
    are measured on the last quarter. Of the ablations the listed parts and the `top` largest scores
    of an input come first (fewer of them where `exact` is small), then random parts of every group.
    `merge` gives all groups one stratum. `effects` shares exact effects between audits: with exact
    scores of everything all parts are used and nothing is ablated. Scores without a sign (AtP*) are
    compared with the sizes of the exact effects.

    Raises InputError when `exact` is smaller than the number of groups."""
    began = time.process_time()
    mechanisms = scores.mechanisms
    if top < 1:
        raise InputError(f"top must be at least 1, got {top}")
    if not 0 < alpha < 1:
        raise InputError(f"alpha must be between 0 and 1, got {alpha}")
    if isinstance(effects, Scores):
        effects = ExactEffects(mechanisms, everything=effects, budget=budget)
    known = effects or ExactEffects(mechanisms, budget=budget)
    if known.mechanisms is not mechanisms:
        raise InputError("exact effects must be those of the mechanisms that are audited")
    passes = None if known.complete else exact
    length = list_length(mechanisms, exact, top) if passes else top
    parts = population(scores, _scales(scores, against, scales))
    if not len(parts):
        raise InputError("no active part to ablate: every part is zero on this batch")
    chance = np.random.default_rng(seed)
    selections = select(parts, folds(parts, seed) == 0, length, merged=merge)
    kept, shared = shared_parts(parts, selections, passes, chance)
    bound = parts.take(np.flatnonzero(kept))
    plan = design(bound, selections, passes)
    rows = plan.draw(bound, chance)
    truth = known.of(bound, rows)
    ablated = Ablated(bound, plan, rows, np.abs(truth) if scores.unsigned else truth)
    table = _table(ablated, shared[kept], _first(scores, against), unsigned=scores.unsigned)
    weight = 1 / table["inclusion"].to_numpy()
    options = Options(alpha, seed, seed, passes, scale)
    found = Audit(
        scores=scores,
        table=table,
        pooled=agreement(table["estimate"].to_numpy(), ablated.exact, weight=weight),
        by_group=agreement_table(table, "group"),
        by_example=agreement_table(table, "example"),
        bars=None,  # type: ignore[arg-type]
        promises={},
        constant_width=math.nan,
        effects=known,
        cpu_seconds=0.0,
        parts=parts,
        ablated=ablated,
        selections=selections,
        options=options,
    )
    return replace(found, **barred(found, options), cpu_seconds=time.process_time() - began)


def _scales(
    scores: Scores, against: Scores | None, extra: Mapping[str, Mapping[str, Tensor]] | None
) -> dict[str, Mapping[str, Tensor]]:
    """Return the further columns that may scale the bars."""
    found: dict[str, Mapping[str, Tensor]] = {}
    if against is not None:
        found["disagreement"] = disagreement(scores, against)
    for key, values in (extra or {}).items():
        if missing := set(scores.values) - set(values):
            raise InputError(f"scale {key!r} lacks the groups {', '.join(sorted(missing))}")
        found[key] = values
    return found


def disagreement(scores: Scores, against: Scores) -> dict[str, Tensor]:
    """Return |score - other score| of every part by group; InputError when the groups differ."""
    if set(scores.values) != set(against.values):
        raise InputError("against must score the same groups of parts")
    return {
        name: add(values, -against.values[name]).abs() for name, values in scores.values.items()
    }


def _first(scores: Scores, against: Scores | None) -> Scores:
    for found in (scores, against):
        if found is not None and found.method == Gradient.name:
            return found
    return Gradient().scores(scores.mechanisms)


def _table(ablated: Ablated, shared: np.ndarray, first: Scores, *, unsigned: bool) -> pl.DataFrame:
    """Return a row for every ablated part; `shared` are the inclusion probabilities of parts whose
    gates are shared over the batch.
    """
    parts, rows = ablated.parts, ablated.rows
    drawn = parts.take(rows)
    groups, index, words = drawn.described()
    first_order = drawn.column(first.values)
    return pl.DataFrame(
        {
            "example": drawn.example,
            "group": groups,
            "part": words,
            "index": index,
            "estimate": drawn.score,
            "exact": ablated.exact,
            "first": np.abs(first_order) if unsigned else first_order,
            "inclusion": ablated.inclusion * shared[rows],
        },
        schema={
            "example": pl.Int64,
            "group": pl.String,
            "part": pl.String,
            "index": pl.List(pl.Int64),
            "estimate": pl.Float64,
            "exact": pl.Float64,
            "first": pl.Float64,
            "inclusion": pl.Float64,
        },
    )


Scores.auditor = audit
