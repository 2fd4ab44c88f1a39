"""Attribution graphs as GraphML, which graph viewers and libraries read."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from assay.io.attribution_graphs import AttributionGraph
from assay.io.files import write_text

_SPACE = "http://graphml.graphdrawing.org/xmlns"
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NODE = {
    "type": "string",
    "layer": "string",
    "position": "int",
    "feature": "long",
    "label": "string",
    "activation": "double",
    "influence": "double",
    "probability": "double",
}


def write_graphml(path: Path | str, graph: AttributionGraph) -> Path:
    """Write a graph as one directed GraphML graph: the nodes by their ids and with the names of
    their supernodes, links with their `weight`, and the prompt and its tokens (one a line) of the
    whole. What a node does not have is left out, and so are characters that XML cannot hold.
    """
    root = ElementTree.Element("graphml", {"xmlns": _SPACE})
    _declare(root, "graph", {"prompt": "string", "tokens": "string", "scan": "string"})
    _declare(root, "node", _NODE | {"supernode": "string"})
    _declare(root, "edge", {"weight": "double"})
    whole = ElementTree.SubElement(root, "graph", {"id": graph.slug, "edgedefault": "directed"})
    tokens = "\n".join(_plain(token).replace("\n", "\\n") for token in graph.tokens)
    _put(whole, "graph", {"prompt": graph.prompt, "tokens": tokens, "scan": graph.scan})
    groups: dict[str, list[str]] = {}
    for name, *members in graph.supernodes:
        for member in members:
            groups.setdefault(member, []).append(name)
    for node in graph.nodes:
        entry = ElementTree.SubElement(whole, "node", {"id": _plain(node.id)})
        values = {key: getattr(node, key) for key in _NODE}
        _put(entry, "node", values | {"supernode": ", ".join(groups.get(node.id, [])) or None})
    for source, target, weight in graph.links:
        ends = {"source": _plain(source), "target": _plain(target)}
        _put(ElementTree.SubElement(whole, "edge", ends), "edge", {"weight": weight})
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return write_text(path, f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n')


def _declare(root: ElementTree.Element, of: str, kinds: dict[str, str]) -> None:
    for name, kind in kinds.items():
        given = {"id": f"{of}-{name}", "for": of, "attr.name": name, "attr.type": kind}
        ElementTree.SubElement(root, "key", given)


def _put(entry: ElementTree.Element, of: str, values: dict[str, object]) -> None:
    for name, value in values.items():
        if value is not None:
            data = ElementTree.SubElement(entry, "data", {"key": f"{of}-{name}"})
            data.text = _plain(repr(value) if isinstance(value, float) else str(value))


def _plain(text: str) -> str:
    return _FORBIDDEN.sub("\ufffd", text)
