"""An attribution graph of another tool, matched with a network and its dictionaries: what each of
its nodes writes and reads there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from assay.core.sites import read_sites, run_edited
from assay.core.target import Batch, Target
from assay.dictionaries import DictionarySet
from assay.dictionaries.gated import Gated
from assay.dictionaries.linear import Linear
from assay.edges.direct import Carried, Piece, Reading
from assay.errors import InputError
from assay.io.attribution_graphs import (
    EMBEDDING,
    ERROR,
    FEATURE,
    LOGIT,
    AttributionGraph,
    GraphNode,
)
from assay.studies.graph_audit.stated import Stated, compare_stated
from assay.studies.graph_audit.tokens import token_ids
from assay.targets import names
from assay.targets.language import require_context
from assay.targets.load import LanguageTarget
from assay.targets.metrics import last_logits


@dataclass(frozen=True)
class Matched:
    """A graph's nodes in a network: `pieces` by the id of what writes, `readings` by the id of what
    reads, `held` as `remove_pieces` takes it, `outputs` (id of a logit, token), the activations
    that features have here, and how the graph's own numbers compare."""

    batch: Batch
    pieces: Mapping[str, Piece]
    readings: Mapping[str, Reading]
    held: Mapping[str, tuple[Carried, ...]]
    outputs: Mapping[str, int]
    activations: Mapping[str, float]
    stated: Stated


@dataclass(frozen=True)
class _Layer:
    """The transcoder that reads in one layer."""

    dictionary: Linear
    reads: str
    writes: tuple[str, ...]
    width: int

    def columns(self, site: str) -> slice:
        first = self.writes.index(site) * self.width
        return slice(first, first + self.width)


@torch.no_grad()
def match(
    path: str, graph: AttributionGraph, target: LanguageTarget, dictionaries: DictionarySet
) -> Matched:
    """Return what the nodes of a graph write and read in a network.

    Raises InputError, with what differs, for a graph of another model (layers, vocabulary, tokens
    of the prompt), for one whose prompt and tokens differ or in which two nodes are one part, for
    dictionaries that do not fit it, and for links into nodes that read nothing."""
    model: Any = target.model
    depth = len(names.site_names(model, ("mlp",)))
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    _require_same_model(path, graph, depth, vocabulary)
    _require_distinct(path, graph)
    ids = token_ids(path, graph, target.tokenizer, vocabulary, depth)
    require_context(model, len(ids))
    tokens = torch.tensor([ids], device=target.device)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    batch = Batch(inputs, {"last": torch.tensor([len(ids) - 1], device=target.device)})
    layers = _layers(path, model, dictionaries, depth)
    needed = {_layer(node) for node in graph.nodes if node.type == FEATURE}
    if lost := sorted(needed - set(layers)):
        have = f"those of layers {sorted(layers)}" if layers else "none"
        raise InputError(
            f"{path} has features of layer {lost[0]}, and there are dictionaries of {have}: give"
            " the folder of the graph's dictionaries with --dictionaries"
        )
    embedding = names.resolve(model, "hook_embed").site
    written = dict.fromkeys(site for layer in layers.values() for site in layer.writes)
    sites = [embedding, *written, *(layer.reads for layer in layers.values())]
    seen = read_sites(model, inputs, list(dict.fromkeys(sites)))
    values = {site: entry.value[0] for site, entry in seen.items()}
    _require_widths(path, layers, values)
    codes = {
        number: layer.dictionary.encode(values[layer.reads]) for number, layer in layers.items()
    }
    held, errors = _held(layers, written), _errors(layers, values, codes, written)
    sites_of_errors = {number: layer.writes[0] for number, layer in layers.items()}
    pieces, readings, activations = {}, {}, {}
    for node in graph.nodes:
        place = node.position
        if node.type == FEATURE:
            number = _layer(node)
            layer, index = layers[number], node.feature
            assert index is not None
            if index >= layer.dictionary.size:
                raise InputError(
                    f"{path}: node {node.id!r} is feature {index} of layer {number}, and the"
                    f" dictionary there has {layer.dictionary.size} features: it is another one"
                )
            strength = codes[number][place, index]
            activations[node.id] = float(strength)
            row = layer.dictionary.W_dec[index]
            vectors = {site: strength * row[layer.columns(site)] for site in layer.writes}
            pieces[node.id] = Piece(place, vectors)
            readings[node.id] = Reading(layer.reads, place, layer.dictionary.W_enc[:, index])
        elif node.type == ERROR:
            if node.depth not in sites_of_errors:
                raise InputError(
                    f"{path}: node {node.id!r} is an error of layer {node.layer!r}, where no"
                    " dictionary writes"
                )
            site = sites_of_errors[_layer(node)]
            pieces[node.id] = Piece(place, {site: errors[site][place]})
        elif node.type == EMBEDDING:
            pieces[node.id] = Piece(place, {embedding: values[embedding][place]})
    outputs = {
        node.id: node.feature
        for node in graph.nodes
        if node.type == LOGIT and node.feature is not None
    }
    _require_links(path, graph, readings, outputs)
    stated = compare_stated(path, graph, activations, _probabilities(target, batch, outputs))
    return Matched(batch, pieces, readings, held, outputs, activations, stated)


def _layer(node: GraphNode) -> int:
    assert node.depth is not None
    return node.depth


def _probabilities(target: Target, batch: Batch, outputs: Mapping[str, int]) -> dict[str, float]:
    """Return what the model makes of the tokens of logits behind the prompt."""
    odds = last_logits(run_edited(target.model, batch.inputs), batch.labels["last"])[0].softmax(-1)
    return {name: float(odds[token]) for name, token in outputs.items()}


def _require_same_model(path: str, graph: AttributionGraph, depth: int, vocabulary: int) -> None:
    for node in graph.nodes:
        if node.type in (FEATURE, ERROR) and node.depth is not None and node.depth >= depth:
            raise InputError(
                f"{path} is a graph of another model: node {node.id!r} is in layer {node.layer},"
                f" and the model has {depth} layers, 0 to {depth - 1}"
            )
        if node.type != LOGIT:
            continue
        if node.depth not in (depth, depth + 1):
            raise InputError(
                f"{path} is a graph of another model: its logits are in layer {node.layer}, those"
                f" of a model of {depth} layers in {depth + 1}"
            )
        if node.feature is None or node.feature >= vocabulary:
            raise InputError(
                f"{path} is a graph of another model, or of targets that are no tokens: node"
                f" {node.id!r} is of token {node.feature}, and the model has {vocabulary} tokens"
            )
        if node.position != len(graph.tokens) - 1:
            raise InputError(
                f"{path}: logit {node.id!r} is at position {node.position}, and the prompt has"
                f" {len(graph.tokens)} tokens: logits behind the last one alone are audited"
            )
    if not any(node.type == LOGIT for node in graph.nodes):
        raise InputError(f"{path} has no logit, so that there is no effect that it speaks of")


def _require_distinct(path: str, graph: AttributionGraph) -> None:
    """Raise InputError where two nodes stand for one part, which would be counted twice."""
    seen: dict[tuple[str, int | None, int | None, int], str] = {}
    for node in graph.nodes:
        index = node.feature if node.type in (FEATURE, LOGIT) else None
        depth = None if node.type == LOGIT else node.depth
        first = seen.setdefault((node.type, depth, index, node.position), node.id)
        if first != node.id:
            raise InputError(
                f"{path}: nodes {first!r} and {node.id!r} are the same {node.type} at position"
                f" {node.position}"
            )


def _layers(path: str, model: Any, dictionaries: DictionarySet, depth: int) -> dict[int, _Layer]:
    found: dict[int, _Layer] = {}
    for name in dictionaries:
        placed = dictionaries[name]
        reads = names.resolve(model, placed.reads)
        writes = tuple(names.resolve(model, site).site for site in placed.writes)
        if reads.site in writes:
            raise InputError(
                f"{name!r} writes where it reads; the graph {path} is over transcoders, which read"
                " what goes into an MLP and write what comes out"
            )
        if not isinstance(placed.dictionary, Linear) or isinstance(placed.dictionary, Gated):
            raise InputError(
                f"{name!r} is a {placed.dictionary.architecture} dictionary; edges into its"
                " features are not one product of vectors, and their effects are not computed"
            )
        if reads.layer in found:
            raise InputError(
                f"two dictionaries read in layer {reads.layer}; a feature of the graph {path} is"
                " named by its layer alone"
            )
        found[reads.layer] = _Layer(placed.dictionary, reads.site, writes, placed.width)
    return found


def _require_widths(path: str, layers: Mapping[int, _Layer], values: Mapping[str, Tensor]) -> None:
    for number, layer in layers.items():
        sides = [(layer.reads, layer.dictionary.d_in), *((at, layer.width) for at in layer.writes)]
        for site, width in sides:
            if values[site].shape[-1] != width:
                raise InputError(
                    f"the dictionary of layer {number} is for values of width {width}, and those at"
                    f" {site!r} have width {values[site].shape[-1]}: it belongs to another model"
                )


def _held(
    layers: Mapping[int, _Layer], written: Mapping[str, Any]
) -> dict[str, tuple[Carried, ...]]:
    """Return the sites where dictionaries write, with what skip connections carry there."""

    def carry(layer: _Layer, site: str, value: Tensor) -> Tensor:
        return layer.dictionary.rest(value)[..., layer.columns(site)]

    found: dict[str, tuple[Carried, ...]] = {}
    for site in written:
        carriers: list[tuple[str, Callable[[Tensor], Tensor]]] = [
            (layer.reads, partial(carry, layer, site))
            for layer in layers.values()
            if site in layer.writes and layer.dictionary.W_skip is not None
        ]
        found[site] = tuple(carriers)
    return found


def _errors(
    layers: Mapping[int, _Layer],
    values: Mapping[str, Tensor],
    codes: Mapping[int, Tensor],
    written: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Return what dictionaries leave at every site where they write."""
    found = {site: values[site].clone() for site in written}
    for number, layer in layers.items():
        rebuilt = layer.dictionary.decode(codes[number], values[layer.reads])
        for site in layer.writes:
            found[site] -= rebuilt[..., layer.columns(site)]
    return found


def _require_links(
    path: str,
    graph: AttributionGraph,
    readings: Mapping[str, Reading],
    outputs: Mapping[str, int],
) -> None:
    kinds = {node.id: node.type for node in graph.nodes}
    for source, receiver, _ in graph.links:
        if receiver not in readings and receiver not in outputs:
            raise InputError(
                f"{path}: a link ends at {receiver!r}, which is an {kinds[receiver]} and reads"
                " nothing"
            )
        if source in outputs:
            raise InputError(f"{path}: a link begins at {source!r}, which is a logit")
