"""The prompt graph study end to end on a model and transcoders of a user's own."""

from __future__ import annotations

import json

import jsonschema
import pytest
from cases import random_dictionary
from command_line import command
from graph_schema import SCHEMA

from assay.dictionaries import Placed
from assay.dictionaries.save import save_circuit_tracer
from assay.io.attribution_graphs import read_graph
from assay.io.runs import opened
from assay.targets.agreement import build_model, build_tokenizer
from assay.targets.language import save_language_model

pytestmark = pytest.mark.slow

PROMPT = "The bear near the camels"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = build_tokenizer()
    shape = {"layers": 2, "width": 16, "heads": 2, "context": 16, "seed": 0}
    model = build_model(len(tokenizer), **shape)
    save_language_model(folder / "model", model, tokenizer)
    placed = {}
    for layer in range(2):
        made = random_dictionary(16, 24, layer, d_out=16 * (2 - layer))
        made.b_dec.data[16:] = 0
        writes = tuple(f"blocks.{later}.hook_mlp_out" for later in range(layer, 2))
        placed[str(layer)] = Placed(made.float(), f"blocks.{layer}.hook_resid_mid", writes)
    save_circuit_tracer(folder / "transcoders", placed)
    return folder


def overrides(inputs, *more):
    given = [
        f"target.path={inputs / 'model'}",
        f"dictionaries.path={inputs / 'transcoders'}",
        f"prompt={PROMPT}",
        "graph.exact=12",
        "graph.logits=3",
        *more,
    ]
    return [word for entry in given for word in ("--set", entry)]


def test_a_run_ends_with_files_report_and_what_holds(inputs, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    code, out = command(
        monkeypatch, capsys, "run", "prompt-graph", "-o", folder, "--json", *overrides(inputs)
    )
    assert code == 0, out.err
    summary = json.loads(out.out)
    assert 0 < summary["scores"]["replacement"] < summary["scores"]["completeness"] < 1
    assert len(summary["logits"]) == summary["nodes"]["logits"] == 3
    assert summary["tokens"] == [".", *PROMPT.split()]  # behind a token of its own
    run = opened(folder)
    jsonschema.validate(json.loads((folder / "graph.json").read_text()), SCHEMA)
    graph = read_graph(folder / "graph.json")
    assert (folder / "graph.graphml").stat().st_size > 1000
    nodes, edges = run.table("nodes.parquet"), run.table("edges.parquet")
    assert len(graph.nodes) == nodes.height == summary["kept"]["nodes"]
    assert len(graph.links) == edges.height == summary["kept"]["edges"]
    assert run.table("exact.parquet").height == 12 * 3
    assert nodes["exact"].drop_nulls().len() > 5
    whole = next(row for row in summary["agreement"] if row["kind"] == "all")
    assert whole["n"] == 36
    page = (folder / "report.html").read_text()
    assert "What holds in the network?" in page
    code, out = command(
        monkeypatch, capsys, "run", "prompt-graph", "-o", folder, "--resume", "--json"
    )
    assert code == 0
    assert json.loads(out.out)["scores"] == summary["scores"]


def test_bad_input_is_one_line_and_leaves_nothing(inputs, tmp_path, monkeypatch, capsys):
    for more, words in (
        (["dictionaries.path=nowhere"], "no folder 'nowhere' of dictionaries"),
        (["prompt=''"], "prompt"),
        (["graph.probability=0"], "graph.probability must be above 0"),
        (["graph.first=40"], "nothing to attribute"),
    ):
        folder = tmp_path / "run"
        code, out = command(
            monkeypatch, capsys, "run", "prompt-graph", "-o", folder, *overrides(inputs, *more)
        )
        assert code == 2
        assert words in out.err
        assert not folder.exists()
    code, out = command(monkeypatch, capsys, "run", "prompt-graph", "-o", tmp_path / "run")
    assert code == 2
    assert "your own model, transcoders and prompt" in out.err
