"""The proof verbs: prove a bound from a file of weights, and check a certificate with the
independent checker.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import assay_check
from assay.errors import InputError
from assay.io.files import existing
from assay.io.runs import require_undamaged
from assay.proofs.max_of_k.cross_entropy import STRATEGY
from assay.proofs.max_of_k.prove import prove, prove_all, prove_cross_entropy
from assay.studies.names import require_proof
from assay.targets import max_of_k


def prove_task(
    task: str,
    weights: Path | str,
    *,
    strategy: str = "best",
    level: str = "real",
    loss: bool = False,
    certificate: Path | str | None = None,
) -> dict[str, Any]:
    """Return what a strategy proves of the weights in a file, or, with "all", what every strategy
    does, by name; with `loss`, an upper bound of the mean cross-entropy.

    Raises InputError for an unknown task, strategy or level, for "all" with a certificate, and for
    another strategy than the one that bounds the loss, and for a certificate in the place of
    another file.
    """
    require_proof(task, weights, strategy, level)
    require_undamaged(weights)
    if loss:
        if strategy not in ("best", STRATEGY):
            raise InputError(
                f"--loss: the cross-entropy has one strategy, {STRATEGY!r}, got {strategy!r}"
            )
        return prove_cross_entropy(weights, level, certificate_path=certificate).to_json()
    if strategy != "all":
        return prove(weights, strategy, level, certificate_path=certificate).to_json()
    if certificate is not None:
        raise InputError("--strategy all writes no certificate; name one strategy with -o")
    return {
        result.strategy: result.to_json() for result in prove_all(max_of_k.load(weights), level)
    }


def check_certificate(
    certificate: Path | str, weights: Path | str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Return the verdict of the independent checker, with what it is about: measure, level and
    assumptions, and the same in words; InputError for files that are not what they should be, and
    for a task that cannot be checked without weights.
    """
    try:
        verdict = assay_check.check(
            existing(certificate), None if weights is None else existing(weights)
        )
    except (assay_check.InputError, OSError) as error:
        raise InputError(str(error)) from error
    plain = {**verdict.plain(), "assumptions": "; ".join(verdict.assumptions) or "none"}
    return plain, verdict.lines()
