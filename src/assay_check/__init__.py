"""An independent checker of certificates: it needs numpy and python-flint alone, and believes
nothing but the weights.
"""

import hashlib
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from assay_check.execution import logit_error
from assay_check.margins import Margins, Measure
from assay_check.model import InputError, Model, need, parse, tensors

__all__ = ["InputError", "Verdict", "check"]
KEYS = {
    "format",
    "task",
    "model",
    "strategy",
    "rule",
    "level",
    "options",
    "assumptions",
    "measure",
    "claim",
    "advice",
}


@dataclass(frozen=True)
class Verdict:
    """Whether a claim is supported; `bound` is the recomputed share of right answers, `cell` the
    first claimed (q, m, c) that fails.
    """

    accepted: bool
    reason: str
    bound: Fraction = Fraction(0)
    cell: tuple[int, ...] | None = None


def check(certificate: Path | str, weights: Path | str) -> Verdict:
    """Recompute what a certificate claims from the weights, believing neither advice nor
    digests; InputError or OSError for bad files.
    """
    path, model = Path(certificate), Model(Path(weights).read_bytes())
    entry, V, K = parse(path.read_bytes(), "the certificate"), model.V, model.K
    need(
        isinstance(entry, dict) and entry.keys() == KEYS,
        f"a certificate has the fields {sorted(KEYS)}",
    )
    level, rule, claim, assumptions = (
        entry[key] for key in ("level", "rule", "claim", "assumptions")
    )
    known = level in ("real", "float32", "float64") and rule in (
        "sequences",
        "cells",
        "cubic",
        "envelope",
    )
    need(
        known and (entry["format"], entry["task"]) == ("assay-certificate/1", "max-of-k"),
        "unknown format, task, level or rule",
    )
    good = (
        isinstance(claim, dict)
        and isinstance(assumptions, dict)
        and re.fullmatch("[0-9]{1,4000}", str(claim.get("count")))
    )
    need(good, "claim and assumptions must be objects, and claim.count a decimal string")
    measure, count, cell = Measure(entry["measure"], V, K), int(claim["count"]), None
    if level == "float64":
        return Verdict(False, "level float64 is a search in unproved arithmetic, not a proof")
    if entry["model"] != model.entry:
        return Verdict(False, "the certificate is about other weights")
    total = measure.total
    if not count <= total > 0 or claim != {
        "count": str(count),
        "total": str(total),
        "bound": str(Fraction(count, total)),
    }:
        return Verdict(False, f"the total is {total}, and the bound must be count / total")
    margins = Margins(
        model,
        logit_error(model, assumptions.get("exp_ulp")) if level == "float32" else np.zeros((V, V)),
    )
    if rule == "sequences":
        need(V**K <= 1 << 25, f"{V}^{K} sequences are too many to try")
        found = margins.weigh_sequences(measure)
    else:
        sets = _sets(entry["advice"], rule, path.parent, measure.tokens)
        claimed = sets.any(-1) & measure.counted
        holds = margins.hold(sets, claimed)
        found, cell = (
            measure.weigh(sets, holds),
            next(iter(map(tuple, np.argwhere((claimed & ~holds).any(0)).tolist())), None),
        )
    fails = f"; the cell (q, m, c) = {cell} fails" if cell is not None and found < count else ""
    reason = f"{found} of {total} are proved at level {level}, {count} are claimed{fails}"
    return Verdict(found >= count, reason, Fraction(found, total), cell)


def _sets(advice: Any, rule: str, folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Return the token sets of the advice, (family, q, m, c, k); InputError for any that is not
    a subset of `tokens`.
    """
    name, (V, _, K, _) = advice.get("file") if isinstance(advice, dict) else None, tokens.shape
    need(
        isinstance(name, str) and re.fullmatch(r"[^/\\\0]+", name),
        f"advice.file must be a file beside the certificate, got {name!r}",
    )
    data, limits = (folder / str(name)).read_bytes(), rule == "envelope"
    need(
        hashlib.sha256(data).hexdigest() == advice.get("sha256"),
        f"{name} is not the advice of this certificate",
    )
    found = tensors(data, str(name)).get("limits" if limits else "sets", np.zeros(0))
    shapes = (
        [(V, V, K)]
        if limits
        else [(families, V, V, K, -(-V // 8)) for families in ((1, 2) if rule == "cells" else (1,))]
    )
    need(
        found.dtype == ("<i2" if limits else "u1") and found.shape in shapes,
        f"{name}: the shape must be one of {shapes}",
    )
    sets = (
        (np.arange(V) <= found[..., None])[None]
        if limits
        else np.unpackbits(found, axis=-1, bitorder="little").astype(bool)
    )
    strange = np.argwhere((sets[..., V:].any(-1) | (sets[..., :V] & ~tokens).any(-1)).any(0))
    need(
        not len(strange),
        f"{name}: the cell (q, m, c) = {strange[:1].tolist()} has no such sequences",
    )
    return sets[..., :V]
