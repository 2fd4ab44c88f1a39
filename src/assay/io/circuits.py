"""Circuit files: the JSON of EAP-IG (arXiv 2403.17806), read and written, and GraphML, written
for graph viewers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from assay.errors import InputError, unknown
from assay.io.files import is_finite, plain, read_json, write_json, write_text
from assay.io.ours import DIGEST

_SETTINGS = {"n_layers": int, "n_heads": int, "parallel_attn_mlp": bool, "d_model": int}
_PARTS = ("cfg", "nodes", "edges")
_MOST = 1_000_000
_NODE = re.compile(r"input|logits|m[0-9]+|a[0-9]+\.h[0-9]+")
_EDGE = re.compile(
    r"(?P<source>input|m[0-9]+|a[0-9]+\.h[0-9]+)->"
    r"(?:(?P<head>a[0-9]+\.h[0-9]+)<(?P<slot>[qkv])>|(?P<other>logits|m[0-9]+))"
)


@dataclass(frozen=True)
class Scored:
    """A node or an edge of a circuit file: its score (None if it has none) and whether it is in
    the circuit.
    """

    score: float | None
    in_graph: bool


@dataclass(frozen=True)
class Circuit:
    """A circuit over heads and MLPs.

    Nodes are `input`, `a{layer}.h{head}`, `m{layer}` and `logits`; edges `source->receiver`, into
    heads `source->head<q>` (or `<k>`, `<v>`). `settings` holds n_layers, n_heads, parallel_attn_mlp
    and d_model."""

    settings: Mapping[str, int | bool]
    nodes: Mapping[str, Scored]
    edges: Mapping[str, Scored]


def read_circuit(path: Path | str) -> Circuit:
    """Read the JSON of EAP-IG; InputError, with the name of the entry, when it is malformed or is
    not what Assay wrote.
    """
    return parse_circuit(path, read_json(path))


def parse_circuit(path: Path | str, data: Any) -> Circuit:
    """Return the circuit of a file's JSON; InputError as `read_circuit`."""
    if not isinstance(data, dict):
        raise InputError(f"{path}: a JSON object expected, got {type(data).__name__}")
    for key in _PARTS:
        if not isinstance(data.get(key), dict):
            raise InputError(f"{path}: no {key!r} object; a circuit file has cfg, nodes and edges")
    if others := [key for key in data if key not in (*_PARTS, DIGEST)]:
        raise unknown(f"entry of the circuit file {path}", others[0], (*_PARTS, DIGEST))
    settings: dict[str, int | bool] = {key: data["cfg"].get(key) for key in _SETTINGS}
    for key, kind in _SETTINGS.items():
        if type(settings[key]) is not kind or int(settings[key]) < 0:
            raise InputError(f"{path}: cfg {key!r} must be {kind.__name__}, got {settings[key]!r}")
    if settings["n_layers"] * (settings["n_heads"] + 1) > _MOST:
        raise InputError(
            f"{path}: cfg speaks of {settings['n_layers']} layers of {settings['n_heads']} heads;"
            f" at most {_MOST:,} heads and MLPs are read"
        )
    nodes = {
        name: _scored(path, "node", name, entry, _NODE) for name, entry in data["nodes"].items()
    }
    edges = {
        name: _scored(path, "edge", name, entry, _EDGE) for name, entry in data["edges"].items()
    }
    for name in edges:
        source, receiver, _ = edge_ends(name)
        if lost := {source, receiver} - set(nodes):
            raise InputError(
                f"{path}: edge {name!r} ends at {lost.pop()!r}, which is not among the nodes"
            )
    if data.get(DIGEST, _digest(data)) != _digest(data):
        raise InputError(
            f"{path} is damaged: its content is not what Assay wrote (the SHA-256 differs). Restore"
            f" it from a copy, or remove its entry {DIGEST!r} if you changed it yourself"
        )
    return Circuit(settings, nodes, edges)


def write_circuit(path: Path | str, circuit: Circuit) -> Path:
    """Write the JSON of EAP-IG, with the SHA-256 of its content, which `read_circuit` checks;
    entries without a score leave the key out.
    """

    def entry(scored: Scored) -> dict[str, Any]:
        return {"in_graph": scored.in_graph} | (
            {} if scored.score is None else {"score": scored.score}
        )

    nodes = {name: entry(scored) for name, scored in circuit.nodes.items()}
    edges = {name: entry(scored) for name, scored in circuit.edges.items()}
    whole = plain({"cfg": dict(circuit.settings), "nodes": nodes, "edges": edges})
    return write_json(path, {**whole, DIGEST: _digest(whole)})


def write_graphml(path: Path | str, circuit: Circuit, *, whole: bool = False) -> Path:
    """Write the circuit as GraphML, for Gephi, yEd or networkx; with `whole`, nodes and edges
    outside the circuit as well. InputError where a file is there already.
    """
    root = ElementTree.Element("graphml", xmlns="http://graphml.graphdrawing.org/xmlns")
    keys = (
        ("node", "score", "double"),
        ("node", "in_graph", "boolean"),
        ("node", "layer", "int"),
        ("edge", "score", "double"),
    )
    for domain, name, kind in (*keys, ("edge", "in_graph", "boolean"), ("edge", "slot", "string")):
        ElementTree.SubElement(
            root,
            "key",
            {"id": f"{domain}_{name}", "for": domain, "attr.name": name, "attr.type": kind},
        )
    graph = ElementTree.SubElement(root, "graph", id="circuit", edgedefault="directed")
    for name, scored in circuit.nodes.items():
        if whole or scored.in_graph:
            layer = re.search(r"\d+", name)
            node = ElementTree.SubElement(graph, "node", id=name)
            _attributes(node, "node", scored, layer=-1 if layer is None else int(layer.group()))
    for name, scored in circuit.edges.items():
        if whole or scored.in_graph:
            source, receiver, slot = edge_ends(name)
            edge = ElementTree.SubElement(graph, "edge", id=name, source=source, target=receiver)
            _attributes(edge, "edge", scored, **({"slot": slot} if slot else {}))
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return write_text(path, f"<?xml version='1.0' encoding='utf-8'?>\n{text}")


def edge_ends(name: str) -> tuple[str, str, str]:
    """Return source, receiver and slot ("q", "k", "v" or "") of an edge's name; InputError when
    it is none.
    """
    match = _EDGE.fullmatch(name)
    if match is None:
        raise InputError(
            f"{name!r} is no edge; edges are named like 'm0->a1.h2<q>', 'a0.h1->m3' or"
            " 'input->logits'"
        )
    return match["source"], match["head"] or match["other"], match["slot"] or ""


def _digest(data: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a circuit's three parts, whatever the layout of its text."""
    text = json.dumps({key: data[key] for key in _PARTS}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _scored(path: Path | str, what: str, name: str, entry: Any, pattern: re.Pattern[str]) -> Scored:
    if pattern.fullmatch(name) is None:
        raise InputError(f"{path}: {name!r} is not the name of a {what}")
    if not isinstance(entry, dict) or not isinstance(entry.get("in_graph"), bool):
        raise InputError(f"{path}: {what} {name!r} must be an object with a boolean 'in_graph'")
    score = entry.get("score")
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
        raise InputError(f"{path}: the score of {what} {name!r} must be a number, got {score!r}")
    return Scored(
        None if score is None or not is_finite(score) else float(score), entry["in_graph"]
    )


def _attributes(
    element: ElementTree.Element, domain: str, scored: Scored, **more: int | str
) -> None:
    values: dict[str, Any] = {"in_graph": str(scored.in_graph).lower(), **more}
    if scored.score is not None:
        values["score"] = repr(scored.score)
    for name, value in values.items():
        ElementTree.SubElement(element, "data", key=f"{domain}_{name}").text = str(value)
