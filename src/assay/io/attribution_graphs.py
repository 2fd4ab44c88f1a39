"""Attribution graphs in the JSON of Neuronpedia and circuit-tracer, written, read and checked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from assay.errors import InputError, shown, unknown
from assay.io.files import plain, read_json, write_json

FEATURE, ERROR = "cross layer transcoder", "mlp reconstruction error"
EMBEDDING, LOGIT = "embedding", "logit"
TYPES = (FEATURE, ERROR, EMBEDDING, LOGIT)
_SLUG = re.compile(r"[a-zA-Z0-9_-]+")
_TEXT = {
    "metadata": ("slug", "scan", "prompt"),
    "node": ("node_id", "layer", "feature_type", "jsNodeId", "clerp"),
}


@dataclass(frozen=True)
class GraphNode:
    """A node: its id, layer (the text of the file: a number, or "E" for embeddings), index of the
    feature (None where it is none), position, type, label and activation.
    """

    id: str
    layer: str
    feature: int | None
    position: int
    type: str
    label: str = ""
    activation: float | None = None
    influence: float | None = None


@dataclass(frozen=True)
class AttributionGraph:
    """Nodes and weighted links (source id, target id, weight) over the tokens of one prompt.

    `scan` names what the features are of, `info` holds what else the metadata says."""

    slug: str
    scan: str
    prompt: str
    tokens: tuple[str, ...]
    nodes: tuple[GraphNode, ...]
    links: tuple[tuple[str, str, float], ...]
    info: Mapping[str, Any] = field(default_factory=dict)
    supernodes: Sequence[Sequence[str]] = ()


def feature_id(layer: int | str, feature: int, position: int) -> str:
    """Return the id of a feature, `{layer}_{feature}_{position}`."""
    return f"{layer}_{feature}_{position}"


def error_id(site: str, position: int) -> str:
    """Return the id of an error, `err_{site}_{position}`: it can be no feature's."""
    return f"err_{site}_{position}"


def pair(layer: int, feature: int) -> int:
    """Return the Cantor pairing of a layer and the index of a feature, unique in a graph."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def unpair(code: int) -> tuple[int, int]:
    """Return the layer and the index of a feature from their Cantor pairing."""
    total = (math.isqrt(8 * code + 1) - 1) // 2
    feature = code - total * (total + 1) // 2
    return total - feature, feature


def write_graph(path: Path | str, graph: AttributionGraph) -> Path:
    """Write the graph as JSON; InputError where `read_graph` would refuse it."""
    data = _as_json(graph)
    _parse(str(path), data)
    return write_json(path, plain(data))


def read_graph(path: Path | str) -> AttributionGraph:
    """Read a graph; InputError, with the entry, for ids that collide, types that are not known,
    links to nodes that are not there, positions outside of the prompt, and other malformed files.
    """
    return _parse(str(path), read_json(path))


def _as_json(graph: AttributionGraph) -> dict[str, Any]:
    nodes = []
    for node in graph.nodes:
        code = -1 if node.feature is None else node.feature
        if node.type == FEATURE and node.layer.isdigit():
            code = pair(int(node.layer), code)
        nodes.append(
            {
                "node_id": node.id,
                "feature": code,
                "layer": node.layer,
                "ctx_idx": node.position,
                "feature_type": node.type,
                "token_prob": 0.0,
                "is_target_logit": node.type == LOGIT,
                "run_idx": 0,
                "reverse_ctx_idx": 0,
                "jsNodeId": f"{node.layer}_{node.id.rsplit('_', 1)[0]}-0",
                "clerp": node.label,
                "influence": node.influence,
                "activation": node.activation,
            }
        )
    return {
        "metadata": {
            **graph.info,
            "slug": graph.slug,
            "scan": graph.scan,
            "transcoder_list": [],
            "prompt_tokens": list(graph.tokens),
            "prompt": graph.prompt,
            "schema_version": 1,
        },
        "qParams": {
            "pinnedIds": [],
            "supernodes": [list(group) for group in graph.supernodes],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": nodes,
        "links": [
            {"source": source, "target": target, "weight": weight}
            for source, target, weight in graph.links
        ],
    }


def _parse(path: str, data: Any) -> AttributionGraph:
    def require(holder: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
        if not isinstance(holder, dict) or key not in holder:
            raise InputError(f"{path}: {where} has no {key!r}")
        value = holder[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InputError(f"{path}: {where}: {key!r} is {shown(value)}, of another type")
        return value

    metadata = require(data, "metadata", dict, "the graph")
    slug, scan, prompt = (require(metadata, key, str, "metadata") for key in _TEXT["metadata"])
    if not _SLUG.fullmatch(slug):
        raise InputError(
            f"{path}: metadata: slug {shown(slug)} must be of letters, digits, _ and - alone"
        )
    tokens = require(metadata, "prompt_tokens", list, "metadata")
    if not all(isinstance(token, str) for token in tokens):
        raise InputError(f"{path}: metadata: prompt_tokens must be texts")
    asked = require(data, "qParams", dict, "the graph")
    groups = asked.get("supernodes") or []
    nodes: dict[str, GraphNode] = {}
    for place, entry in enumerate(require(data, "nodes", list, "the graph")):
        where = f"node {place}"
        name, layer, kind, _, label = (
            str(require(entry, key, (str, int), where)) for key in _TEXT["node"]
        )
        if kind not in TYPES:
            raise unknown(f"feature_type of {name!r} in {path}", kind, TYPES)
        position = require(entry, "ctx_idx", int, where)
        if not 0 <= position < len(tokens):
            raise InputError(
                f"{path}: node {name!r} is at position {position} of {len(tokens)} tokens"
            )
        if name in nodes:
            raise InputError(
                f"{path}: two nodes have the id {name!r}; errors and features of layer 0 share ids"
                " in some files: name errors err_SITE_POSITION"
            )
        nodes[name] = GraphNode(
            name,
            layer,
            _index(path, name, layer, kind, entry.get("feature")),
            position,
            kind,
            label,
            *(_number(path, name, key, entry.get(key)) for key in ("activation", "influence")),
        )
    links = []
    for place, entry in enumerate(require(data, "links", list, "the graph")):
        ends = [require(entry, key, str, f"link {place}") for key in ("source", "target")]
        for end in ends:
            if end not in nodes:
                raise InputError(f"{path}: link {place} ends at {shown(end)}, which is no node")
        weight = require(entry, "weight", (int, float), f"link {place}")
        if not math.isfinite(weight):
            raise InputError(f"{path}: link {place} has the weight {weight}")
        links.append((ends[0], ends[1], float(weight)))
    known = ("slug", "scan", "prompt", "prompt_tokens")
    info = {key: value for key, value in metadata.items() if key not in known}
    return AttributionGraph(
        slug, scan, prompt, tuple(tokens), tuple(nodes.values()), tuple(links), info, groups
    )


def _index(path: str, name: str, layer: str, kind: str, code: Any) -> int | None:
    """Return the index of a feature: from its pairing where that agrees with the layer, else from
    its id, else the number as it stands.
    """
    if kind != FEATURE:
        held = isinstance(code, int) and not isinstance(code, bool) and code >= 0
        return code if held else None
    if not isinstance(code, int) or isinstance(code, bool) or code < 0:
        raise InputError(f"{path}: node {name!r}: feature is {shown(code)}, not a number from 0 on")
    match = re.fullmatch(r"(\d+)_(\d+)_(\d+)", name)
    if match is not None:
        return int(match[2])
    paired, index = unpair(code)
    return index if layer == str(paired) else code


def _number(path: str, name: str, key: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{path}: node {name!r}: {key} is {shown(value)}, not a number")
    return float(value)
