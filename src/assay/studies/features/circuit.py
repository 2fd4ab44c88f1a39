"""The circuit of a features study: its parts, the edges between them, and what it keeps of the
metric on pairs that did not choose it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import polars as pl
import torch

from assay.attribution import Exact, Gradient, attribute
from assay.attribution.scores import Scores
from assay.audit import (
    CircuitCurve,
    Ranking,
    circuit_curve,
    rank_parts,
    refine_circuit,
    track_counts,
)
from assay.core.target import Target
from assay.dictionaries import DictionarySet
from assay.edges import PartEdges, part_edges
from assay.edges.cut import Node
from assay.io.attribution_graphs import write_graph
from assay.io.graphml import write_graphml
from assay.io.prompts import Pairs
from assay.io.runs import Run
from assay.io.supernodes import Supernode, write_supernodes
from assay.mechanisms.features import FeatureParts, identities
from assay.studies.features.config import Config
from assay.studies.features.graph_file import as_graph
from assay.studies.features.grouping import supernodes_of, with_supernodes
from assay.studies.features.inputs import bind
from assay.studies.features.kinds import PromptKind, frequent_kinds, of_residual
from assay.studies.features.worst import worst_of
from assay.studies.pairs import read_all
from assay.targets.language import LanguageModel
from assay.targets.metrics import pair_batch

AREAS = ("cpr", "cpr_low", "cpr_high", "cmd", "cmd_low", "cmd_high")
COUNTS = (5, 10, 15, 20, 25, 50, 100, 200)
FEATURES, ERRORS, ALL = "features only", "features, errors kept", "features and errors"
NEURONS, RANDOM = "neurons", "features at random"
REFINED, ALL_REFINED = "features only, refined", "features and errors, refined"


def find_circuits(
    config: Config,
    run: Run,
    model: LanguageModel,
    target: Target,
    dictionaries: DictionarySet,
) -> list[dict[str, Any]]:
    """Choose a circuit for each of the most frequent kinds of prompts, save curves, parts, edges
    and supernodes, and return what each keeps and what is the worst that all others can do.

    Prompts of one kind have one length, so that a position means the same in all of them, and
    differ from their patch at the same positions: elsewhere the answer would come from another
    place. Parts are chosen on half of the pairs, everything else is measured on the other half."""
    if not config.circuit.lengths:
        return []
    pairs = read_all(config.data.pairs or run.checked("pairs.jsonl"), model)
    chosen = {name: dictionaries[name] for name in of_residual(model, dictionaries)}
    found: list[dict[str, Any]] = []
    tables: dict[str, list[pl.DataFrame]] = {"curves": [], "parts": [], "edges": []}
    grouped: dict[str, list[Supernode]] = {}
    for kind in frequent_kinds(pairs, config.circuit.lengths):
        name = kind.name
        halves = kind.halves(pairs, config.circuit.pairs, config.seed)
        finder = _Finder(config, target, chosen, *halves)
        curves = finder.curves()
        nodes, between = finder.parts(model), finder.edges()
        groups = supernodes_of(config, finder, name)
        grouped[name] = groups
        nodes = with_supernodes(nodes, groups)
        drawn = as_graph(model, finder.choose, halves[0], nodes, between)
        run.write(f"circuit-{name}.json", partial(write_graph, graph=drawn))
        run.write(f"circuit-{name}.graphml", partial(write_graphml, graph=drawn))
        curve = pl.concat([one.table().with_columns(kept=pl.lit(what)) for what, one in curves])
        for what, table in (("curves", curve), ("parts", nodes), ("edges", between)):
            tables[what].append(table.with_columns(circuit=pl.lit(name)))
        found.append({"circuit": name, **_summary(kind, halves, curves, finder, groups)})
    if found:
        for name, many in tables.items():
            run.save_table(f"circuit-{name}.parquet", pl.concat(many))
        run.write("supernodes.json", partial(write_supernodes, circuits=grouped))
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
        self.refined = refine_circuit(self.choose, self.features.circuit, self.features.nodes)

    def curves(self) -> list[tuple[str, CircuitCurve]]:
        """Return what is kept over the number of parts, by what is ranked."""
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
            (ALL, self.measure, self._with_silent(everything.nodes), ()),
            (NEURONS, neurons, of_neurons.nodes, ()),
            (RANDOM, self.measure, shuffled, ()),
        ):
            counts = {*COUNTS, self.features.count, *track_counts(len(nodes))}
            rows.append((name, circuit_curve(bound, nodes, counts, always=always)))
        refined = refine_circuit(self.choose, everything.circuit, everything.nodes)
        for name, found in ((REFINED, self.refined), (ALL_REFINED, refined)):
            rows.append((name, circuit_curve(self.measure, found.nodes, [len(found.nodes)])))
        return rows

    def _with_silent(self, ranked: Sequence[Node]) -> list[Node]:
        """Return ranked parts and, in no order of merit, those that do nothing on the pairs that
        choose and something on the others: all of them together are the whole network.
        """
        present = rank_parts(attribute(self.measure, Gradient()), 1, patches=0).nodes
        return [*ranked, *sorted(set(present) - set(ranked))]

    def worst(self) -> dict[str, Any]:
        """Return the worst that everything outside the circuit can do, without and with the
        errors among it.
        """
        given = self.config.circuit
        return {
            name: worst_of(
                self.measure,
                self.refined.nodes,
                always,
                searched=given.searched,
                certified=given.certified,
                seed=self.config.seed,
            )
            for name, always in ((FEATURES, ()), (ERRORS, self.errors))
        }

    def parts(self, model: LanguageModel) -> pl.DataFrame:
        """Return the circuit's parts with their layer and position."""
        layers = {
            name: max(model.site(site).layer for site in self.choose.dictionaries[name].writes)
            for name in self.choose.dictionaries
        }
        order = {node: place for place, node in enumerate(self.features.nodes)}
        table = self.features.table[sorted(order[node] for node in self.refined.nodes)]
        owner = pl.col("group").str.strip_suffix(" rest")
        return table.with_columns(
            owner.replace_strict(layers, return_dtype=pl.Int64).alias("layer"),
            pl.col("index").list.first().alias("position"),
        )

    def edges(self) -> pl.DataFrame:
        """Return the edges between the circuit's parts, and straight to the metric."""
        found = part_edges(self.choose, self.refined.nodes, switches="secant")
        return found.table().select("source", "receiver", "score", "sd", "n")

    def outward(self) -> PartEdges:
        """Return the edges from the circuit's parts to many features."""
        receivers = self.features.nodes[: self.config.circuit.receivers]
        return part_edges(self.choose, receivers, self.refined.nodes, switches="secant")

    def _rank(self, bound: FeatureParts, names: list[str]) -> Ranking:
        return rank_parts(
            self._scores(bound),
            self.config.circuit.nodes,
            groups=names,
            half_widths=self._bars(bound),
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


def _summary(
    kind: PromptKind,
    halves: tuple[Pairs, Pairs],
    curves: list[tuple[str, CircuitCurve]],
    finder: _Finder,
    groups: list[Supernode],
) -> dict[str, Any]:
    kept = {}
    for name, curve in curves:
        here = curve.table().filter(pl.col("nodes") == finder.features.count).to_dicts()
        wanted = ("faithfulness", "low", "high", "completeness")
        alone = name in (REFINED, ALL_REFINED)  # one circuit, and no order of its parts
        kept[name] = {
            **dict.fromkeys(AREAS, None),
            **({} if alone else curve.areas()),
            **{key: here[0][key] if here else None for key in wanted},
        }
    ranking, refined = finder.features, finder.refined
    return {
        "tokens": kind.tokens,
        "positions": list(kind.positions),
        "nodes": ranking.count,
        "chosen_on": len(halves[0]),
        "measured_on": len(halves[1]),
        "patched_exactly": ranking.patches,
        "doubtful": ranking.doubtful,
        "refinement": {
            "exchanged": refined.exchanged,
            "squared_difference_before": refined.before,
            "squared_difference_after": refined.after,
            "mean_difference_before": refined.bias_before,
            "mean_difference_after": refined.bias_after,
            "evaluations": refined.evaluations,
        },
        "kept": kept,
        "worst": finder.worst(),
        "supernodes": [
            {
                "name": one.name,
                "parts": [finder.choose.describe(*node) for node in one.nodes],
            }
            for one in groups
        ],
    }
