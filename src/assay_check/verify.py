"""Checking a certificate: the count that its advice supports is recomputed from the weights and compared with the claim."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from assay_check.execution import logit_error
from assay_check.margins import Margins
from assay_check.measure import Measure
from assay_check.model import load
from assay_check.reader import need, parse, read, tensors
from assay_check.sequences import weigh

KEYS = {"format", "task", "model", "strategy", "rule", "level", "options", "assumptions", "measure", "claim", "advice"}
MOST_SEQUENCES = 1 << 30


@dataclass(frozen=True)
class Verdict:
    """Whether a claim is supported; `bound` is the recomputed share of right answers, `cell` the first (q, m, c) that fails."""

    accepted: bool
    reason: str
    bound: Fraction = Fraction(0)
    cell: tuple[int, ...] | None = None


def check(certificate: Path | str, weights: Path | str) -> Verdict:
    """Recompute what a certificate claims from the weights; InputError for files that are not what they should be.

    Advice is not believed, and digests only tell files apart. A certificate of level float64 is no proof and is rejected.
    """
    path, model = Path(certificate), load(read(Path(weights)))
    entry = parse(read(path), "the certificate")
    need(isinstance(entry, dict) and entry.keys() == KEYS, f"a certificate has the fields {sorted(KEYS)}")
    level, rule, V, K = entry["level"], entry["rule"], model.sizes["vocabulary"], model.sizes["positions"]
    need(entry["format"] == "assay-certificate/1" and entry["task"] == "max-of-k", "the format or task is unknown")
    need(level in ("real", "float32", "float64"), f"unknown level {level!r}")
    need(rule in ("sequences", "cells", "cubic", "envelope"), f"unknown rule {rule!r}")
    measure, (count, total, share) = Measure(entry["measure"], V, K), _claim(entry["claim"])
    if level == "float64":
        return Verdict(False, "level float64 is a search in unproved arithmetic, not a proof")
    if entry["model"] != {"sha256": model.digest, **model.sizes}:
        return Verdict(False, "the certificate is about other weights")
    if not count <= total == measure.total > 0 or share != Fraction(count, total):
        return Verdict(False, f"the total is {measure.total}, and the bound must be count / total")
    error = np.zeros((V, V))
    if level == "float32":
        ulps: Any = entry["assumptions"].get("exp_ulp") if isinstance(entry["assumptions"], dict) else None
        need(type(ulps) in (int, float) and 0.5 <= ulps <= 1024, f"assumptions.exp_ulp must be between 0.5 and 1024, got {ulps!r}")
        error = logit_error(model, float(ulps))
    margins, cell = Margins(model, error), None
    if rule == "sequences":
        if V**K > MOST_SEQUENCES:
            return Verdict(False, f"{V}^{K} sequences are too many to try, and this rule has no advice")
        found = weigh(margins, measure)
    else:
        sets = _sets(entry, path, measure.tokens)
        claimed = sets.any(-1) & measure.counted
        holds = margins.hold(sets, claimed)
        found = measure.weigh(sets, holds)
        cell = next(iter(map(tuple, np.argwhere((claimed & ~holds).any(0)).tolist())), None)
    if found >= count:
        return Verdict(True, f"{found} of {total} are proved at level {level}", Fraction(found, total))
    where = "" if cell is None else f"; the cell (q, m, c) = {cell} fails"
    return Verdict(False, f"{found} of {total} are proved, {count} are claimed{where}", Fraction(found, total), cell)


def _claim(claim: Any) -> tuple[int, int, Fraction]:
    need(isinstance(claim, dict) and claim.keys() == {"count", "total", "bound"}, "claim needs count, total and bound")
    patterns = {"count": r"\d{1,4000}", "total": r"\d{1,4000}", "bound": r"\d{1,4000}(/[1-9]\d{0,3999})?"}
    for key, pattern in patterns.items():
        good = isinstance(claim[key], str) and re.fullmatch(pattern, claim[key], re.ASCII)
        need(bool(good), f"claim.{key} must be a decimal string, got {str(claim[key])[:40]!r}")
    return int(claim["count"]), int(claim["total"]), Fraction(claim["bound"])


def _sets(entry: dict[str, Any], path: Path, tokens: np.ndarray) -> np.ndarray:
    """Return the token sets of the advice, (family, q, m, c, k); InputError for any that is not a subset of `tokens`."""
    stored, (V, _, K, _) = entry["advice"], tokens.shape
    need(isinstance(stored, dict) and stored.keys() == {"file", "sha256"}, "advice needs file and sha256")
    name = stored["file"]
    need(isinstance(name, str) and bool(re.fullmatch(r"[^/\\\0]+", name)), f"advice.file must be a file beside the certificate: {name!r}")
    data = read(path.parent / name)
    need(hashlib.sha256(data).hexdigest() == stored["sha256"], f"{name} is not the advice of this certificate")
    key, kind, shape = ("limits", "<i2", (V, V, K)) if entry["rule"] == "envelope" else ("sets", "u1", (V, V, K, -(-V // 8)))
    advice = tensors(data, name).get(key, np.zeros(0))
    families = [] if key == "limits" else [1 + (entry["rule"] == "cells" and advice.shape[:1] == (2,))]
    need(advice.dtype == kind and advice.shape == (*families, *shape), f"{name}: {key} must have shape {shape}")
    limits = key == "limits"
    sets = (np.arange(V) <= advice[..., None])[None] if limits else np.unpackbits(advice, axis=-1, bitorder="little").astype(bool)
    strange = np.argwhere((sets[..., V:].any(-1) | (sets[..., :V] & ~tokens).any(-1)).any(0))
    need(not len(strange), f"{name}: no such sequences in the cell (q, m, c) = {strange[:1].tolist()}")
    return sets[..., :V]
