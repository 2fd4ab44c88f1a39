"""The features study end to end: our model, a user's model with its neurons or saved dictionaries,
the dry run, kills, and bad input.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import polars as pl
import pytest
import torch
from campaign import without_clocks
from command_line import command
from polars.testing import assert_frame_equal

from assay.attribution import Exact, attribute
from assay.core.values import dense
from assay.dictionaries import Placed, architecture
from assay.dictionaries.labels import Context
from assay.dictionaries.save import save_dictionaries
from assay.io.attribution_graphs import read_graph
from assay.io.runs import opened
from assay.io.supernodes import read_supernodes
from assay.studies import recipes, runner
from assay.studies.features import labelled
from assay.studies.features.study import load
from assay.targets.agreement import agreement_pairs, build_model, build_tokenizer
from assay.targets.language import save_language_model

TINY = [
    "target.layers=2",
    "target.width=32",
    "target.heads=2",
    "target.steps=80",
    "target.required=0",
    "data.limit=40",
    "dictionaries.features=24",
    "dictionaries.k=3",
    "dictionaries.steps=150",
    "dictionaries.batch=256",
    "dictionaries.end_to_end=0",
    "dictionaries.sentences=600",
    "effects.paths=4",
    "effects.restored=[2,8]",
    "circuit.lengths=1",
    "circuit.nodes=6",
    "circuit.pairs=40",
]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "ours"
    runner.execute(runner.load("agreement-features", TINY), folder)
    return folder


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """A model that is not ours, and pairs for it."""
    folder = tmp_path_factory.mktemp("user")
    tokenizer = build_tokenizer()
    made = build_model(
        len(tokenizer),
        layers=2,
        width=16,
        heads=2,
        context=16,
        seed=0,
        stop=tokenizer.eos_token_id,
    )
    save_language_model(folder / "model", made, tokenizer)
    pairs = [
        {
            "clean_prefix": pair.clean_prefix,
            "patch_prefix": pair.patch_prefix,
            "clean_answer": pair.clean_answer,
            "patch_answer": pair.patch_answer,
        }
        for pair in agreement_pairs("nounpp", 24)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")
    return folder


def sets_of(user, *more):
    entries = [f"target.path={user / 'model'}", f"data.pairs={user / 'pairs.jsonl'}", *more]
    return [word for entry in entries for word in ("--set", entry)]


@pytest.mark.slow
def test_our_run_has_everything_the_report_shows(ours):
    run = opened(ours)
    summary = run.json("summary.json")
    bound = load(run)
    exact = attribute(bound, Exact())
    parts = run.table("parts.parquet")
    for row in parts.head(40).iter_rows(named=True):
        value = dense(exact.values[row["group"]])[(row["example"], *row["index"])]
        assert row["exact"] == pytest.approx(-float(value), rel=1e-5, abs=1e-7)
    measured = {(row["estimate"], row["over"], row["part"]): row for row in summary["agreement"]}
    for part in ("feature", "error"):
        row = measured["node paths", "example", part]
        assert row["pearson"] > 0.999
        assert row["slope"] == pytest.approx(1, abs=0.01)
        assert {"slope", "sign", "mae"} <= set(measured["attribution patching", "example", part])
    assert set(summary["error_bars"]) == {"residual", "mlp", "attention"}
    assert summary["site_paths"]["estimand"] == "share of joint removal"
    shares = summary["drivers"]["error"]["shares"]
    for row in shares:
        assert row["norm"] + row["gradient_norm"] + row["cosine"] == pytest.approx(1)
    nothing = run.table("restored.parquet").filter(pl.col("features restored") == 0)
    assert (nothing["restored"] == nothing["ablated"]).all()
    large = parts.filter(pl.col("exact").abs() >= summary["missed"]["threshold"])
    counts = summary["missed"]["error"]
    assert counts["above_threshold"] == large.filter(pl.col("part") == "error").height
    page = (ours / "report.html").read_text()
    for words in ("What a threshold misses", "Norm against gradient", "Ablation and restoration"):
        assert words in page
    assert len(page) < 2_500_000


@pytest.mark.slow
def test_our_run_ends_with_a_circuit(ours):
    run = opened(ours)
    found = run.json("summary.json")["circuits"]
    assert [one["nodes"] for one in found] == [6]
    curves, parts, edges = (
        run.table(f"circuit-{name}.parquet") for name in ("curves", "parts", "edges")
    )
    (name,) = curves["circuit"].unique()
    assert name == f"{found[0]['tokens']}-at-{found[0]['positions'][0]}"
    assert set(curves["kept"]) == set(found[0]["kept"])
    at = curves.filter((pl.col("kept") == "features only") & (pl.col("nodes") == 6))
    kept = found[0]["kept"]["features only"]
    assert at["faithfulness"][0] == kept["faithfulness"]
    # Whether there are intervals is up to the network and its empty circuit alone.
    assert {kept[key] is None for key in ("low", "high", "cpr_low", "cpr_high", "cmd_low")} in (
        {True},
        {False},
    )
    assert [at["low"][0], at["high"][0]] == [kept["low"], kept["high"]]
    whole = curves.filter((pl.col("kept") == "features and errors") & (pl.col("share") == 1))
    assert whole["faithfulness"][0] == pytest.approx(1, abs=1e-4)
    for worst in found[0]["worst"].values():
        assert worst["examples"] == 8
        assert worst["damage"] >= 0
        assert ("refused" in worst["bracket"]) != ("proved_mean" in worst["bracket"])
        if "proved_mean" in worst["bracket"]:
            assert worst["bracket"]["proved_mean"] >= worst["bracket"]["found_mean"] - 1e-6
    groups = read_supernodes(run.checked("supernodes.json"))
    assert set(groups) == {name}
    assert [one.name for one in groups[name]] == [one["name"] for one in found[0]["supernodes"]]
    assert parts.height == 6
    assert parts["group"].str.contains("hook_resid_post").all()
    assert not parts["group"].str.ends_with(" error").any()
    known = set(parts["part"])
    assert set(edges["source"]) <= known
    assert set(edges["receiver"]) <= known | {"metric"}
    graph = read_graph(run.checked(f"circuit-{name}.json"))
    assert len(graph.nodes) == 7
    assert len(graph.tokens) == found[0]["tokens"]
    assert len(graph.links) == edges.height
    assert "The circuit" in (ours / "report.html").read_text()


@pytest.mark.slow
def test_the_verbs_work_over_a_run(ours, monkeypatch, capsys):
    code, out = command(monkeypatch, capsys, "attribute", ours, "--json", "--top", "3")
    assert code == 0, out.err
    part = json.loads(out.out)["rows"][0]["part"]
    assert "pos" in part
    code, out = command(monkeypatch, capsys, "explain", ours, part, "--json", "--top", "2")
    assert code == 0, out.err
    code, out = command(monkeypatch, capsys, "audit", ours, "--json", "--exact", "20")
    assert code == 0, out.err
    assert json.loads(out.out)["bars"]["promises"]["all"]["sentence"]
    words = ["certify", ours, "--keep", "top:20", "--low", "0.5", "--examples", "1"]
    code, out = command(monkeypatch, capsys, *words, "--budget", "2", "--json")
    assert code == 0, out.err
    summary = json.loads(out.out)
    assert 0 <= summary["found_mean"] <= summary["proved_mean"] + 1e-5
    assert not summary["vacuous"]


KILLED = """
import importlib, os, signal, sys
from assay import cli

module, name = sys.argv.pop(1).rsplit(".", 1)
owner = importlib.import_module(module)
called = getattr(owner, name)


def killed(*given, **more):
    called(*given, **more)
    os.kill(os.getpid(), signal.SIGKILL)


setattr(owner, name, killed)
cli.main()
"""
STAGES = (
    "assay.learn.loop._save",
    "assay.studies.features.inputs.train",
    "assay.studies.features.inputs.save_dictionaries",
    "assay.studies.features.errors.save_errors",
    "assay.studies.features.circuit.write_graph",
    "assay.studies.runner.report",
)
"""Where a run is killed, in their order: behind the model's checkpoint, the dictionaries' training
and their files, the tables of the study, the circuit's graph and the report.
"""


@pytest.mark.slow
def test_a_run_killed_at_every_stage_ends_with_the_same_numbers(ours, tmp_path):
    folder = tmp_path / "killed"
    sets = [word for entry in TINY for word in ("--set", entry)]
    words = ["run", "agreement-features", "-o", str(folder), *sets, "--resume"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for stage in STAGES:
        done = subprocess.run(
            [sys.executable, "-c", KILLED, stage, *words], env=environment, capture_output=True
        )
        assert done.returncode == -signal.SIGKILL, (stage, done.stderr.decode()[-500:])
    subprocess.run(
        [sys.executable, "-m", "assay.cli", *words],
        env=environment,
        check=True,
        capture_output=True,
    )
    first, second = (opened(path).json("summary.json") for path in (ours, folder))
    assert without_clocks(first) == without_clocks(second)
    for name in ("parts", "circuit-edges", "circuit-curves"):
        tables = [opened(path).table(f"{name}.parquet") for path in (ours, folder)]
        assert_frame_equal(*tables)


@pytest.mark.slow
def test_neurons_of_a_model_that_is_not_ours(user, monkeypatch, capsys, tmp_path):
    words = ["run", "features", "-o", tmp_path / "run", "--json", *sets_of(user)]
    more = ["--set", "dictionaries.kind=identity", "--set", "effects.exact=12"]
    code, out = command(monkeypatch, capsys, *words, *more)
    assert code == 0, out.err
    summary = json.loads(out.out)
    found = {(row["estimate"], row["over"], row["part"]): row for row in summary["agreement"]}
    assert found["node paths", "example", "feature"]["pearson"] > 0.999
    assert not any(part == "error" for _, _, part in found)
    assert summary["missed"]["feature"]["missed"] <= summary["missed"]["feature"]["above_threshold"]
    assert summary["error_bars"] == {}
    part = "blocks.1.hook_resid_post[*, feature 3]"
    words = ["steer", tmp_path / "run", f"{part}=-6", "--continue", "4", "--examples", "2"]
    code, out = command(monkeypatch, capsys, *words, "--json")
    assert code == 0, out.err
    steered = json.loads(out.out)
    assert len(steered["continuations"]) == 2
    assert len(steered["continuations"][0]["without"].split()) == 4
    assert steered["gates"] == {"blocks.1.hook_resid_post[*, 3]": -6.0}
    for row in steered["rows"]:
        assert row["after"] - row["before"] == pytest.approx(row["measured"])
    code, out = command(monkeypatch, capsys, *words)
    assert code == 0, out.err
    assert "change_second_order" in out.out
    assert "without" in out.out
    code, out = command(monkeypatch, capsys, "steer", tmp_path / "run", f"{part}=big")
    assert (code, "PART=GATE" in out.err) == (2, True)
    words = ["steer", tmp_path / "run", "--set", f"{part}=8", "-o", tmp_path / "steered"]
    code, out = command(monkeypatch, capsys, *words, "--continue", "3", "--json")
    assert code == 0, out.err
    assert json.loads(out.out)["set_to"] == {"blocks.1.hook_resid_post[*, 3]": 8.0}
    code, out = command(monkeypatch, capsys, "report", tmp_path / "steered")
    assert code == 0, out.err
    assert "What the model says" in (tmp_path / "steered" / "report.html").read_text()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Dictionaries in SAELens format for the user's model: the identity split by sign, and noise.

    Their errors are small and not zero."""
    generator = torch.Generator().manual_seed(0)
    placed = {}
    for site in ("blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"):
        made = architecture("relu")(16, 32)
        eye = torch.eye(16)
        noise = 0.05 * torch.randn(32, 16, generator=generator)
        made.W_enc.data = torch.cat([eye, -eye], dim=1)
        made.W_dec.data = torch.cat([eye, -eye], dim=0) + noise
        placed[site] = Placed(made, site, (site,))
    return save_dictionaries(tmp_path_factory.mktemp("saved") / "dictionaries", placed)


@pytest.mark.slow
def test_saved_dictionaries_of_a_model_that_is_not_ours(user, saved, monkeypatch, capsys, tmp_path):
    words = ["run", "features", "-o", tmp_path / "run", "--json", *sets_of(user)]
    more = ["--set", f"dictionaries.path={saved}", "--set", "effects.exact=16"]
    code, out = command(monkeypatch, capsys, *words, *more)
    assert code == 0, out.err
    summary = json.loads(out.out)
    parts = {(row["estimate"], row["part"]) for row in summary["agreement"]}
    assert {("attribution patching", "feature"), ("attribution patching", "error")} <= parts
    assert set(summary["error_bars"]) == {"mlp", "residual"}
    assert {"above_threshold", "missed", "reasons"} == set(summary["missed"]["error"])
    assert summary["dictionaries"]["count"] == 2


@pytest.mark.slow
def test_saved_dictionaries_of_every_activation_are_certified(user, monkeypatch, capsys, tmp_path):
    """TopK, the JumpReLU that BatchTopK is saved as, a gated dictionary and ReLU, each behind the
    gates of those before it.
    """
    generator, placed = torch.Generator().manual_seed(0), {}
    kinds = {
        "blocks.0.hook_mlp_out": ("topk", {"k": 8}),
        "blocks.0.hook_resid_post": ("batchtopk", {"k": 8}),
        "blocks.1.hook_attn_out": ("gated", {}),
        "blocks.1.hook_mlp_out": ("jumprelu", {}),
        "blocks.1.hook_resid_post": ("relu", {}),
    }
    for site, (kind, options) in kinds.items():
        made = architecture(kind)(16, 32, **options)
        eye = torch.eye(16)
        noise = 0.05 * torch.randn(32, 16, generator=generator)
        made.W_enc.data = torch.cat([eye, -eye], dim=1)
        made.W_dec.data = torch.cat([eye, -eye], dim=0) + noise
        if hasattr(made, "threshold"):
            made.threshold.data.fill_(1e-4)
        placed[site] = Placed(made, site, (site,))
    folder = save_dictionaries(tmp_path / "dictionaries", placed)
    more = ["--set", f"dictionaries.path={folder}", "--set", "effects.exact=4"]
    words = ["run", "features", "-o", tmp_path / "run", *sets_of(user), *more]
    code, out = command(monkeypatch, capsys, *words)
    assert code == 0, out.err
    words = ["certify", tmp_path / "run", "--keep", "top:20", "--low", "0.98", "--examples", "1"]
    path = tmp_path / "cert.json"
    code, out = command(monkeypatch, capsys, *words, "--budget", "5", "--json", "-o", path)
    assert code == 0, out.err
    summary = json.loads(out.out)
    assert 0 < summary["found_mean"] <= summary["proved_mean"] + 1e-5
    assert not summary["vacuous"]
    assert "the damage is at most" in summary["checked"]


@pytest.mark.slow
def test_dictionaries_that_do_not_fit_are_refused(user, monkeypatch, capsys, tmp_path):
    site = "blocks.0.hook_mlp_out"
    bad = architecture("relu")(16, 8)
    bad.W_enc.data.normal_(generator=torch.Generator().manual_seed(0))
    bad.W_dec.data.fill_(5.0)
    folder = save_dictionaries(tmp_path / "bad", {site: Placed(bad, site, (site,))})
    words = ["run", "features", "-o", tmp_path / "run", *sets_of(user)]
    code, out = command(monkeypatch, capsys, *words, "--set", f"dictionaries.path={folder}")
    assert code == 2
    assert "does not fit the values at its site" in out.err
    other = architecture("relu")(24, 8)
    other.W_enc.data.normal_()
    folder = save_dictionaries(tmp_path / "other", {site: Placed(other, site, (site,))})
    code, out = command(monkeypatch, capsys, *words, "--set", f"dictionaries.path={folder}")
    assert code == 2
    assert "width 24" in out.err


@pytest.mark.slow
def test_pairs_of_another_vocabulary_are_named(user, monkeypatch, capsys, tmp_path):
    other = {
        "clean_prefix": "Zorp qix",
        "patch_prefix": "Zorp qax",
        "clean_answer": " blee",
        "patch_answer": " bloo",
    }
    (tmp_path / "pairs.jsonl").write_text(json.dumps(other) + "\n")
    words = ["run", "features", "-o", tmp_path / "run", "--set", f"target.path={user / 'model'}"]
    code, out = command(
        monkeypatch, capsys, *words, "--set", f"data.pairs={tmp_path / 'pairs.jsonl'}"
    )
    assert code == 2
    assert "token" in out.err


def test_the_gemma_recipe_says_what_it_takes(monkeypatch, capsys):
    code, out = command(monkeypatch, capsys, "run", "gemma2-features", "--dry-run", "--json")
    assert code == 0, out.err
    planned = json.loads(out.out)
    assert planned["sites"] == 78
    assert planned["memory_gb"]["network"] > 8
    assert planned["memory_gb"]["all dictionaries on disk"] > 20
    assert planned["time"]["exact_patching_hours_here"] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "your own model and pairs: --set target.path=MODEL_DIR"),
        (["target.path=somewhere"], "pairs of your own"),
        (["target.train=true", "target.path=x"], "target.train trains a model"),
        (["target.train=true", "metric=kl"], "compares whole outputs"),
        (["target.train=true", "dictionaries.kind=saved"], "needs dictionaries.path"),
        (["target.train=true", "dictionaries.kind=identity", "dictionaries.path=x"], "together"),
        (["target.train=true", "dictionaries.k=600"], "more than dictionaries.features"),
        (["target.train=true", "dictionaries.path=none"], "no folder 'none'"),
        (["target.train=true", "sites=[]"], "sites"),
        (["target.train=true", "metric=logit_diference"], "did you mean logit_difference"),
    ],
)
def test_bad_words(monkeypatch, capsys, tmp_path, overrides, message):
    sets = [word for override in overrides for word in ("--set", override)]
    code, out = command(monkeypatch, capsys, "run", "features", "-o", tmp_path / "run", *sets)
    assert code == 2
    assert message in out.err
    assert not (tmp_path / "run").exists()


def test_the_tour_stops_at_features():
    from assay.studies.tour.config import STOPS

    assert "agreement-features" in STOPS
    assert recipes.load("agreement-features", short=True).config.dictionaries.steps < 1000


class Words:
    """A tokenizer of five tokens: words with their blank, a blank line, and a byte of a letter."""

    texts = ("The", " key", "s", "\n\n", "\ufffd")

    def decode(self, ids):
        return "".join(self.texts[one] for one in ids)

    def convert_ids_to_tokens(self, one):
        return ("The", "\u0120key", "s", "\u010a\u010a", "\u00c3")[one]


@pytest.mark.parametrize(
    ("tokens", "place", "text"),
    [
        ((0, 1, 2), 1, "The [key]s"),
        ((0, 1, 2), 2, "The key[s]"),
        ((0, 1, 3), 2, "The key['\\n\\n']"),
        ((0, 1, 4), 2, "The key[\u00c3]"),
        ((4, 0), 1, "\u00c3 [The]"),
    ],
)
def test_a_context_is_the_text_with_its_token_in_brackets(tokens, place, text):
    model = SimpleNamespace(tokenizer=Words())
    assert labelled._marked(model, Context(tokens, place, 1.0)) == text
