"""Upper bounds of the additive margin's terms `g_p(k; q, m, x)`, for one largest token m at a
time.
"""

from __future__ import annotations

import numpy as np

from assay.bounds.rounding import Array
from assay.proofs.max_of_k.tables import FoldedTables, over


def position_terms(tables: FoldedTables, m: int, queries: slice) -> tuple[Array, Array]:
    """Return upper bounds of g for every non-query position, and for the query's own position.

    Shapes: (K - 1, m + 1, queries, V) over positions, tokens k <= m, query tokens and competitors
    x; and (queries, V). The column x = m is zero up to rounding: whoever takes a maximum over
    competitors leaves it out."""
    up, count = tables.up, tables.positions - 1
    ov, places, direct = (
        tables.ov(m, slice(m + 1)),
        tables.position_ov(m),
        tables.direct(m)[queries],
    )
    scores = over(tables.ea, lambda end: end[queries, : m + 1])
    shape = (count, m + 1, *direct.shape)
    terms = np.empty_like(ov, shape=shape)
    for p in range(count):
        value = up(up(ov + places[p])[:, None, :] + direct)
        weight = tables.product(scores, over(tables.eb, lambda end: end[queries, p : p + 1]))
        terms[p] = tables.times(over(weight, lambda end: end.T[:, :, None]), value)
    own = up(up(ov[queries] + places[-1]) + direct)
    rows = np.arange(m + 1)[queries]
    weight = tables.product(
        over(tables.ea, lambda end: end[rows, rows]),
        over(tables.eb, lambda end: end[queries, count]),
    )
    return terms, tables.times(over(weight, lambda end: end[:, None]), own)


def query_slices(tables: FoldedTables, m: int, budget: int = 1 << 24) -> list[slice]:
    """Split the query tokens q <= m into slices whose terms take at most about `budget` bytes."""
    row = 8 * max(tables.positions - 1, 1) * (m + 1) * tables.vocabulary
    step = max(1, budget // row)
    return [slice(start, min(start + step, m + 1)) for start in range(0, m + 1, step)]
