"""Circuits of parts: chosen by score and bar, and what they keep of the metric."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from assay.attribution.exact import ablate
from assay.attribution.scores import Scores
from assay.audit.faithfulness import TRACK, areas, kept_gates, summarise
from assay.audit.intervals import fieller
from assay.audit.population import distinct
from assay.charts.tables import notebook_html, text_table
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
    candidates: int | None = None,
    patches: int = 400,
) -> Ranking:
    """Order the parts of some groups (all by default) by how much the right answer loses without
    them, in the mean over examples, and take the first `count`.

    `half_widths` are those of the scores' bars, (examples, *axes) by group; the bar of a mean is
    their mean. A part whose bar reaches across the bound is patched exactly before it is taken or
    left, up to `patches` of them, the nearest first. With `candidates` only as many of the largest
    scores are looked at. Parts that are known to do nothing are left out.

    Raises InputError for a count below 1 or above the candidates, and for gates that are shared
    over the batch."""
    mechanisms = scores.mechanisms
    if count < 1 or (candidates is not None and count > candidates):
        most = "" if candidates is None else f" and at most the {candidates} candidates"
        raise InputError(f"count must be at least 1{most}, got {count}")
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
        # Without bars only scores tell which parts are there.
        some = ((mean != 0) | ((bars > 0) & (half_widths is not None))).nonzero().flatten()
        if candidates is not None:
            some = some[mean[some].argsort(descending=True)[:candidates]]
        places = some.tolist()
        rows += zip(
            mean[some].tolist(), bars[some].tolist(), [name] * len(places), places, strict=True
        )
    rows = sorted(rows, reverse=True)[:candidates]
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


@dataclass(frozen=True)
class CircuitCurve:
    """What the first `counts` of `of` nodes keep of the metric: values (examples,) of the whole
    network and of nothing, and (counts, examples) of the nodes alone and of all others alone.

    Intervals are Fieller's, over distinct inputs (`unit`, (examples,)): they are absent where the
    metric of the network is not clear of that of nothing."""

    counts: tuple[int, ...]
    of: int
    full: Float[Tensor, " examples"]
    empty: Float[Tensor, " examples"]
    kept: Float[Tensor, "counts examples"]
    rest: Float[Tensor, "counts examples"]
    gates: tuple[float, ...]
    level: float = 0.95
    unit: np.ndarray | None = None

    def table(self) -> pl.DataFrame:
        """Return one row a count: nodes, share, faithfulness with its interval [low, high],
        completeness, medians over examples, and the share of gates that stay at one.
        """
        rows = []
        for place, (count, ends) in enumerate(zip(self.counts, self._ends, strict=True)):
            found = summarise(
                self.full, self.empty, self.kept[place], self.rest[place], self.gates[place]
            )
            low, high = ends or (None, None)
            rows.append(
                {
                    "nodes": count,
                    "share": count / max(self.of, 1),
                    **found.__dict__,
                    "low": low,
                    "high": high,
                }
            )
        return pl.DataFrame(rows, schema_overrides={"low": pl.Float64, "high": pl.Float64})

    def areas(self) -> dict[str, float | None]:
        """Return CPR, the area under faithfulness f over the share of nodes, and CMD, the area
        under |1 - f| (arXiv 2504.13151), each with the ends of its interval, None where there is
        none.

        Both are sums over counts, CPR of w f and CMD of w s (1 - f) with the sign s of 1 - f, and
        so ratios of means like f. Any signs give a lower bound of CMD: its low end leaves out the
        counts whose f may be 1 by an interval that holds for all of them at once, where s would be
        chosen by chance."""
        table = self.table()
        found: dict[str, float | None] = dict(areas(table))
        weights = _trapezoid(table["share"].to_numpy())
        kept = self._kept
        signs = np.sign(1 - table["faithfulness"].to_numpy())
        strict = [self._interval(each, len(kept)) for each in kept]
        clear = [ends is not None and not ends[0] <= 1 <= ends[1] for ends in strict]
        missing = self._whole - kept
        cpr, cmd, least = (
            self._interval(total)
            for total in (
                weights @ kept,
                (weights * signs) @ missing,
                (weights * signs * clear) @ missing,
            )
        )
        found |= {"cpr_low": cpr and cpr[0], "cpr_high": cpr and cpr[1]}
        return found | {
            "cmd_low": least and max(least[0], 0.0),
            "cmd_high": cmd and cmd[1],
        }

    @cached_property
    def _whole(self) -> np.ndarray:
        """What the network has above nothing, (examples,)."""
        return (self.full - self.empty).numpy(force=True)

    @cached_property
    def _kept(self) -> np.ndarray:
        """What is kept above nothing, (counts, examples)."""
        return (self.kept - self.empty).numpy(force=True)

    @cached_property
    def _ends(self) -> list[tuple[float, float] | None]:
        """Return the ends of the interval of faithfulness at every count."""
        return [self._interval(kept) for kept in self._kept]

    def _interval(self, above: np.ndarray, of: int = 1) -> tuple[float, float] | None:
        """Return the interval of a ratio, such that `of` of them hold at once."""
        return fieller(above, self._whole, (1 - self.level) / of, self.unit)

    def __repr__(self) -> str:
        return text_table(self.table())

    def _repr_html_(self) -> str:
        return notebook_html(self.table())


@torch.no_grad()
def circuit_curve(
    mechanisms: Mechanisms,
    nodes: Sequence[Node],
    counts: Iterable[int],
    *,
    always: Collection[str] = (),
) -> CircuitCurve:
    """Return faithfulness and completeness of the first nodes by their count (never more than
    there are); everything else is set to the reference, but the groups that are `always` kept.

    For completeness the nodes alone are removed."""
    chosen = tuple(sorted({min(count, len(nodes)) for count in counts}))
    ones, empty = mechanisms.values(), mechanisms.values(mechanisms.full(0.0))
    kept, rest, gates = [], [], []
    for count in progress(chosen, "faithfulness"):
        here = kept_gates(mechanisms, node_masks(mechanisms, nodes[:count], always))
        kept.append(mechanisms.values(here).double())
        rest.append(mechanisms.values({name: 1 - gate for name, gate in here.items()}).double())
        total = sum(gate.numel() for gate in here.values())
        gates.append(sum(float(gate.sum()) for gate in here.values()) / total)
    return CircuitCurve(
        chosen,
        len(nodes),
        ones.double(),
        empty.double(),
        torch.stack(kept),
        torch.stack(rest),
        tuple(gates),
        unit=distinct(mechanisms.batch),
    )


def track_counts(of: int) -> list[int]:
    """Return the counts of nodes at the shares of the circuit track, 0.1 % to 100 %, of `of`."""
    return sorted({round(share * of) for share in TRACK} | {of})


def _trapezoid(places: np.ndarray) -> np.ndarray:
    """Return the weights of the trapezoidal rule at places in any order."""
    order = np.argsort(places)
    gaps = np.diff(places[order])
    weights = np.zeros(len(places))
    weights[order[:-1]] += gaps / 2
    weights[order[1:]] += gaps / 2
    return weights


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
