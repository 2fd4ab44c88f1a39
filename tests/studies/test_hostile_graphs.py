"""Whatever stands in an entry of a graph file, the audit answers or names it in one line."""

from __future__ import annotations

import json
import math

import pytest
from test_graph_audit import network, transcoders, whole_graph

from assay.errors import InputError
from assay.io.attribution_graphs import FEATURE, LOGIT, AttributionGraph, write_graph
from assay.studies.graph_audit import audit_graph

pytestmark = pytest.mark.slow

VALUES = {
    "nothing": None,
    "a truth": True,
    "below zero": -1,
    "huge": 10**30,
    "too large": 1e308,
    "not a number": math.nan,
    "a text": "1",
    "no text": "",
    "half a letter": "\ud800",
    "a list": [[1], "a"],
    "deep": json.loads("[" * 300 + "]" * 300),
    "a table": {"a": {}},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A network, its transcoders, and the JSON of a graph of a few of their features."""
    dictionaries = transcoders()
    graph = whole_graph(dictionaries)
    features = [node for node in graph.nodes if node.type == FEATURE][::40]
    nodes = [*graph.nodes[:5], *features, graph.nodes[-1]]
    names = {node.id for node in nodes}
    links = tuple(link for link in graph.links if {*link[:2]} <= names)
    small = AttributionGraph(
        graph.slug, graph.scan, graph.prompt, graph.tokens, tuple(nodes), links
    )
    path = write_graph(tmp_path_factory.mktemp("graphs") / "graph.json", small)
    return network(), dictionaries, path, path.read_text()


def entries(data):
    """Yield what holds each entry that is read, with its key."""
    yield from ((data, key) for key in ("metadata", "qParams", "nodes", "links"))
    yield from ((data["metadata"], key) for key in ("slug", "scan", "prompt", "prompt_tokens"))
    yield data["qParams"], "supernodes"
    kinds = {node["feature_type"]: node for node in data["nodes"]}
    for kind in ("embedding", FEATURE, LOGIT):
        yield from ((kinds[kind], key) for key in list(kinds[kind]))
    yield from ((data["links"][0], key) for key in ("source", "target", "weight"))


def refusal(made, data) -> str | None:
    """Return why a graph is refused, None where it is audited."""
    target, dictionaries, path, _ = made
    path.write_text(json.dumps(data))
    try:
        assert len(audit_graph(path, target, dictionaries).sentences()) >= 2
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("value", VALUES)
def test_every_entry_may_hold_anything(value, made):
    text, said = made[3], []
    for place in range(len(list(entries(json.loads(text))))):
        data = json.loads(text)
        holder, key = list(entries(data))[place]
        holder[key] = VALUES[value]
        said.append(refusal(made, data))
    for line in filter(None, said):
        assert "\n" not in line
        assert len(line) < 600
    # What no audit reads may hold anything: the run's number, what a reader clicked.
    assert said.count(None) >= 4


def test_entries_that_are_not_there_are_named(made):
    text = made[3]
    for place in range(len(list(entries(json.loads(text))))):
        data = json.loads(text)
        holder, key = list(entries(data))[place]
        del holder[key]
        line = refusal(made, data)
        assert line is None or key in line or "does not" in line
