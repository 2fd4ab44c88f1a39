"""GraphML is read back by a parser with every node, link and label as it was."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.io.attribution_graphs import (
    EMBEDDING,
    ERROR,
    FEATURE,
    LOGIT,
    AttributionGraph,
    GraphNode,
)
from assay.io.graphml import write_graphml

SPACE = "{http://graphml.graphdrawing.org/xmlns}"
GRAPH = AttributionGraph(
    "one",
    "gpt2 <small> & co",
    "The keys\n",
    ("The", " keys", "\n"),
    (
        GraphNode("E_5_0", "E", 0, 0, EMBEDDING, "The"),
        GraphNode("0_7_1", "0", 7, 1, FEATURE, 'a "plural" <one>', 1.5, 0.3),
        GraphNode("err_m0_1", "0", None, 1, ERROR),
        GraphNode("3_9_2", "3", 9, 2, LOGIT, " are", probability=0.25),
    ),
    (("E_5_0", "0_7_1", 0.1 + 0.2), ("0_7_1", "3_9_2", -2e-17)),
)


def read(path):
    """Return keys, nodes, links and what is said of the whole, by the standard rules of GraphML."""
    root = ElementTree.parse(path).getroot()
    assert root.tag == f"{SPACE}graphml"
    keys = {key.get("id"): key.attrib for key in root.findall(f"{SPACE}key")}
    parse = {"string": str, "int": int, "long": int, "double": float}

    def values(entry, of):
        found = {}
        for data in entry.findall(f"{SPACE}data"):
            key = keys[data.get("key")]
            assert key["for"] == of
            found[key["attr.name"]] = parse[key["attr.type"]](data.text or "")
        return found

    (graph,) = root.findall(f"{SPACE}graph")
    assert graph.get("edgedefault") == "directed"
    nodes = {node.get("id"): values(node, "node") for node in graph.findall(f"{SPACE}node")}
    links = [
        (edge.get("source"), edge.get("target"), values(edge, "edge")["weight"])
        for edge in graph.findall(f"{SPACE}edge")
    ]
    assert {end for link in links for end in link[:2]} <= set(nodes)
    return nodes, links, values(graph, "graph")


def test_what_is_written_is_read_back(tmp_path):
    nodes, links, whole = read(write_graphml(tmp_path / "graph.graphml", GRAPH))
    assert links == list(GRAPH.links)
    assert list(nodes) == [node.id for node in GRAPH.nodes]
    for node in GRAPH.nodes:
        held = {
            name: getattr(node, name)
            for name in ("type", "layer", "position", "feature", "activation", "influence")
        } | {"label": node.label, "probability": node.probability}
        assert nodes[node.id] == {name: value for name, value in held.items() if value is not None}
    assert whole["scan"] == GRAPH.scan
    assert whole["prompt"] == GRAPH.prompt
    assert whole["tokens"].split("\n") == ["The", " keys", "\\n"]


def test_nodes_have_the_names_of_their_supernodes(tmp_path):
    grouped = replace(GRAPH, supernodes=[["a <b>", "E_5_0", "0_7_1"], ["second", "0_7_1"]])
    nodes, _, _ = read(write_graphml(tmp_path / "graph.graphml", grouped))
    found = {name: node.get("supernode") for name, node in nodes.items()}
    assert found == {"E_5_0": "a <b>", "0_7_1": "a <b>, second", "err_m0_1": None, "3_9_2": None}


def test_networkx_reads_what_was_written(tmp_path):
    networkx = pytest.importorskip("networkx")
    found = networkx.read_graphml(write_graphml(tmp_path / "graph.graphml", GRAPH))
    assert found.is_directed()
    assert not found.is_multigraph()
    assert [(*ends, held["weight"]) for *ends, held in found.edges(data=True)] == list(GRAPH.links)
    assert list(found.nodes) == [node.id for node in GRAPH.nodes]
    for node in GRAPH.nodes:
        held = found.nodes[node.id]
        assert held["position"] == node.position
        assert held.get("activation") == node.activation
        assert held.get("label", "") == node.label
        assert (held["type"], held["layer"]) == (node.type, node.layer)
        assert held.get("feature") == node.feature
    assert found.graph["prompt"] == GRAPH.prompt


@settings(deadline=None)
@given(label=st.text(max_size=20))
def test_every_label_gives_a_file_that_parses(tmp_path_factory, label):
    node = replace(GRAPH.nodes[0], label=label)
    path = tmp_path_factory.mktemp("graphs") / "graph.graphml"
    nodes, _, _ = read(write_graphml(path, replace(GRAPH, nodes=(node, *GRAPH.nodes[1:]))))
    if label.isprintable():
        assert nodes["E_5_0"]["label"] == label
