"""Circuits of parts: chosen by score and bar, and what they keep of the metric."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor

from assay.attribution.exact import ablate
from assay.attribution.scores import Scores
from assay.audit.faithfulness import faithfulness
from assay.core.mechanisms import Mechanisms
from assay.core.values import dense, unravel
from assay.edges.cut import Node
from assay.errors import InputError
from assay.progress import progress


@dataclass(frozen=True)
class Ranking:
    """Parts in the order in which a circuit takes them, the most helpful first.

    `table` has a row for each: group, index, part, help (the mean loss of the right answer when the
    part is removed), bar (its half width; 0 where it was patched exactly) and patched. The first
    `count` are the circuit; `doubtful` counts the parts whose bar still reaches across the bound
    between the last that is taken and the first that is left."""

    nodes: tuple[Node, ...]
    count: int
    table: pl.DataFrame
    patches: int
    doubtful: int

    @property
    def circuit(self) -> tuple[Node, ...]:
        return self.nodes[: self.count]


def rank_parts(
    scores: Scores,
    count: int,
    *,
    half_widths: dict[str, Tensor] | None = None,
    groups: Collection[str] | None = None,
    candidates: int = 400,
    patches: int = 400,
) -> Ranking:
    """Order the parts of some groups (all by default) by how much the right answer loses without
    them, in the mean over examples, and take the first `count`.

    `half_widths` are those of the scores' bars, (examples, *axes) by group; the bar of a mean is
    their mean. A part whose bar reaches across the bound is patched exactly before it is taken or
    left, up to `patches` of them, the nearest first. Only the `candidates` largest scores are
    looked at.

    Raises InputError for a count below 1, and for gates that are shared over the batch."""
    mechanisms = scores.mechanisms
    if not 1 <= count <= candidates:
        raise InputError(f"count must be between 1 and {candidates} candidates, got {count}")
    names = [name for name in mechanisms.groups if groups is None or name in groups]
    sign = 1.0 if mechanisms.target.higher_is_right else -1.0
    means = scores.mean()
    rows: list[tuple[float, float, str, int]] = []
    for name in names:
        if not mechanisms.group(name).per_example:
            raise InputError(f"the gates of {name!r} are shared over the batch: they are no nodes")
        mean = sign * dense(means[name]).flatten()
        bars = torch.zeros_like(mean)
        if not scores.exact:
            bars = torch.full_like(mean, torch.inf)
            if half_widths is not None:
                bars = dense(half_widths[name]).double().mean(0).flatten()
        best = mean.topk(min(candidates, len(mean)))
        places, widths = best.indices.tolist(), bars[best.indices].tolist()
        rows += zip(best.values.tolist(), widths, [name] * len(places), places, strict=True)
    rows = [row for row in sorted(rows, reverse=True)[:candidates] if row[0] != 0 or row[1] > 0]
    help_, bar = [row[0] for row in rows], [row[1] for row in rows]
    nodes = [_node(mechanisms, name, place) for _, _, name, place in rows]
    known = [scores.exact] * len(rows)
    spent = 0
    while True:
        order = sorted(range(len(rows)), key=lambda row: -help_[row])
        doubtful = _doubtful(order, help_, bar, known, count)
        if not doubtful or spent >= patches:
            break
        for row in doubtful[: patches - spent]:
            name, index = nodes[row]
            effect = ablate(mechanisms, name, torch.tensor([index], dtype=torch.long))[0]
            help_[row], bar[row], known[row] = sign * float(effect.mean()), 0.0, True
            spent += 1
    chosen = tuple(nodes[row] for row in order)
    table = pl.DataFrame(
        {
            "group": [name for name, _ in chosen],
            "index": [list(index) for _, index in chosen],
            "part": [mechanisms.describe(*node) for node in chosen],
            "help": [help_[row] for row in order],
            "bar": [bar[row] for row in order],
            "patched": [known[row] for row in order],
        },
        schema_overrides={"group": pl.String, "index": pl.List(pl.Int64), "part": pl.String},
    )
    return Ranking(chosen, min(count, len(chosen)), table, spent, len(doubtful))


def circuit_curve(
    mechanisms: Mechanisms,
    nodes: Sequence[Node],
    counts: Iterable[int],
    *,
    always: Collection[str] = (),
    of: int | None = None,
) -> pl.DataFrame:
    """Return faithfulness and completeness of the first nodes by their count; everything else is
    set to the reference, but the groups that are `always` kept.

    `share` is the count over `of` (all nodes by default), for `areas`. For completeness the nodes
    alone are removed."""
    rows = []
    for count in progress(list(counts), "faithfulness"):
        found = faithfulness(mechanisms, node_masks(mechanisms, nodes[:count], always))
        rows.append(
            {"nodes": min(count, len(nodes)), "share": count / (of or len(nodes)), **found.__dict__}
        )
    return pl.DataFrame(rows)


def node_masks(
    mechanisms: Mechanisms, nodes: Iterable[Node], always: Collection[str] = ()
) -> dict[str, Tensor]:
    """Return masks of nodes, the same in every example, and of whole groups."""
    masks = {
        name: torch.full((1, *group.axes), name in always, dtype=torch.bool)
        for name, group in mechanisms.groups.items()
    }
    for name, index in nodes:
        masks[name][(0, *index)] = True
    return masks


def _doubtful(
    order: list[int], help_: list[float], bar: list[float], known: list[bool], count: int
) -> list[int]:
    """Return the rows that are not known exactly and whose bar reaches across the bound, the
    nearest first.
    """
    if count >= len(order):
        return []
    bound = (help_[order[count - 1]] + help_[order[count]]) / 2
    found = [row for row in order if not known[row] and abs(help_[row] - bound) <= bar[row]]
    return sorted(found, key=lambda row: abs(help_[row] - bound))


def _node(mechanisms: Mechanisms, name: str, place: int) -> Node:
    index = unravel(torch.tensor(place), mechanisms.group(name).axes)
    return name, tuple(int(entry) for entry in index)
