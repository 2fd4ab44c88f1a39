"""Claims of right answers: at least a share of the inputs, by weight, is answered right."""

import re
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from assay_check.envelope import Envelope
from assay_check.max_of_k.margins import Margins
from assay_check.max_of_k.measure import Measure
from assay_check.reading import need, tensors

RULES = ("sequences", "cells", "cubic", "envelope")
Found = tuple[bool, str, Fraction | None, tuple[int, ...] | None]


def read(envelope: Envelope, measure: Measure) -> None:
    """Raise InputError unless the claim is one of a count of right answers."""
    count = str(envelope.claim.get("count"))
    need(re.fullmatch("[0-9]{1,4000}", count), "claim.count must be a decimal string")


def describe(measure: Measure) -> str:
    """Return in words what a count of right answers is a share of."""
    return measure.describe()


def recompute(envelope: Envelope, measure: Measure, margins: Callable[[], Margins]) -> Found:
    """Return whether the recomputed count supports the claim, why, the recomputed share, and the
    first claimed cell that fails.
    """
    count, total, cell = int(envelope.claim["count"]), measure.total, None
    if not count <= total > 0 or envelope.claim != {
        "count": str(count),
        "total": str(total),
        "bound": str(Fraction(count, total)),
    }:
        return False, f"the total is {total}, and the bound must be count / total", None, None
    if envelope.rule == "sequences":
        K, V = measure.weights.shape
        need(V**K <= 1 << 25, f"{V}^{K} sequences are too many to try")
        found = margins().weigh_sequences(measure)
    else:
        sets = _sets(envelope, measure.tokens)
        claimed = sets.any(-1) & measure.counted
        holds = margins().hold(sets, claimed)
        found = measure.weigh(sets, holds)
        cell = next(iter(map(tuple, np.argwhere((claimed & ~holds).any(0)).tolist())), None)
    fails = f"; the cell (q, m, c) = {cell} fails" if cell is not None and found < count else ""
    if measure.uniform:
        reason = f"{found} of {total} inputs are proved right, {count} are claimed{fails}"
    else:
        reason = f"a weight of {found} out of {total} is proved right, {count} is claimed{fails}"
    return found >= count, reason, Fraction(found, total), cell


def _sets(envelope: Envelope, tokens: np.ndarray) -> np.ndarray:
    """Return the token sets of the advice, (family, q, m, c, k); InputError for any that is not
    a subset of `tokens`.
    """
    (name, data), (V, _, K, _) = envelope.advice(), tokens.shape
    limits = envelope.rule == "envelope"
    found = tensors(data, name).get("limits" if limits else "sets", np.zeros(0))
    families = (1, 2) if envelope.rule == "cells" else (1,)
    shapes = [(V, V, K)] if limits else [(n, V, V, K, -(-V // 8)) for n in families]
    need(
        found.dtype == ("<i2" if limits else "u1") and found.shape in shapes,
        f"{name}: the shape must be one of {shapes}",
    )
    if limits:
        sets = (np.arange(V) <= found[..., None])[None]
    else:
        sets = np.unpackbits(found, axis=-1, bitorder="little").astype(bool)
    strange = np.argwhere((sets[..., V:].any(-1) | (sets[..., :V] & ~tokens).any(-1)).any(0))
    need(
        not len(strange),
        f"{name}: the cell (q, m, c) = {strange[:1].tolist()} has no such sequences",
    )
    return sets[..., :V]
