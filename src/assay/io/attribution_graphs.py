"""Attribution graphs in the JSON of Neuronpedia and circuit-tracer, written, read and checked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from assay.errors import InputError, shown, unknown
from assay.io.files import is_finite, plain, read_json, write_json

FEATURE, ERROR = "cross layer transcoder", "mlp reconstruction error"
EMBEDDING, LOGIT = "embedding", "logit"
TYPES = (FEATURE, ERROR, EMBEDDING, LOGIT)
_PLACED_ID = re.compile(r"(E|[0-9]{1,9})_([0-9]{1,18})_([0-9]{1,9})")
_LAYER = re.compile(r"[0-9]{1,9}")
_SLUG = re.compile(r"[a-zA-Z0-9_-]+")
_NUMBERS = ("activation", "influence", "token_prob")
_ROUNDING = 1e-6  # of a probability in single precision
_TEXT = {
    "metadata": ("slug", "scan", "prompt"),
    "node": ("node_id", "layer", "feature_type", "jsNodeId", "clerp"),
}


@dataclass(frozen=True)
class GraphNode:
    """A node: its id, layer (the text of the file: a number, or "E" for embeddings), index of the
    feature (None where it is none), position, type, label, activation, and the probability of a
    logit's token.
    """

    id: str
    layer: str
    feature: int | None
    position: int
    type: str
    label: str = ""
    activation: float | None = None
    influence: float | None = None
    probability: float | None = 0.0

    @property
    def depth(self) -> int | None:
        """The number of the layer, None where it has none."""
        return int(self.layer) if _LAYER.fullmatch(self.layer) else None

    @property
    def token(self) -> int | None:
        """The number of the token that the id of an embedding states, None where it states none."""
        found = _PLACED_ID.fullmatch(self.id) if self.type == EMBEDDING else None
        return None if found is None else int(found[2])


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
    parse_graph(path, data)
    return write_json(path, plain(data))


def read_graph(path: Path | str) -> AttributionGraph:
    """Read a graph; InputError, with the entry, for ids that collide or contradict their node,
    types that are not known, links to nodes that are not there, positions outside of the prompt,
    probabilities outside [0, 1], and other malformed files.
    """
    return parse_graph(path, read_json(path))


def _as_json(graph: AttributionGraph) -> dict[str, Any]:
    nodes = []
    for node in graph.nodes:
        code = -1 if node.feature is None else node.feature
        if node.type == FEATURE and node.depth is not None:
            code = pair(node.depth, code)
        nodes.append(
            {
                "node_id": node.id,
                "feature": code,
                "layer": node.layer,
                "ctx_idx": node.position,
                "feature_type": node.type,
                "token_prob": node.probability or 0.0,
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


def parse_graph(path: Path | str, data: Any) -> AttributionGraph:
    """Return the graph of a file's JSON; InputError as `read_graph`."""
    path = str(path)

    def require(holder: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
        if not isinstance(holder, dict) or key not in holder:
            raise InputError(f"{path}: {where} has no {key!r}")
        value = holder[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InputError(f"{path}: {where}: {key!r} is {shown(value)}, of another type")
        if isinstance(value, str):
            _require_unicode(path, where, key, value)
        return value

    metadata = require(data, "metadata", dict, "the graph")
    slug, scan, prompt = (require(metadata, key, str, "metadata") for key in _TEXT["metadata"])
    if not _SLUG.fullmatch(slug):
        raise InputError(
            f"{path}: metadata: slug {shown(slug)} must be of letters, digits, _ and - alone"
        )
    tokens = require(metadata, "prompt_tokens", list, "metadata")
    for token in tokens:
        if not isinstance(token, str):
            raise InputError(f"{path}: metadata: prompt_tokens must be texts, got {shown(token)}")
        _require_unicode(path, "metadata", "prompt_tokens", token)
    groups = _groups(path, require(data, "qParams", dict, "the graph").get("supernodes"))
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
        stated = None if kind == ERROR else _PLACED_ID.fullmatch(name)
        if stated is not None and (layer, position) != (stated[1], int(stated[3])):
            raise InputError(
                f"{path}: node {name!r} is of layer {shown(layer)} at position {position}, and its"
                " id says otherwise"
            )
        nodes[name] = GraphNode(
            name,
            layer,
            _index(path, name, layer, kind, entry.get("feature")),
            position,
            kind,
            label,
            *(_number(path, name, key, entry.get(key)) for key in _NUMBERS),
        )
        if kind in (FEATURE, LOGIT) and nodes[name].depth is None:
            raise InputError(f"{path}: node {name!r}: the layer of a {kind} is {shown(layer)}")
    links, joined = [], set[tuple[str, str]]()
    for place, entry in enumerate(require(data, "links", list, "the graph")):
        ends = [require(entry, key, str, f"link {place}") for key in ("source", "target")]
        for end in ends:
            if end not in nodes:
                raise InputError(f"{path}: link {place} ends at {shown(end)}, which is no node")
        weight = require(entry, "weight", (int, float), f"link {place}")
        if not is_finite(weight):
            raise InputError(f"{path}: link {place} has the weight {shown(weight)}")
        if (ends[0], ends[1]) in joined:
            raise InputError(f"{path}: link {place} joins {ends[0]!r} and {ends[1]!r} again")
        joined.add((ends[0], ends[1]))
        links.append((ends[0], ends[1], float(weight)))
    known = ("slug", "scan", "prompt", "prompt_tokens")
    info = {key: value for key, value in metadata.items() if key not in known}
    return AttributionGraph(
        slug, scan, prompt, tuple(tokens), tuple(nodes.values()), tuple(links), info, groups
    )


def _groups(path: str, groups: Any) -> list[list[str]]:
    """Return supernodes: a list of texts each, the name first."""
    groups = groups or []
    for group in groups if isinstance(groups, list) else [groups]:
        if not isinstance(group, list) or not all(isinstance(entry, str) for entry in group):
            raise InputError(
                f"{path}: a supernode must be a list of texts, a name and the ids of nodes; got"
                f" {shown(group)}"
            )
    return groups


def _require_unicode(path: str, where: str, key: str, text: str) -> None:
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError(f"{path}: {where}: {key!r} holds a lone surrogate: {shown(text)}")


def _index(path: str, name: str, layer: str, kind: str, code: Any) -> int | None:
    """Return the index of a feature: from its id, else from its pairing where that agrees with the
    layer, else the number as it stands; of a logit its token, which id and number must agree on.
    """
    held = isinstance(code, int) and not isinstance(code, bool) and code >= 0
    match = _PLACED_ID.fullmatch(name)
    if kind == LOGIT and match is not None:
        if held and code != int(match[2]):
            raise InputError(
                f"{path}: node {name!r} is of token {shown(code)}, and its id says otherwise"
            )
        return int(match[2])
    if kind != FEATURE:
        return code if held else None
    if not held:
        raise InputError(f"{path}: node {name!r}: feature is {shown(code)}, not a number from 0 on")
    if match is not None:
        return int(match[2])
    paired, index = unpair(code)
    return index if layer == str(paired) else int(code)


def _number(path: str, name: str, key: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not is_finite(value):
        raise InputError(f"{path}: node {name!r}: {key} is {shown(value)}, not a number")
    if key == "token_prob" and not 0 <= value <= 1 + _ROUNDING:
        raise InputError(f"{path}: node {name!r}: token_prob is {shown(value)}, outside [0, 1]")
    return float(value)
