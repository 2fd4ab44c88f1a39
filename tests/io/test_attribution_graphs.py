"""Attribution graphs are written as Neuronpedia takes them, and read with every id unambiguous."""

from __future__ import annotations

import json

import jsonschema
import pytest
from graph_schema import SCHEMA
from hypothesis import given
from hypothesis import strategies as st

from assay.errors import InputError
from assay.io.attribution_graphs import (
    EMBEDDING,
    ERROR,
    FEATURE,
    LOGIT,
    AttributionGraph,
    GraphNode,
    error_id,
    feature_id,
    pair,
    read_graph,
    unpair,
    write_graph,
)


def graph(**changes) -> AttributionGraph:
    nodes = (
        GraphNode("E_5_0", "E", 0, 0, EMBEDDING, "The"),
        GraphNode(feature_id(0, 7, 1), "0", 7, 1, FEATURE, "plural", 1.5, 0.3),
        GraphNode(error_id("m0", 1), "0", None, 1, ERROR),
        GraphNode(feature_id(3, 9, 1), "3", 9, 1, LOGIT, "are"),
    )
    links = (("E_5_0", "0_7_1", 0.5), ("0_7_1", "3_9_1", -2.0))
    given_ = {
        "slug": "one",
        "scan": "gpt2",
        "prompt": "The keys",
        "tokens": ("The", " keys"),
        "nodes": nodes,
        "links": links,
        "supernodes": [["number", "0_7_1"]],
    }
    return AttributionGraph(**{**given_, **changes})


def test_a_written_graph_fits_the_schema_and_reads_back(tmp_path):
    path = write_graph(tmp_path / "graph.json", graph())
    data = json.loads(path.read_text())
    jsonschema.validate(data, SCHEMA)
    assert data["nodes"][1]["feature"] == pair(0, 7)
    again = read_graph(path)
    assert again.nodes == graph().nodes
    assert again.links == graph().links
    assert again.tokens == graph().tokens
    assert list(map(list, again.supernodes)) == [["number", "0_7_1"]]


@given(st.integers(0, 200), st.integers(0, 2**40))
def test_a_pairing_is_undone(layer, feature):
    assert unpair(pair(layer, feature)) == (layer, feature)


def node(**changes):
    base = GraphNode("0_1_1", "0", 1, 1, FEATURE)
    return (*graph().nodes, GraphNode(**{**base.__dict__, **changes}))


BAD = {
    "the id of a feature for an error": (
        {"nodes": node(id="0_7_1", type=ERROR)},
        "two nodes have the id '0_7_1'",
    ),
    "a type that is not known": ({"nodes": node(type="embeding")}, "did you mean embedding"),
    "a position outside": ({"nodes": node(position=2)}, "position 2 of 2 tokens"),
    "an edge to nothing": ({"links": (("E_5_0", "9_9_9", 1.0),)}, "is no node"),
    "a weight that is none": ({"links": (("E_5_0", "0_7_1", float("nan")),)}, "the weight nan"),
    "a weight that is too large": ({"links": (("E_5_0", "0_7_1", 10**400),)}, "the weight 1000"),
    "one link twice": (
        {"links": (("E_5_0", "0_7_1", 1.0), ("E_5_0", "0_7_1", 2.0))},
        "link 1 joins 'E_5_0' and '0_7_1' again",
    ),
    "a layer that the id denies": ({"nodes": node(layer="1")}, "its id says otherwise"),
    "a position that the id denies": ({"nodes": node(position=0)}, "its id says otherwise"),
    "a position that the id of a token denies": (
        {"nodes": node(id="E_5_1", layer="E", position=0, type=EMBEDDING)},
        "its id says otherwise",
    ),
    "a token that the id of a logit denies": (
        {"nodes": node(id="3_8_1", layer="3", feature=9, type=LOGIT)},
        "is of token 9, and its id says otherwise",
    ),
    "a feature without a layer": (
        {"nodes": node(id="mine", layer="first")},
        "the layer of a cross layer transcoder is 'first'",
    ),
    "a layer in other digits": ({"nodes": node(id="mine", layer="\u00b2")}, "the layer of a"),
    "a probability above one": ({"nodes": node(id="x", probability=1.1)}, r"1.1, outside \[0, 1"),
    "a probability below zero": ({"nodes": node(id="x", probability=-0.1)}, "outside"),
    "a label that is no text": ({"nodes": node(label="\ud800")}, "'clerp' holds a lone surrogate"),
    "a token that is no text": ({"tokens": ("The", "\udfff")}, "holds a lone surrogate"),
    "a supernode that is no list": ({"supernodes": [["ab", 3]]}, "a supernode must be a list"),
    "a slug of words": ({"slug": "my graph"}, "letters, digits"),
    "an activation that is none": ({"nodes": node(activation=float("inf"))}, "not a number"),
    "an activation that is too large": ({"nodes": node(activation=10**400)}, "not a number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_graphs_are_refused_and_nothing_is_written(case, tmp_path):
    changes, words = BAD[case]
    with pytest.raises(InputError, match=words):
        write_graph(tmp_path / "graph.json", graph(**changes))
    assert not (tmp_path / "graph.json").exists()


def test_malformed_files_are_refused(tmp_path):
    path = write_graph(tmp_path / "graph.json", graph())
    data = json.loads(path.read_text())
    for key in ("metadata", "nodes", "links", "qParams"):
        short = {name: entry for name, entry in data.items() if name != key}
        path.write_text(json.dumps(short))
        with pytest.raises(InputError, match=f"no '{key}'"):
            read_graph(path)
    for value in (True, "7", -3, None):
        data["nodes"][1]["feature"] = value
        path.write_text(json.dumps(data))
        with pytest.raises(InputError, match="not a number from 0 on"):
            read_graph(path)
    path.write_text("[]")
    with pytest.raises(InputError, match="no 'metadata'"):
        read_graph(path)


def test_numbers_of_thousands_of_digits_in_ids_are_taken_as_names(tmp_path):
    path = write_graph(tmp_path / "graph.json", graph())
    data = json.loads(path.read_text())
    long = "9" * 5000
    for name in (f"0_{long}_1", f"0_7_{long}", f"{long}_7_1"):
        data["nodes"][1]["node_id"] = data["links"][0]["target"] = name
        data["links"][1]["source"] = name
        path.write_text(json.dumps(data))
        found = read_graph(path).nodes[1]
        assert (found.id, found.depth, found.feature) == (name, 0, 7)
    data["nodes"][1]["layer"] = long
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="the layer of a cross layer transcoder is '999"):
        read_graph(path)


def test_values_as_deep_as_json_goes_are_named(tmp_path):
    path = write_graph(tmp_path / "graph.json", graph())
    text = path.read_text()
    deep = "[" * 900 + "]" * 900
    for key in ('"clerp": "plural"', '"activation": 1.5', '"ctx_idx": 1', '"weight": 0.5'):
        assert key in text
        path.write_text(text.replace(key, f"{key.partition(':')[0]}: {deep}", 1))
        with pytest.raises(InputError, match=r"of another type|not a number"):
            read_graph(path)


def test_an_index_without_a_pairing_stands_as_it_is(tmp_path):
    path = write_graph(tmp_path / "graph.json", graph())
    data = json.loads(path.read_text())
    data["nodes"][1] |= {"node_id": "mine", "feature": 11}
    data["links"] = []
    path.write_text(json.dumps(data))
    layer, index = unpair(11)
    assert layer != 0
    assert read_graph(path).nodes[1].feature == 11
    data["nodes"][1]["layer"] = str(layer)
    path.write_text(json.dumps(data))
    assert read_graph(path).nodes[1].feature == index
