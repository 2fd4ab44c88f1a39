"""The circuit of a features study: its parts, the edges between them, and what it keeps of the
metric on pairs that did not choose it.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import polars as pl
import torch

from assay.attribution import Exact, Gradient, attribute
from assay.attribution.scores import Scores
from assay.audit import areas, circuit_curve, rank_parts
from assay.audit.circuits import Ranking
from assay.core.target import Target
from assay.dictionaries import DictionarySet
from assay.edges import part_edges
from assay.io.attribution_graphs import write_graph
from assay.io.prompts import Pairs
from assay.io.runs import Run
from assay.mechanisms.features import FeatureParts, identities
from assay.studies.features.config import Config
from assay.studies.features.graph_file import as_graph
from assay.studies.features.inputs import bind
from assay.studies.pairs import read_all
from assay.targets.language import LanguageModel
from assay.targets.metrics import pair_batch

COUNTS = (5, 10, 15, 20, 25, 50, 100, 200)
FEATURES, ERRORS, ALL = "features only", "features, errors kept", "features and errors"
NEURONS, RANDOM = "neurons", "features at random"
_CANDIDATES = 400


def find_circuits(
    config: Config,
    run: Run,
    model: LanguageModel,
    target: Target,
    dictionaries: DictionarySet,
) -> list[dict[str, Any]]:
    """Choose a circuit for each of the most frequent lengths of prompts, save curves, parts and
    edges, and return what each keeps.

    At one length a position means the same in all pairs. Parts are chosen on half of the pairs,
    everything else is measured on the other half."""
    if not config.circuit.lengths:
        return []
    pairs = read_all(config.data.pairs or run.checked("pairs.jsonl"), model)
    chosen = _of_residual(model, dictionaries)
    lengths = Counter(pairs.lengths.tolist()).most_common(config.circuit.lengths)
    found, curves, parts, edges = [], [], [], []
    for length, count in sorted(lengths):
        if count < 4:
            continue
        halves = _halves(config, pairs, length)
        finder = _Finder(config, target, chosen, *halves)
        curve = finder.curves()
        ranking = finder.features
        nodes = finder.parts(model)
        between = finder.edges(ranking)
        drawn = as_graph(model, finder.choose, halves[0], nodes, between)
        run.write(f"circuit-{length}.json", partial(write_graph, graph=drawn))
        label = pl.lit(length).alias("tokens")
        curves.append(curve.with_columns(label))
        parts.append(nodes.with_columns(label))
        edges.append(between.with_columns(label))
        found.append(_summary(config, length, halves, curve, ranking))
    if found:
        run.save_table("circuit-curves.parquet", pl.concat(curves))
        run.save_table("circuit-parts.parquet", pl.concat(parts))
        run.save_table("circuit-edges.parquet", pl.concat(edges))
    return found


class _Finder:
    """The parts of one length of prompts, on the pairs that choose and on those that measure."""

    def __init__(
        self,
        config: Config,
        target: Target,
        dictionaries: DictionarySet,
        choosing: Pairs,
        measuring: Pairs,
    ):
        # Edges pass the sites as the network does; values are the same under both conventions.
        config = config.model_copy(update={"convention": "pass_through"})
        self.config, self.target = config, target
        sides = [
            [pair_batch(half, side) for side in ("clean", "patch")]
            for half in (choosing, measuring)
        ]
        self.sides = sides
        self.choose, self.measure = (
            bind(config, dictionaries, target, clean, patch) for clean, patch in sides
        )
        self._known: list[tuple[FeatureParts, Scores]] = []
        errors = set(self.choose.errors.values())
        self.errors = sorted(errors)
        self.names = [name for name in self.choose.groups if name not in errors]
        self.features = self._rank(self.choose, self.names)

    def curves(self) -> pl.DataFrame:
        """Return faithfulness and completeness over the number of parts, by what is ranked."""
        everything = self._rank(self.choose, list(self.choose.groups))
        order = torch.randperm(
            len(self.features.nodes), generator=torch.Generator().manual_seed(self.config.seed)
        )
        shuffled = [self.features.nodes[place] for place in order.tolist()]
        neurons, of_neurons = self._neurons()
        rows = []
        for name, bound, nodes, always in (
            (FEATURES, self.measure, self.features.nodes, ()),
            (ERRORS, self.measure, self.features.nodes, self.errors),
            (ALL, self.measure, everything.nodes, ()),
            (NEURONS, neurons, of_neurons.nodes, ()),
            (RANDOM, self.measure, shuffled, ()),
        ):
            counts = sorted({*COUNTS, self.config.circuit.nodes})
            table = circuit_curve(bound, nodes, counts, always=always, of=counts[-1])
            rows.append(table.with_columns(pl.lit(name).alias("kept")))
        return pl.concat(rows)

    def parts(self, model: LanguageModel) -> pl.DataFrame:
        """Return the circuit's parts with their layer and position."""
        layers = {
            name: max(model.site(site).layer for site in self.choose.dictionaries[name].writes)
            for name in self.choose.dictionaries
        }
        table = self.features.table.head(self.features.count)
        owner = pl.col("group").str.strip_suffix(" rest")
        return table.with_columns(
            owner.replace_strict(layers, return_dtype=pl.Int64).alias("layer"),
            pl.col("index").list.first().alias("position"),
        )

    def edges(self, ranking: Ranking) -> pl.DataFrame:
        """Return the edges between the circuit's parts, and straight to the metric."""
        found = part_edges(self.choose, ranking.circuit, switches="secant")
        return found.table().select("source", "receiver", "score", "sd", "n")

    def _rank(self, bound: FeatureParts, names: list[str]) -> Ranking:
        count = self.config.circuit.nodes
        return rank_parts(
            self._scores(bound),
            count,
            groups=names,
            half_widths=self._bars(bound),
            candidates=max(_CANDIDATES, 4 * count),
        )

    def _scores(self, bound: FeatureParts) -> Scores:
        for other, scores in self._known:
            if other is bound:
                return scores
        exact = self.config.effects.everything
        self._known.append((bound, attribute(bound, Exact() if exact else Gradient())))
        return self._known[-1][1]

    def _bars(self, bound: FeatureParts) -> dict[str, torch.Tensor] | None:
        given = self.config.effects
        if given.everything:
            return None
        audit = self._scores(bound).audit(
            exact=max(given.exact, len(bound.groups)), alpha=given.alpha, seed=self.config.seed
        )
        return audit.half_widths()

    def _neurons(self) -> tuple[FeatureParts, Ranking]:
        names = [
            site
            for name in self.choose.dictionaries
            for site in self.choose.dictionaries[name].writes
        ]
        found = identities(self.target, self.sides[0][0], list(dict.fromkeys(names)))
        choose, measure = (
            bind(self.config, found, self.target, clean, patch) for clean, patch in self.sides
        )
        groups = [name for name in choose.groups if name not in set(choose.errors.values())]
        return measure, self._rank(choose, groups)


def _of_residual(model: LanguageModel, dictionaries: DictionarySet) -> DictionarySet:
    """Return the dictionaries of the residual stream, all of them where there is none."""
    found = [
        name
        for name in dictionaries
        if all(model.site(site).kind == "residual" for site in dictionaries[name].writes)
    ]
    return {name: dictionaries[name] for name in found or dictionaries}


def _halves(config: Config, pairs: Pairs, length: int) -> tuple[Pairs, Pairs]:
    index = (pairs.lengths == length).nonzero().flatten()
    generator = torch.Generator().manual_seed(config.seed)
    index = index[torch.randperm(len(index), generator=generator)][: config.circuit.pairs]
    first, second = index[: len(index) // 2].sort().values, index[len(index) // 2 :].sort().values
    return pairs.take(first), pairs.take(second)


def _summary(
    config: Config, length: int, halves: tuple[Pairs, Pairs], curve: pl.DataFrame, ranking: Ranking
) -> dict[str, Any]:
    kept = {}
    for name in (FEATURES, ERRORS, ALL, NEURONS, RANDOM):
        table = curve.filter(pl.col("kept") == name)
        here = table.filter(pl.col("nodes") == config.circuit.nodes)
        kept[name] = {
            **areas(table),
            "faithfulness": here["faithfulness"][0] if here.height else None,
            "completeness": here["completeness"][0] if here.height else None,
        }
    return {
        "tokens": length,
        "nodes": ranking.count,
        "chosen_on": len(halves[0]),
        "measured_on": len(halves[1]),
        "patched_exactly": ranking.patches,
        "doubtful": ranking.doubtful,
        "kept": kept,
    }
