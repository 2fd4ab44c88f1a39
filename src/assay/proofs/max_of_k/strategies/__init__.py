"""The strategies by name, from the dearest to the cheapest to verify."""

from __future__ import annotations

from assay.errors import unknown
from assay.proofs.max_of_k.strategies.base import Strategy
from assay.proofs.max_of_k.strategies.brute import BruteForce
from assay.proofs.max_of_k.strategies.cubic import Cubic
from assay.proofs.max_of_k.strategies.exact import ExactSets
from assay.proofs.max_of_k.strategies.hybrid import Hybrid
from assay.proofs.max_of_k.strategies.rivals import NamedRivals
from assay.proofs.max_of_k.strategies.subcubic import Options, SubCubic
from assay.proofs.max_of_k.strategies.worst import Worst


def _family(name: str, about: str, qk: str, direct: str, *, anchored: bool = False) -> SubCubic:
    return SubCubic(name, "envelope", about, how=Options(qk, direct, 1, anchored))


_ALL: tuple[Strategy, ...] = (
    BruteForce("brute_force", "sequences", "every sequence, from the folded tables"),
    ExactSets(
        "union",
        "cells",
        "exact worst cases over the union of a set and a box per cell",
        choice="union",
    ),
    ExactSets(
        "best",
        "cells",
        "exact worst cases over the larger of a set and a box per cell",
        choice="best",
    ),
    ExactSets(
        "set_exact", "cells", "exact worst cases over a set of tokens per cell", choice="set"
    ),
    ExactSets(
        "box_exact",
        "cells",
        "exact worst cases over the tokens up to a limit per cell",
        choice="box",
    ),
    Worst(
        "worst_positions_ov",
        "cells",
        "box_exact with the worst position for what positions write",
        part="positions_ov",
    ),
    Worst(
        "worst_positions_qk",
        "cells",
        "box_exact with the worst attention to positions",
        part="positions_qk",
    ),
    Worst(
        "worst_qk_residual",
        "cells",
        "box_exact with the worst scores beyond rank one",
        part="qk_residual",
    ),
    Worst(
        "worst_direct",
        "cells",
        "box_exact with the worst query token for the direct path",
        part="direct",
    ),
    Hybrid(
        "hybrid",
        "cells",
        "box_exact for the attention mechanism, propagated bounds for the direct path",
    ),
    NamedRivals(
        "named_rivals",
        "cells",
        "pure tokens; the competitors k and q apart from the pool of the others",
    ),
    Cubic("cubic", "cubic", "pure tokens of pooled competitors and positions"),
    _family(
        "subcubic_anchored",
        "attention bounds, differences to the answer's own logit",
        "exact",
        "exact",
        anchored=True,
    ),
    _family("subcubic", "attention bounds with exact QK and direct path", "exact", "exact"),
    _family(
        "subcubic_qk_range", "rank-one QK with the exact range of its residual", "range", "exact"
    ),
    _family(
        "subcubic_qk_subproduct",
        "rank-one QK, residual by row differences at the best split",
        "subproduct",
        "exact",
    ),
    _family(
        "subcubic_qk_max_diff",
        "rank-one QK, residual by row differences at the head",
        "max_diff",
        "exact",
    ),
    _family("subcubic_qk_svd", "rank-one QK, residual by its spectral norm", "svd", "exact"),
    _family(
        "subcubic_qk_recursive", "rank-one QK, residual factor by factor", "recursive", "exact"
    ),
    _family("subcubic_direct", "exact QK, direct path along one direction", "exact", "direction"),
    _family(
        "subcubic_low_rank",
        "rank-one QK and direct path along one direction",
        "subproduct",
        "direction",
    ),
    _family(
        "subcubic_low_rank_anchored",
        "the same, differences to the answer's own logit",
        "subproduct",
        "direction",
        anchored=True,
    ),
    _family("subcubic_mean", "rank-one QK and the mean direct path", "subproduct", "max_diff"),
    _family(
        "subcubic_global", "rank-one QK and one number for the direct path", "subproduct", "global"
    ),
)
STRATEGIES: dict[str, Strategy] = {strategy.name: strategy for strategy in _ALL}


def named(name: str) -> Strategy:
    """Return a strategy by name; InputError with the nearest names otherwise."""
    if name not in STRATEGIES:
        raise unknown("strategy", name, STRATEGIES)
    return STRATEGIES[name]
