"""Circuit files: EAP-IG JSON there and back, GraphML for other programs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.edges.graph import EdgeGraph, from_circuit
from assay.errors import InputError
from assay.io.circuits import edge_ends, read_circuit, write_circuit, write_graphml


def example(seed: int = 0):
    graph = EdgeGraph(2, 3, 8)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(graph.mask.shape, generator=generator, dtype=torch.float64) * graph.mask
    keep = (torch.rand(graph.mask.shape, generator=generator) < 0.3) & graph.mask
    return graph, scores, keep


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_json_comes_back_bit_for_bit(tmp_path_factory, layers, heads, parallel, seed):
    graph = EdgeGraph(layers, heads, 8, parallel)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(graph.mask.shape, generator=generator, dtype=torch.float64)
    keep = (torch.rand(graph.mask.shape, generator=generator) < 0.5) & graph.mask
    path = tmp_path_factory.mktemp("circuit") / "circuit.json"
    write_circuit(path, graph.to_circuit(scores, keep, {"m0": 0.25}))
    found, back, kept = from_circuit(read_circuit(path))
    assert found == graph
    assert torch.equal(back[graph.mask], scores[graph.mask])
    assert torch.isnan(back[~graph.mask]).all()
    assert torch.equal(kept, keep)
    assert read_circuit(path).nodes["m0"].score == 0.25


def test_the_file_has_the_fields_that_other_programs_read(tmp_path: Path):
    graph, scores, keep = example()
    data = json.loads(
        write_circuit(tmp_path / "circuit.json", graph.to_circuit(scores, keep)).read_text()
    )
    assert data["cfg"] == {"n_layers": 2, "n_heads": 3, "parallel_attn_mlp": False, "d_model": 8}
    assert list(data["nodes"])[:5] == ["input", "a0.h0", "a0.h1", "a0.h2", "m0"]
    assert data["nodes"]["logits"] == {"in_graph": bool(keep[:, -1].any())}
    place = graph.place("a0.h1->m1")
    assert data["edges"]["a0.h1->m1"] == {
        "score": float(scores[place]),
        "in_graph": bool(keep[place]),
    }
    assert len(data["edges"]) == graph.edges


def test_graphml_holds_the_circuit_or_the_whole_graph(tmp_path: Path):
    graph, scores, keep = example()
    circuit = graph.to_circuit(scores, keep)
    space = {"g": "http://graphml.graphdrawing.org/xmlns"}
    root = ElementTree.parse(write_graphml(tmp_path / "circuit.graphml", circuit)).getroot()
    keys = {key.get("id") for key in root.findall("g:key", space)}
    edges = root.findall("g:graph/g:edge", space)
    assert {edge.get("id") for edge in edges} == {
        name for name, entry in circuit.edges.items() if entry.in_graph
    }
    nodes = {node.get("id") for node in root.findall("g:graph/g:node", space)}
    for edge in edges:
        assert {edge.get("source"), edge.get("target")} <= nodes
        data = {entry.get("key"): entry.text for entry in edge.findall("g:data", space)}
        assert set(data) <= keys
        assert float(data["edge_score"]) == circuit.edges[edge.get("id")].score
        assert data.get("edge_slot", "") == edge_ends(edge.get("id"))[2]
    whole = ElementTree.parse(
        write_graphml(tmp_path / "whole.graphml", circuit, whole=True)
    ).getroot()
    assert len(whole.findall("g:graph/g:edge", space)) == graph.edges


def refused(tmp_path: Path, change, match: str):
    graph, scores, keep = example()
    data = json.loads(
        write_circuit(tmp_path / "circuit.json", graph.to_circuit(scores, keep)).read_text()
    )
    del data["assay-sha256"]
    change(data)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=match):
        from_circuit(read_circuit(path))


def test_malformed_files_are_refused_by_name(tmp_path: Path):
    refused(tmp_path, lambda data: data.pop("cfg"), "no 'cfg'")
    refused(tmp_path, lambda data: data["cfg"].update(n_layers="2"), "'n_layers' must be int")
    refused(tmp_path, lambda data: data["cfg"].update(n_heads=-1), "'n_heads' must be int")
    for huge in ({"n_heads": 10**30}, {"n_layers": 10**9}):
        refused(
            tmp_path, lambda data, huge=huge: data["cfg"].update(huge), "heads and MLPs are read"
        )
    refused(
        tmp_path,
        lambda data: data["edges"].update({"m9": {"in_graph": True}}),
        "'m9' is not the name",
    )
    refused(
        tmp_path,
        lambda data: data["edges"].update({"m0->m9": {"in_graph": True}}),
        "'m9', which is not among",
    )
    refused(
        tmp_path,
        lambda data: data["edges"].update({"m0->m1": {"in_graph": 1}}),
        "boolean 'in_graph'",
    )
    refused(
        tmp_path,
        lambda data: data["edges"].update({"m0->m1": {"in_graph": True, "score": "2"}}),
        "must be a number",
    )
    refused(
        tmp_path, lambda data: data["edges"].update({"m1->m0": {"in_graph": True}}), "unknown edge"
    )
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(InputError, match="JSON object expected"):
        read_circuit(tmp_path / "list.json")
    with pytest.raises(InputError, match="no file"):
        read_circuit(tmp_path / "none.json")


def test_a_flipped_byte_is_named_or_harmless(tmp_path: Path):
    graph, scores, keep = example()
    whole = write_circuit(tmp_path / "circuit.json", graph.to_circuit(scores, keep))
    data, circuit = whole.read_bytes(), read_circuit(whole)
    path, named, harmless = tmp_path / "flipped.json", 0, 0
    places = range(0, len(data), 7)
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        try:
            found = read_circuit(path)
        except InputError as error:
            named += str(path) in str(error)
            continue
        assert found == circuit
        harmless += 1
    assert named + harmless == len(places)
    assert named > harmless
