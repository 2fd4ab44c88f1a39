"""The sub-cubic family: attention bounded from the scores, logits from one upper envelope per
largest token (arXiv 2406.11779).

A cell (q, m, c) with smaller tokens S = {0..j}. Let A be the attention on the copies of m. For
every competitor

    logit_x - logit_m <= h_m(A) + (1 - A) R + own[q, m],
    h_m(A) = max_{x != m} [shared_x - shared_m + p_x + A (EV[m,x] - EV[m,m])],   p_x = max_i
    (PV[i,x] - PV[i,m]),

where shared + own is the direct path and R bounds EV[k,x] - EV[k,m] over the smaller tokens, the
query's own included. The right side is convex in A, so it is largest at an end of the interval of
A, and both ends are checked. That interval comes from the scores: with w = e^{positional score}, r
the largest (smallest) e^{S[q,k] - S[q,m]} over k <= j, widened by the error of a low-rank
explanation,

    A_min = s / (s + t r_max + w_q r_q),  s the sum of the K-1-c smallest w of non-query positions,
    t of the c largest;

A_max has the largest, the smallest and r_min; if q = m the query's weight moves from the
denominator's last term to both s. Cost O(V^2 (d + K log V)): the envelope h_m has few corners, and
a convex function lies below its chords.

With `anchored`, ranges over all pairs of logits are replaced by differences to the logit of m, at
the same order of cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assay.bounds.rounding import Array, Interval
from assay.proofs.max_of_k import cells
from assay.proofs.max_of_k.cells import CertifiedSets, Sets
from assay.proofs.max_of_k.strategies import low_rank
from assay.proofs.max_of_k.strategies.base import Advice, Described, Problem
from assay.proofs.max_of_k.tables import Outputs, TableFactors, over
from assay.targets.max_of_k import Weights

Limits = NDArray[np.int16]  # (q, m, c): S = {0..limit}, -1 for nothing


@dataclass(frozen=True)
class Options:
    """How the scores (`qk`) and the direct path (`direct`) are explained, and whether
    differences are anchored at the answer.
    """

    qk: str = "exact"
    direct: str = "exact"
    rank: int = 1
    anchored: bool = False


@dataclass(frozen=True)
class SubCubic(Described):
    """One member of the family."""

    how: Options = Options()

    @property
    def options(self) -> Mapping[str, Any]:
        return asdict(self.how)

    def search(self, problem: Problem) -> Advice:
        how, plain = self.how, problem.floating()
        vectors = low_rank.find_advice(plain.factors, qk=how.qk, direct=how.direct, rank=how.rank)
        return vectors | {"limits": search(prepare(problem.factors, problem.outputs, vectors, how))}

    def verify(self, problem: Problem, advice: Advice) -> CertifiedSets:
        return CertifiedSets(
            verify(prepare(problem.factors, problem.outputs, advice, self.how), advice["limits"])
        )

    def unexplained(self, weights: Weights) -> int:
        return low_rank.unexplained(weights, self.how.qk, self.how.direct, self.how.rank)


@dataclass(frozen=True)
class Prepared:
    """What the check of a cell looks up; weights are relative to the largest of their query's
    row.
    """

    out: Outputs
    content: Interval  # (q, k): e^S
    running_max: Array  # (q, j): upper bound of e^S over k <= j
    running_min: Array  # (q, j): lower bound
    growth: Array  # (q,): e^error
    own_place: Interval  # (q,): positional weight of the query
    least: (
        Array  # (q, n): lower bound of the n smallest positional weights of other positions, summed
    )
    most: Array  # (q, n): upper bound of the n largest, summed
    own: Array  # (q, m): direct path of the query
    envelope: tuple[Array, Array]  # (m, corners): places in [0, 1] and values of h_m there
    rest: Array  # (k, m): bound of EV[k, x] - EV[k, m] over x
    running_rest: Array  # (j, m)


def prepare(f: TableFactors, out: Outputs, advice: Advice, options: Options) -> Prepared:
    """Return the tables of a strategy; every entry is an enclosure or a bound at the level of
    `out`.
    """
    scores = low_rank.scores(f, advice, options.qk)
    direct = low_rank.direct_path(f, advice, options.direct, anchored=options.anchored)
    content, position = f.algebra.exp(scores.content), f.algebra.exp(scores.position)
    least = _partial_sums(np.sort(position.lo[:, :-1], axis=1), out.down)
    most = _partial_sums(np.sort(position.hi[:, :-1], axis=1)[:, ::-1], out.up)
    if options.anchored:
        rest = out.up(low_rank.largest_elsewhere(out.EV.hi) - out.EV.lo)
    else:
        rest = np.broadcast_to(
            out.up(out.EV.hi.max(1) - out.EV.lo.min(1))[:, None], out.EV.lo.shape
        )
    lines, slopes = _lines(out, direct.shared)
    return Prepared(
        out,
        content,
        np.maximum.accumulate(content.hi, axis=1),
        np.minimum.accumulate(content.lo, axis=1),
        f.algebra.growth(scores.error),
        over(position, lambda end: end[:, -1]),
        least,
        most,
        np.broadcast_to(out.up(direct.own + out.slack[:, None]), rest.shape),
        _envelope(out, lines, slopes),
        rest,
        np.maximum.accumulate(rest, axis=0),
    )


def margins(p: Prepared, limits: Limits) -> Array:
    """Return upper bounds of the largest margin in every cell (q, m, c) with smaller tokens
    0..limit; NaN or +inf if there is none.
    """
    up, V, K = p.out.up, p.out.vocabulary, p.out.positions
    q, m, c = np.ogrid[:V, :V, :K]
    j = np.maximum(limits, 0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        low, high = attention(p, q, m, c, j)
        alone = np.where(q == m, -np.inf, p.rest[q, m])
        rest = np.maximum(alone, np.where(c == 0, -np.inf, p.running_rest[j, m]))
        rest = np.where(
            np.isneginf(rest), 0.0, rest
        )  # nothing but copies of m: no attention is left
        value = np.maximum(_convex(p, m, low, rest), _convex(p, m, high, rest))
        return up(value + p.own[q, m])


def attention(p: Prepared, q: Array, m: Array, c: Array, j: Array) -> tuple[Array, Array]:
    """Return a lower and an upper bound of the attention on the copies of m, for cells with
    smaller tokens 0..j.
    """
    up, down, n = p.out.up, p.out.down, p.out.positions - 1 - c
    copy, own, growth = (
        over(p.content, lambda end: end[q, m]),
        over(p.own_place, lambda end: end[q]),
        p.growth[q],
    )
    place = over(p.content, lambda end: end[q, q])

    def share(
        s: Array,
        t: Array,
        own_s: Array,
        own_t: Array,
        extreme: Array,
        copy: Array,
        place: Array,
        grow: bool,
    ) -> Array:
        """Return s / (s + rest), rounded down if the rest is rounded up and grown, and up if it
        is rounded down and shrunk.
        """
        round_, back = (up, down) if grow else (down, up)
        copies = np.where(q == m, back(s + own_s), s)
        others = round_(round_(t * extreme) + np.where(q == m, 0.0, round_(own_t * place)))
        # Rounding down must not pass zero: a negative rest would turn a small share into any other.
        ratio = round_(np.maximum(others, 0.0) / np.maximum(back(copies * copy), 0.0))
        ratio = round_(ratio * growth) if grow else round_(ratio / growth)
        return back(1.0 / round_(1.0 + np.maximum(ratio, 0.0)))

    low = share(
        p.least[q, n], p.most[q, c], own.lo, own.hi, p.running_max[q, j], copy.lo, place.hi, True
    )
    high = share(
        p.most[q, n], p.least[q, c], own.hi, own.lo, p.running_min[q, j], copy.hi, place.lo, False
    )
    return np.maximum(low, 0.0), np.minimum(high, 1.0)


def verify(p: Prepared, limits: Limits) -> Sets:
    """Return the certified sets: cells whose bound is negative, with tokens 0..limit."""
    V, K = p.out.vocabulary, p.out.positions
    good = (margins(p, limits) < 0) & (limits >= 0)
    return as_sets(np.where(good, limits, -1), V, K)


def search(p: Prepared) -> Limits:
    """Return the largest limit of every cell whose bound is negative (bisection: the bound grows
    with the limit).
    """
    V, K = p.out.vocabulary, p.out.positions
    allowed = cells.possible(V, K)
    low = np.full((V, V, K), -1)
    m, c = np.arange(V)[None, :, None], np.arange(K)
    high = np.where(allowed, np.where(c == 0, 0, np.maximum(m - 1, 0)), -1)
    while (low < high).any():
        middle = (low + high + 1) // 2
        good = (margins(p, middle.astype(np.int16)) < 0) | (low >= high)
        low, high = np.where(good & (low < high), middle, low), np.where(good, high, middle - 1)
    return low.astype(np.int16)


def as_sets(limits: Limits, vocabulary: int, positions: int) -> Sets:
    """Return limits as sets of tokens."""
    return cells.normal((np.arange(vocabulary) <= limits[..., None])[None])


def _partial_sums(parts: Array, round_: Callable[[Array], Array]) -> Array:
    sums = [np.zeros_like(parts, shape=parts.shape[:1])]
    for part in parts.T:
        sums.append(round_(sums[-1] + part))
    return np.stack(sums, axis=1)


def _lines(out: Outputs, shared: Array) -> tuple[Array, Array]:
    """Return offsets and slopes of the lines of h_m, (m, x); the line x = m is far below."""
    up, V = out.up, out.vocabulary
    pooled = np.stack([out.position_ov(m).max(0) for m in range(V)])
    slopes = up(out.EV.hi - np.diagonal(out.EV.lo)[:, None])
    return np.where(np.eye(V, dtype=bool), -np.inf, up(shared + pooled)), slopes


def _envelope(out: Outputs, lines: Array, slopes: Array) -> tuple[Array, Array]:
    """Return corners of the upper envelope of each m's lines on [0, 1], and upper bounds of its
    value there, padded with the end.
    """
    up = out.up
    corners = [_corners(np.asarray(a), np.asarray(b)) for a, b in zip(lines, slopes, strict=True)]
    width = max(len(row) for row in corners)
    places = np.array([row + [1.0] * (width - len(row)) for row in corners])
    values = [up(lines + up(places[:, i : i + 1] * slopes)).max(1) for i in range(width)]
    return places, np.stack(values, axis=1)


def _corners(offsets: Array, slopes: Array) -> list[float]:
    """Return where the largest of the lines changes on [0, 1], with both ends: any such list is
    sound, the true one is tight.
    """
    at, places = 0.0, [0.0]
    active = int(np.lexsort((slopes, offsets))[-1])
    for _ in range(len(offsets)):
        steeper = (slopes > slopes[active]) & np.isfinite(offsets)
        with np.errstate(divide="ignore", invalid="ignore"):
            crossing = np.where(
                steeper, (offsets[active] - offsets) / (slopes - slopes[active]), np.inf
            )
        nearest = int(np.argmin(crossing))
        at = max(float(crossing[nearest]), at)
        if not at < 1.0:
            break
        active = nearest
        if at > places[-1]:
            places.append(at)
    return [*places, 1.0]


def _convex(p: Prepared, m: Array, share: Array, rest: Array) -> Array:
    """Return an upper bound of h_m(A) + (1 - A) rest."""
    up, down = p.out.up, p.out.down
    places, values = p.envelope
    left = np.zeros(share.shape, int)
    for largest in range(len(places)):
        inner = places[largest, 1:-1]
        left[:, largest] = np.searchsorted(inner, np.asarray(share[:, largest]), side="right")
    start, end = places[m, left], places[m, left + 1]
    base = values[m, left]
    rise = up(values[m, left + 1] - base)
    width = end - start
    part = np.clip((share - start) / np.where(width > 0, width, 1.0), 0.0, 1.0)
    chord = up(
        base + up(np.maximum(np.minimum(up(part), 1.0) * rise, np.maximum(down(part), 0.0) * rise))
    )
    left_over = np.maximum(up(up(1.0 - share) * rest), up(down(1.0 - share) * rest))
    return up(chord + left_over)
