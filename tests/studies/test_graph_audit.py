"""Graph files of other tools are measured: what is right in them holds, what is wrong does not, and
a graph of something else is refused by name.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import replace
from html import unescape

import node_models
import polars as pl
import pytest
import torch
from cases import random_dictionary

from assay import cli
from assay.attribution import ablate
from assay.audit.claims import judge
from assay.cli.printing import print_lines, print_table, print_tables
from assay.core.target import Target
from assay.dictionaries import Placed
from assay.dictionaries.save import save_circuit_tracer
from assay.edges import edges, exact_edges
from assay.edges.wiring import wire
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
    read_graph,
    write_graph,
)
from assay.io.circuits import write_circuit
from assay.io.runs import opened
from assay.mechanisms.features import features
from assay.studies.graph_audit import audit_graph
from assay.studies.graph_audit.page import page, survivors
from assay.targets.load import LanguageTarget
from assay.targets.metrics import logit_difference

IDS = [3, 14, 15, 9, 26]
TOKEN = 7


def network() -> LanguageTarget:
    return LanguageTarget(node_models.build("gpt2"), logit_difference)


def transcoders(crossing: bool = False, layers: int = 3) -> dict[str, Placed]:
    found = {}
    for layer in range(layers):
        last = 3 if crossing else layer + 1
        writes = tuple(f"blocks.{later}.hook_mlp_out" for later in range(layer, last))
        made = random_dictionary(16, 12, layer, d_out=16 * len(writes), skip=0 if crossing else 16)
        found[str(layer)] = Placed(made.double(), f"blocks.{layer}.mlp.hook_in", writes)
    return found


def whole_graph(dictionaries) -> AttributionGraph:
    """Return a graph of everything that is active, with weights of one."""
    target = network()
    found = features(target, dictionaries, batch(), None, "zero")
    nodes = [
        GraphNode(f"E_{one}_{place}", "E", place, place, EMBEDDING) for place, one in enumerate(IDS)
    ]
    for layer in range(3):
        norms = found.norms()[str(layer)].to_dense()[0]
        codes = dictionaries[str(layer)].dictionary.encode(read(target, layer))[0].detach()
        for place, feature in (norms > 0).nonzero().tolist():
            if place:
                name = feature_id(layer, feature, place)
                strength = float(codes[place, feature])
                nodes.append(
                    GraphNode(name, str(layer), feature, place, FEATURE, activation=strength)
                )
        nodes += [
            GraphNode(error_id(f"m{layer}", place), str(layer), None, place, ERROR)
            for place in range(1, 5)
        ]
    with torch.no_grad():
        odds = target.model(input_ids=torch.tensor([IDS])).logits[0, -1].softmax(-1)
    probability = float(odds[TOKEN])
    logit = GraphNode(f"4_{TOKEN}_4", "4", TOKEN, 4, LOGIT, probability=probability)
    links = []
    for source in nodes:
        links.append((source.id, logit.id, 1.0))
        links += [
            (source.id, receiver.id, 1.0)
            for receiver in nodes
            if receiver.type == FEATURE and before(source, receiver)
        ]
    return AttributionGraph(
        "one",
        "mine",
        "A b c, d e",
        ("A", " b", " c,", "\u0120d", "\u2581e"),
        (*nodes, logit),
        tuple(links),
    )


def before(source: GraphNode, receiver: GraphNode) -> bool:
    depth = -1 if source.layer == "E" else int(source.layer)
    return depth < int(receiver.layer) and source.position <= receiver.position


def batch():
    from assay.core.target import Batch

    ids = torch.tensor([IDS])
    return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def read(target, layer):
    from assay.core.sites import read_sites
    from assay.targets.names import resolve

    site = resolve(target.model, f"blocks.{layer}.mlp.hook_in").site
    return read_sites(target.model, batch().inputs, [site])[site].value


def demeaned(output, given):
    logits = output.logits[:, 4]
    return logits[:, TOKEN] - logits.mean(-1)


@pytest.mark.parametrize("crossing", [False, True])
def test_node_effects_are_ablations_and_right_claims_hold(tmp_path, crossing):
    dictionaries = transcoders(crossing)
    path = write_graph(tmp_path / "graph.json", whole_graph(dictionaries))
    found = audit_graph(path, network(), dictionaries)
    bound = features(Target(network().model, demeaned), dictionaries, batch(), None, "zero")
    rows = found.nodes.table.filter(found.nodes.table["type"] == FEATURE)
    assert rows.height > 20
    for row in rows.iter_rows(named=True):
        layer, feature, place = map(int, row["node"].split("_"))
        expected = ablate(bound, str(layer), torch.tensor([[place, feature]]), general=True)
        assert row["exact"] == pytest.approx(float(expected), rel=1e-7, abs=1e-10)
    for row in found.nodes.table.filter(found.nodes.table["type"] == ERROR).iter_rows(named=True):
        layer, place = int(row["layer"]), row["position"]
        name = next(error for site, error in bound.errors.items() if f".{layer}." in site)
        expected = ablate(bound, name, torch.tensor([[place]]), general=True)
        assert row["exact"] == pytest.approx(float(expected), rel=1e-7, abs=1e-10)
    # The file again, with what was measured as its weights: every edge holds.
    exact = {
        (row["source"], row["receiver"]): row["exact"]
        for row in found.edges.table.iter_rows(named=True)
    }
    assert found.edges.summary()["hold"] < 25
    graph = read_graph(path)
    links = [(source, receiver, exact[source, receiver]) for source, receiver, _ in graph.links]
    right = write_graph(tmp_path / "right.json", replace(graph, links=tuple(links)))
    again = audit_graph(right, network(), dictionaries)
    summary = again.edges.summary()
    assert summary["hold"] == summary["listed"] == 50
    assert summary["agreement"]["slope"] == pytest.approx(1)
    wrong = [(*link[:2], -link[2]) for link in links]
    last = audit_graph(
        write_graph(tmp_path / "wrong.json", replace(graph, links=tuple(wrong))),
        network(),
        dictionaries,
    )
    assert last.edges.summary()["hold"] == 0
    assert last.edges.summary()["agreement"]["pearson"] == pytest.approx(-1)


def test_a_sample_gives_the_rest_their_bars(tmp_path, monkeypatch):
    judged = []

    def kept(table, **options):
        judged.append(table)
        return judge(table, **options)

    monkeypatch.setattr("assay.studies.graph_audit.audit.judge", kept)
    dictionaries = transcoders()
    path = write_graph(tmp_path / "graph.json", whole_graph(dictionaries))
    found = audit_graph(path, network(), dictionaries, top=5, exact=40)
    whole = audit_graph(path, network(), dictionaries, top=5)
    assert found.about["nodes_removed"] == 40
    nodes, links = judged[:2]
    for table in (nodes, links):
        ranks = table.filter(pl.col("stratum").is_not_null())
        assert ranks["stratum"].n_unique() > 1
        assert set(ranks.filter(~pl.col("exact").is_null())["stratum"]) == set(ranks["stratum"])
    assert nodes["stratum"].drop_nulls().is_sorted()
    for part, all_of_it in ((found.nodes, whole.nodes), (found.edges, whole.edges)):
        exact, bars = part.table["exact"], part.table["bar"]
        assert exact.head(5).null_count() == 0
        assert exact.null_count() > 0
        assert (bars.filter(exact.is_null()) > 0).all()
        assert set(bars.filter(exact.is_not_null())) == {0.0}
        claimed = all_of_it.table["claimed"]
        covered = (all_of_it.table["exact"] - claimed).abs() <= bars.fill_null(0)
        assert covered.filter(exact.is_null()).mean() > 0.75
    assert found.edges.table["exact"].to_list()[:5] == pytest.approx(
        whole.edges.table["exact"].to_list()[:5]
    )


@pytest.mark.slow
def test_circuits_over_heads_are_patched(tmp_path):
    target = Target(node_models.build("gpt2"), logit_difference)
    clean, patch = (side.take(slice(0, 2)) for side in node_models.batches())
    scores = edges(target, clean, patch)
    exact = exact_edges(target, clean, patch)
    keep = scores.keep_top(0.2)
    circuit = scores.graph.to_circuit(exact.mean(), keep)
    path = write_circuit(tmp_path / "circuit.json", circuit)
    found = audit_graph(path, target, pairs=(clean, patch), top=20, exact=60)
    table = found.edges.table.filter(found.edges.table["exact"].is_not_null())
    assert table.height == 60
    assert table["exact"].to_list() == pytest.approx(table["claimed"].to_list(), abs=1e-9)
    assert found.edges.summary()["hold"] == 20
    nodes = {row["node"]: row["exact"] for row in found.nodes.table.iter_rows(named=True)}
    from assay.mechanisms.nodes import nodes as bind

    bound = bind(target, clean, patch, ["blocks.1.hook_mlp_out"])
    gates = {"blocks.1.hook_mlp_out": torch.zeros(bound.group("blocks.1.hook_mlp_out").shape)}
    with torch.no_grad():
        expected = (bound.values(gates) - bound.values()).mean()
    assert nodes["m1"] == pytest.approx(float(expected), abs=1e-9)
    spots, lines = survivors(found.nodes.table, found.edges.table, 20)
    places = {row["name"]: (row["x"], row["y"]) for row in spots.to_dicts()}
    assert set(lines["receiver"]) <= set(places)
    expected_places = {"a2.h1": (1, 2), "m1": (-1, 1.5), "input": (0, -1), "logits": (0, 3.5)}
    assert {name: places[name] for name in expected_places if name in places} == {
        name: place for name, place in expected_places.items() if name in places
    }
    assert len(set(expected_places) & set(places)) > 1
    assert "head (MLPs at -1)" in page(found.summary(), found.nodes.table, found.edges.table, [])
    with pytest.raises(InputError, match="give them with --pairs"):
        audit_graph(path, target)
    data = json.loads(path.read_text())
    data["cfg"]["n_layers"] = 12
    data.pop("assay-sha256")
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="another model: it has 12 layers, and the model 3"):
        audit_graph(path, target, pairs=(clean, patch))
    data["cfg"]["n_layers"] = 3
    huge = {name: dict(entry, score=1e308) for name, entry in data["edges"].items()}
    path.write_text(json.dumps({**data, "edges": huge}))
    with pytest.raises(InputError, match="edges of 'input' add up to inf"):
        audit_graph(path, target, pairs=(clean, patch))
    for name in ("a0.h07", "a9.h0", "m3"):
        more = {**data["nodes"], name: {"in_graph": True}}
        path.write_text(json.dumps({**data, "nodes": more}))
        with pytest.raises(InputError, match=f"unknown node '{name}'"):
            audit_graph(path, target, pairs=(clean, patch))
    path.write_text(json.dumps({**data, "nodes": {**more, "a\u0663.h0": {"in_graph": True}}}))
    with pytest.raises(InputError, match="is not the name of a node"):
        audit_graph(path, target, pairs=(clean, patch))
    data["edges"][next(iter(data["edges"]))]["score"] = float("nan")
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="is nan, not a number"):
        audit_graph(path, target, pairs=(clean, patch))


def change(graph: AttributionGraph, place: int, **fields) -> AttributionGraph:
    nodes = list(graph.nodes)
    nodes[place] = replace(nodes[place], **fields)
    return replace(graph, nodes=tuple(nodes), links=())


def other_logit(graph, **fields):
    return change(graph, len(graph.nodes) - 1, **fields)


BAD = {
    "another depth": (lambda g: change(g, 6, id="9_1_1", layer="9"), "has 3 layers, 0 to 2"),
    "logits elsewhere": (
        lambda g: other_logit(g, id="logit", layer="13"),
        "its logits are in layer 13",
    ),
    "a logit in the middle": (
        lambda g: other_logit(g, id="4_7_2", position=2),
        "logits behind the last one alone",
    ),
    "vocabulary": (
        lambda g: other_logit(g, id="4_99_4", feature=99),
        "is of token 99, and the model has 31",
    ),
    "a prompt of other words": (
        lambda g: replace(g, prompt="A b c, d f"),
        "contradicts itself: its prompt is 'A b c, d f', and its tokens make",
    ),
    "a prompt of more words": (lambda g: replace(g, prompt="A b c, d e f"), "contradicts itself"),
    "two tokens at one position": (
        lambda g: change(g, 1, id="E_5_0", position=0),
        "'E_3_0' and 'E_5_0' are the same embedding at position 0",
    ),
    "one part twice": (
        lambda g: replace(g, nodes=(*g.nodes, replace(g.nodes[6], id="again"))),
        "'0_.*' and 'again' are the same cross layer transcoder at position 1",
    ),
    "vocabulary of a token": (
        lambda g: change(g, 0, id="E_50256_0"),
        "is of token 50256, and the model has 31 tokens",
    ),
    "no logit": (lambda g: other_logit(g, id="mine", type=EMBEDDING), "has no logit"),
    "feature too large": (
        lambda g: change(g, 6, id="0_900_1", feature=900),
        "feature 900 of layer 0, and the dictionary there has 12 features",
    ),
    "an error elsewhere": (lambda g: change(g, 6, type=ERROR, layer="E"), "where no dictionary"),
    "an edge into what reads nothing": (
        lambda g: replace(g, links=((g.nodes[6].id, g.nodes[0].id, 1.0),)),
        "ends at 'E_3_0', which is an embedding and reads nothing",
    ),
    "an edge out of a logit": (
        lambda g: replace(g, links=((g.nodes[-1].id, g.nodes[6].id, 1.0),)),
        "which is a logit",
    ),
    "no links": (lambda g: replace(g, links=()), "there is nothing that it claims"),
    "missing tokens": (lambda g: replace(g, nodes=g.nodes[1:], links=()), "no tokenizer beside"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_graphs_of_something_else_are_refused_by_name(tmp_path, case):
    alter, words = BAD[case]
    dictionaries = transcoders()
    path = write_graph(tmp_path / "graph.json", alter(whole_graph(dictionaries)))
    with pytest.raises(InputError, match=words):
        audit_graph(path, network(), dictionaries)


def test_the_picture_shows_what_survives_of_the_listed(tmp_path):
    dictionaries = transcoders()
    path = write_graph(tmp_path / "graph.json", whole_graph(dictionaries))
    found = audit_graph(path, network(), dictionaries, top=30, exact=60)
    spots, lines = survivors(found.nodes.table, found.edges.table, 30)
    alive = {row["node"]: row for row in found.nodes.table.head(30).to_dicts() if row["survives"]}
    first = [row for row in found.edges.table.head(30).to_dicts() if row["survives"]]
    assert lines.rows() == [(row["source"], row["receiver"], row["exact"]) for row in first]
    drawn = {row["name"]: row for row in spots.to_dicts()}
    assert set(drawn) == set(alive) | {end for line in lines.rows() for end in line[:2]}
    for name, row in alive.items():
        layer = -1 if row["layer"] == "E" else int(row["layer"])
        assert (drawn[name]["x"], drawn[name]["y"]) == (row["position"], layer)
        assert drawn[name]["value"] == row["exact"]
    spots, _ = survivors(found.nodes.table, found.edges.table, 5000)
    drawn = {row["name"]: row for row in spots.to_dicts()}
    logit = f"4_{TOKEN}_4"
    assert (drawn[logit]["x"], drawn[logit]["y"], drawn[logit]["value"]) == (4, 3, 0)
    summary = {**found.summary(), "differences": "all of them"}
    html = page(summary, found.nodes.table, found.edges.table, [])
    for words in ("that were not measured", "What survives", "differ from the model&#x27;s: all"):
        assert words in html


def altered(graph: AttributionGraph, change_) -> AttributionGraph:
    nodes = [change_(node) if node.type == FEATURE else node for node in graph.nodes]
    return replace(graph, nodes=tuple(nodes))


def test_stated_numbers_are_compared_with_the_models_own(tmp_path):
    dictionaries, graph = transcoders(), whole_graph(transcoders())
    features = [node for node in graph.nodes if node.type == FEATURE]
    first = features[0]

    def audited(changed):
        path = tmp_path / "graph.json"
        path.unlink(missing_ok=True)
        return audit_graph(write_graph(path, changed), network(), dictionaries)

    right = audited(graph)
    assert right.about["activations_compared"] == len(features)
    assert right.about["activations_that_differ"] == 0
    assert right.about["largest_activation_difference"] < 1e-12
    assert right.about["largest_probability_difference"] < 1e-12
    assert right.about["differences"] is None
    assert len(right.sentences()) == 2

    def triple(node):
        return replace(node, activation=3 * node.activation) if node.id == first.id else node

    one = audited(altered(graph, triple))
    assert one.about["activations_that_differ"] == 1
    assert one.about["largest_activation_difference"] == pytest.approx(2 / 3)
    assert one.sentences()[2] == (
        f"1 of {len(features)} stated activations differ from the model's own by more than 10%,"
        f" most that of {first.id} (stated {3 * first.activation:.4g}, here"
        f" {first.activation:.4g}): the graph was made in another precision, or was changed"
    )
    within = audited(altered(graph, lambda node: replace(node, activation=1.05 * node.activation)))
    assert within.about["activations_that_differ"] == 0
    assert within.about["largest_activation_difference"] == pytest.approx(1 / 21)
    layer = audited(
        altered(
            graph,
            lambda node: replace(node, activation=-node.activation) if node.layer == "2" else node,
        )
    )
    assert layer.about["activations_that_differ"] == sum(node.layer == "2" for node in features)
    assert layer.sentences()[2].endswith("give the graph's own dictionaries of layer 2")
    # An activation that is not stated is that of an active feature.
    silent = audited(altered(graph, lambda node: replace(node, activation=None)))
    assert silent.about["largest_activation_difference"] == 0


def test_the_likely_cause_is_the_model_where_probabilities_differ(tmp_path):
    dictionaries, graph = transcoders(), whole_graph(transcoders())
    own = graph.nodes[-1].probability
    off = write_graph(tmp_path / "off.json", other_odds(graph, own + 0.03))
    found = audit_graph(off, network(), dictionaries)
    assert found.about["largest_probability_difference"] == pytest.approx(0.03)
    assert found.sentences()[2] == (
        "the probabilities of tokens differ by up to 0.030: the model has other weights than the"
        " graph's, or reads another prompt"
    )
    close = write_graph(tmp_path / "close.json", other_odds(graph, own + 0.01))
    assert audit_graph(close, network(), dictionaries).about["differences"] is None
    for odds, cause in (
        (own + 0.5, "and the probabilities .* the model has other weights"),
        (own, "most that of .*: the dictionaries are others than the graph's"),
        (0.0, "the model is another one, or the dictionaries are others"),
    ):
        changed = altered(other_odds(graph, odds), lambda node: replace(node, activation=99.0))
        (tmp_path / "graph.json").unlink(missing_ok=True)
        path = write_graph(tmp_path / "graph.json", changed)
        with pytest.raises(InputError, match=f"does not fit: .* activations differ .*{cause}"):
            audit_graph(path, network(), dictionaries)


def other_odds(graph: AttributionGraph, odds: float) -> AttributionGraph:
    return replace(graph, nodes=(*graph.nodes[:-1], replace(graph.nodes[-1], probability=odds)))


def test_damaged_files_are_refused(tmp_path):
    dictionaries = transcoders()
    path = write_graph(tmp_path / "graph.json", whole_graph(dictionaries))
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(InputError, match="is not JSON"):
        audit_graph(path, network(), dictionaries)
    path.write_text(text.replace('"weight": 1.0', '"weight": NaN', 1))
    with pytest.raises(InputError, match="has the weight nan"):
        audit_graph(path, network(), dictionaries)


def test_dictionaries_that_do_not_fit_are_refused(tmp_path):
    dictionaries = transcoders()
    graph = whole_graph(dictionaries)
    path = write_graph(tmp_path / "graph.json", graph)

    def refused(others, words):
        with pytest.raises(InputError, match=words):
            audit_graph(path, network(), others)

    refused({}, "features of layer 0, and there are dictionaries of none")
    refused({"0": dictionaries["0"]}, r"features of layer 1, .* those of layers \[0\]")
    moved = {name: replace(placed) for name, placed in dictionaries.items()}
    moved["0"] = Placed(random_dictionary(16, 12, 9, d_out=16).double(), *places(dictionaries["0"]))
    moved["1"] = Placed(random_dictionary(16, 12, 8, d_out=16).double(), *places(dictionaries["1"]))
    words = "does not fit: .* stated activations differ .* dictionaries of layers 0, 1"
    refused(moved, words)
    site = "blocks.0.hook_mlp_out"
    own = Placed(random_dictionary(16, 12).double(), site, (site,))
    refused({"0": own}, "writes where it reads")
    twice = {**dictionaries, "more": dictionaries["0"]}
    refused(twice, "two dictionaries read in layer 0")
    gated = random_dictionary(16, 12, name="gated", d_out=16).double()
    refused({"0": Placed(gated, *places(dictionaries["0"]))}, "is a gated dictionary")
    narrow = random_dictionary(16, 12, d_out=8).double()
    refused({**dictionaries, "0": Placed(narrow, *places(dictionaries["0"]))}, "values of width")


def places(placed: Placed) -> tuple[str, tuple[str, ...]]:
    return placed.reads, placed.writes


def run(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["assay", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    printed = capsys.readouterr()
    return int(stopped.value.code or 0), printed.out, printed.err


@pytest.mark.slow
def test_the_verb_audits_a_file_and_writes_only_where_it_is_asked(tmp_path, monkeypatch, capsys):
    dictionaries = {
        name: Placed(placed.dictionary.float(), *places(placed))
        for name, placed in transcoders().items()
    }
    path = write_graph(tmp_path / "graph.json", whole_graph(transcoders()))
    save_circuit_tracer(tmp_path / "own", dictionaries, model_name="gpt2", scan="me/mine")
    model = node_models.folder("gpt2").name
    words = ["audit", path, "--target", model, "--dictionaries", tmp_path / "own"]
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(monkeypatch, capsys, *words, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["of_nodes"]["listed"] == 50
    assert len(found["edges"]) > 100
    assert "of the top 50 nodes hold exactly" in found["verdict_nodes"]
    assert sorted(tmp_path.rglob("*")) == before
    code, out, err = run(monkeypatch, capsys, *words, "-o", tmp_path / "report", "--top", "10")
    assert code == 0, err
    assert "of the top 10 edges hold exactly" in out
    html = (tmp_path / "report" / "report.html").read_text()
    for words_ in ("claims against exact effects", "What survives", "How this was made"):
        assert words_ in html
    line = unescape(re.search(r"Run again with: (assay audit .*?)</p>", html)[1])
    assert shlex.split(line)[1:] == [
        *(str(word) for word in words),
        *("--top", "10", "--exact", "2000", "--within", "0.25", "--alpha", "0.1", "--seed", "0"),
        *("-o", "NEW_FOLDER"),
    ]
    (tmp_path / "report" / "report.html").unlink()
    code, out, err = run(monkeypatch, capsys, "report", tmp_path / "report", "--json")
    assert code == 0, err
    assert json.loads(out)["report"] == str(tmp_path / "report" / "report.html")
    assert (tmp_path / "report" / "report.html").read_text() == html
    code, _, err = run(monkeypatch, capsys, "attribute", tmp_path / "report")
    assert (code, "is no run of a recipe" in err) == (2, True)
    assert opened(tmp_path / "report").table("nodes.parquet").height > 10
    for more, message in (
        (["-o", tmp_path / "report"], "already exists"),
        (["--method", "exact"], "belong to the folder of a run"),
        (["--within", "0"], "--within must be above 0 and finite, got 0.0"),
    ):
        code, _, err = run(monkeypatch, capsys, *words, *more)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1
    code, _, err = run(monkeypatch, capsys, "audit", path)
    assert (code, "give the model with --target" in err) == (2, True)
    code, _, err = run(monkeypatch, capsys, "audit", tmp_path / "own", "--pairs", path)
    assert code == 2


def test_text_of_a_file_moves_no_cursor(tmp_path, monkeypatch, capsys):
    """Labels, prompts and names of files stand in the terminal as text, whatever they hold."""
    evil = "\x1b[31m\x07\u202e a\nb"
    print_tables({"prompt": evil, "rows": [{"label": evil}], evil: 1}, False)
    print_table({"output": evil}, pl.DataFrame({"part": [evil], "n": [0.5]}), False)
    print_lines([f"violated: {evil}", "two"])
    out = capsys.readouterr().out
    code, _, err = run(monkeypatch, capsys, "audit", tmp_path / f"{evil}.json", "--target", "m")
    assert code == 2
    assert err.count("\n") == 1
    for letter in "\x1b\x07\u202e":
        assert letter not in out + err
    assert out.count("\\x1b[31m\\x07\\u202e a\\nb") == 6


@pytest.mark.slow
def test_what_belongs_to_another_kind_of_graph_is_refused(tmp_path):
    dictionaries, pairs = transcoders(), node_models.batches()
    path = write_graph(tmp_path / "graph.json", whole_graph(dictionaries))
    with pytest.raises(InputError, match="takes no --pairs"):
        audit_graph(path, network(), dictionaries, pairs)
    graph = wire(network().model).graph
    circuit = graph.to_circuit(torch.ones(graph.mask.shape), graph.mask)
    path = write_circuit(tmp_path / "circuit.json", circuit)
    with pytest.raises(InputError, match="takes no --dictionaries"):
        audit_graph(path, network(), dictionaries, pairs)
