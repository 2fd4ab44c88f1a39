"""Random samples of a ranked list, drawn by strata of ranks: what a user reads is the top of the
list, so that its errors are measured there and not in the mean of a long tail.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

_MOST = 5


@dataclass(frozen=True)
class Strata:
    """The stratum of every rank, (ranks,), from the top on, and the ranks that were drawn, each
    of its stratum with the same probability.
    """

    stratum: np.ndarray
    drawn: frozenset[int]


def least_sample(alpha: float) -> int:
    """Return the least number of residuals that give a bar at level 1 - alpha."""
    return math.ceil(round(1 / alpha, 9)) - 1


def draw_by_rank(count: int, size: int, alpha: float, seed: int) -> Strata:
    """Draw `size` of `count` ranks at random, as many in every stratum as the others leave.

    Strata grow geometrically with the rank; there are so few that each has the residuals that a
    bar at level 1 - alpha needs."""
    size = max(0, min(size, count))
    number = max(1, min(_MOST, size // least_sample(alpha)))
    first = min(count, math.ceil(1.5 * size / number))
    ends = np.unique(np.round(np.geomspace(max(first, 1), max(count, 1), number)).astype(int))
    ends[-1] = count
    stratum = np.searchsorted(ends, np.arange(count), side="right")
    generator = np.random.default_rng(seed)
    drawn: list[int] = []
    for place, one in enumerate(np.argsort(np.bincount(stratum, minlength=len(ends)))):
        inside = np.flatnonzero(stratum == one)
        share = (size - len(drawn)) // (len(ends) - place)
        drawn += generator.permutation(inside)[:share].tolist()
    return Strata(stratum, frozenset(drawn))


def strata_of_links(
    sources: Sequence[int | None], nodes: Strata, alpha: float, seed: int
) -> tuple[list[int | None], set[int]]:
    """Return the stratum of every link of a ranked list, and one link of each drawn source in each
    stratum: links of one source are no sample.

    `sources` holds the rank of each link's source among `nodes`, None where it is none of them. A
    stratum has sources of one stratum, and ends where the sources that began a link in it are so
    many that the least sample is expected to be drawn among them."""
    own = np.bincount(nodes.stratum)
    hits = np.bincount(nodes.stratum[sorted(nodes.drawn)], minlength=len(own))
    needed = least_sample(alpha) * own / np.maximum(hits, 1)
    found: list[int | None] = [None] * len(sources)
    for one in range(len(own)):
        inside = [
            place
            for place, source in enumerate(sources)
            if source is not None and nodes.stratum[source] == one
        ]
        for number, cell in enumerate(_cells(inside, [sources[at] for at in inside], needed[one])):
            for place in cell:
                found[place] = one * len(sources) + number
    generator = np.random.default_rng(seed)
    many: dict[tuple[int | None, int | None], list[int]] = {}
    for place, source in enumerate(sources):
        if source in nodes.drawn:
            many.setdefault((source, found[place]), []).append(place)
    return found, {int(generator.choice(places)) for places in many.values()}


def _cells(places: Sequence[int], sources: Iterable[int | None], needed: float) -> list[list[int]]:
    """Cut places where so many sources as are needed have been seen, twice as many each time; the
    last cell takes in what would have fewer.
    """
    cells: list[list[int]] = [[]]
    seen = set[int | None]()
    for place, source in zip(places, sources, strict=True):
        if len(seen) >= needed:
            cells.append([])
            seen, needed = set(), 2 * needed
        cells[-1].append(place)
        seen.add(source)
    if len(cells) > 1 and len(seen) < needed:
        cells[-2:] = [cells[-2] + cells[-1]]
    return cells
