"""Fit a guard: tables of one part of the laboratory, admission on a fresh part, calibration of the
tests on a third."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from assay.errors import InputError
from assay.guard.admission import Laboratory, admit, candidates
from assay.guard.compiled import compile_explanations
from assay.guard.conformal import ranks
from assay.guard.explanations import Explanation, Refused, require_forest
from assay.guard.guard import Guard, Scorer, root_values
from assay.guard.observed import Observed, classes_of
from assay.guard.quantise import Quantiser, quantise, without_knowledge
from assay.guard.scores import TWO_SIDED, mahalanobis
from assay.guard.settings import Settings
from assay.guard.tables import needed, tabulate


def laboratory(
    tables: Observed, fresh: Observed, settings: Settings
) -> tuple[Laboratory, Quantiser, Tensor | None]:
    """Return the tables of both splits, the bins, and the root's classes (None without logits).

    Raises InputError when a split is empty, holds NaN, or has other features."""
    for name, part in (("training", tables), ("fresh", fresh)):
        if not len(part):
            raise InputError(f"the {name} split is empty; give more inputs")
        if not bool(part.finite.all()):
            raise InputError(f"the {name} split holds NaN or infinite values")
    if fresh.names != tables.names or (fresh.logits is None) != (tables.logits is None):
        raise InputError("the fresh split has other features than the training split")
    quantiser = quantise(
        tables.values, settings.bins, least=settings.least, threshold=settings.threshold
    )
    classes = None if tables.logits is None else classes_of(tables.logits, settings.roots)
    bins = quantiser(tables.values)
    roots = _roots(tables, classes)
    values = 0 if classes is None else len(classes) + 1
    found = tabulate(bins, quantiser, roots, values)
    tried = tabulate(quantiser(fresh.values), quantiser, _roots(fresh, classes), values)
    least = needed(found.total, settings.theta, settings.delta / found.candidates)
    prior = without_knowledge(quantiser, tables.values.float())
    return Laboratory(found, tried, bins, roots, least, prior), quantiser, classes


def fit(
    tables: Observed,
    fresh: Observed,
    calibration: Observed,
    settings: Settings | None = None,
    *,
    given: Sequence[Explanation] = (),
    refused: Sequence[Refused] = (),
    model_hash: str = "",
    reading: Mapping[str, object] | None = None,
) -> Guard:
    """Fit a guard on three disjoint parts of the laboratory.

    `given` are edges that were admitted elsewhere, as mechanistic ones are (see
    `assay.guard.proposals`), `refused` those that were not. Raises InputError when a split is
    empty, holds NaN or has other features, when an input is in two of them (by its digest), and for
    given edges that close a cycle."""
    settings = Settings() if settings is None else settings
    if not len(calibration):
        raise InputError("the calibration split is empty; give inputs that nothing was fitted on")
    _require_apart(tables, fresh, calibration)
    lab, quantiser, classes = laboratory(tables, fresh, settings)
    require_forest([one.features[:2] for one in given], tables.names)  # type: ignore[misc]
    found, others = explanations(lab, settings, given)
    root_distance = None
    if classes is not None:
        assert lab.roots is not None
        root_distance = mahalanobis(tables.values, lab.roots, len(classes) + 1)
    scorer = Scorer(
        quantiser,
        compile_explanations(lab, found),
        mahalanobis(tables.values),
        root_distance,
        classes,
    )
    keeps = "single-edit" in settings.modes
    guard = Guard(
        tables.names,
        settings,
        scorer,
        None,
        None,
        torch.zeros(0),
        tuple(found),
        (*refused, *others),
        model_hash,
        dict(reading or {}),
        frozenset(tables.keys),
        {"needed": lab.needed, "candidates": lab.tables.candidates, "inputs": lab.tables.total},
        tables.values.float() if keeps else None,
        tables.logits.argmax(1) if keeps and tables.logits is not None else None,
    )
    return calibrate(guard, fresh, calibration)


def explanations(
    lab: Laboratory, settings: Settings, given: Sequence[Explanation] = ()
) -> tuple[list[Explanation], list[Refused]]:
    """Return the given explanations with the statistical ones that the modes allow, in the order
    of admission, and those that were refused.
    """
    modes = settings.modes
    proposed = [
        one
        for one in candidates(lab, marginals="marginal" in modes, added="add" in modes)
        if one.form != "constant" or "constant" in modes
    ]
    most = None if settings.most is None else max(0, settings.most - len(given))
    admitted, refused = admit(lab, proposed, before=given, most=most)
    return [*given, *admitted], refused


def calibrate(guard: Guard, fresh: Observed, calibration: Observed) -> Guard:
    """Return a guard with its tests calibrated: scores are ranked against the fresh split, and the
    combination against the calibration split.

    Raises InputError for an empty or overlapping calibration split, and for NaN in either."""
    if not len(calibration):
        raise InputError("the calibration split is empty; give inputs that nothing was fitted on")
    if overlap := guard.training & set(calibration.keys):
        raise InputError(_overlap("calibration", "training", len(overlap)))
    if 1 / (len(calibration) + 1) > guard.settings.alpha:
        least = math.ceil(1 / guard.settings.alpha) - 1
        raise InputError(
            f"the tests could reject nothing: alpha = {guard.settings.alpha:g} needs at least"
            f" {least} calibration inputs, got {len(calibration)}; give more, or a larger alpha"
        )
    sides = tuple(name in TWO_SIDED for name in guard.scorer.tests)
    reference = ranks(guard.scorer(fresh).scores, sides)
    scores = guard.scorer(calibration).scores
    single = ranks(scores, sides)
    ranked = replace(guard, ranks=reference, single=single)
    return replace(ranked, statistic=ranked.combined(scores).sort().values)


def _roots(data: Observed, classes: Tensor | None) -> Tensor | None:
    if classes is None:
        return None
    assert data.logits is not None
    return root_values(data.logits, classes)


def _require_apart(tables: Observed, fresh: Observed, calibration: Observed) -> None:
    parts = {"training": tables, "fresh": fresh, "calibration": calibration}
    keys = {name: set(part.keys) for name, part in parts.items()}
    for first, second in (
        ("calibration", "training"),
        ("calibration", "fresh"),
        ("fresh", "training"),
    ):
        if shared := keys[first] & keys[second]:
            raise InputError(_overlap(first, second, len(shared)))


def _overlap(first: str, second: str, count: int) -> str:
    return (
        f"the {first} split shares {count} input{'s' * (count > 1)} with the {second} split (equal"
        " digests); they must be disjoint, or the promised level is void"
    )
