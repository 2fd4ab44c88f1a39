"""The attribution study end to end: our model, a user's model, the verbs, and bad input."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest

from assay import cli
from assay.attribution import Gradient, IntegratedGradients
from assay.io import files
from assay.io.runs import opened
from assay.studies import runner
from assay.studies.attribution.study import load

TINY = [
    "target.layers=1",
    "target.width=32",
    "target.heads=2",
    "target.steps=80",
    "target.required=0",
    "data.limit=48",
    "audit.exact=6",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runner.execute(runner.load("agreement-attribution", TINY), folder / "ours")
    return folder


def command(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["assay", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, capsys.readouterr()


def test_summary_tables_and_report(runs):
    summary = files.read_json(runs / "ours" / "summary.json")
    assert set(summary["methods"]) == {"gradient", "ig"}
    assert set(summary["methods"]["ig"]["by_kind"]) == {"head", "mlp", "residual"}
    assert all(gap <= 0.011 for gap in summary["completeness_gaps"].values())
    assert (
        summary["methods"]["ig"]["agreement"]["mae"]
        <= summary["methods"]["gradient"]["agreement"]["mae"]
    )
    page = (runs / "ours" / "report.html").read_text()
    assert "Where it happens" in page
    assert len(page) < 2_000_000


def test_further_methods_and_fixed_scores(runs, tmp_path):
    ours = [
        f"target.path={runs / 'ours' / 'model'}",
        f"data.pairs={runs / 'ours' / 'pairs.jsonl'}",
        "data.limit=40",
        "audit.exact=6",
    ]
    sets = [*ours, 'more=["atp-star", "relp", "probes"]', "audit.fix=4"]
    summary = runner.execute(runner.load("attribution", sets), tmp_path / "run")
    assert set(summary["methods"]) == {"gradient", "ig", "atp-star", "relp", "probes"}
    run = opened(tmp_path / "run")
    # AtP* has no sign: it is compared with sizes.
    sizes = run.table("audit-atp-star.parquet")
    assert bool((sizes["exact"] >= 0).all())
    assert bool((sizes["exact"] == run.table("audit-ig.parquet")["exact"].abs()).all())
    assert summary["methods"]["atp-star"]["agreement"]["pearson"] > 0
    assert 0 < summary["fixed"]["patches"] <= 40 * 4
    assert summary["fixed"]["share_exact"] > 0
    total = summary["totals"]["all"]
    assert total["low"] <= total["estimate"] <= total["high"]
    assert 0 <= summary["top_recall"]["low"] <= summary["top_recall"]["high"] <= 1
    assert run.has("scores-fixed.parquet")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "AtP*" in page
    assert "further exact patches" in page


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_handful_of_pairs_is_reported_without_what_it_cannot_support(runs, tmp_path, count):
    lines = (runs / "ours" / "pairs.jsonl").read_text().splitlines()[:count]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    sets = [
        f"target.path={runs / 'ours' / 'model'}",
        f"data.pairs={tmp_path / 'pairs.jsonl'}",
        "audit.exact=6",
        "audit.fix=2",
    ]
    summary = runner.execute(runner.load("attribution", sets), tmp_path / "run")
    assert summary["pairs"]["kept"] == count
    assert (summary["top_recall"] is None) == (count == 1)
    assert bool(summary["totals"]) == (count > 1)
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_model_and_pairs_that_are_not_ours(runs, monkeypatch, capsys, tmp_path):
    words = [
        "run",
        "attribution",
        "-o",
        str(tmp_path / "theirs"),
        "--json",
        "--set",
        f"target.path={runs / 'ours' / 'model'}",
    ]
    pairs = tmp_path / "pairs.jsonl"
    lines = (runs / "ours" / "pairs.jsonl").read_text().splitlines()[:24]
    unequal = json.dumps(
        {**json.loads(lines[0]), "patch_prefix": json.loads(lines[0])["patch_prefix"] + " " + "the"}
    )
    pairs.write_text("\n".join([*lines, unequal]) + "\n")
    code, out = command(
        monkeypatch,
        capsys,
        *words,
        "--set",
        f"data.pairs={pairs}",
        "--set",
        "audit.exact=6",
        "--set",
        "metric=probability",
    )
    assert code == 0, out.err
    summary = json.loads(out.out)
    assert summary["pairs"]["kept"] == 24
    assert sum(summary["pairs"]["dropped"].values()) == 1
    for method in summary["methods"].values():
        assert {"pearson", "spearman", "slope", "mae", "sign"} <= set(method["agreement"])
        assert {"coverage", "mean_width"} <= set(method["bars"])
    nothing = [
        "run",
        "attribution",
        "-o",
        str(tmp_path / "no"),
        "--set",
        f"target.path={runs}",
        "--set",
        f"data.pairs={pairs}",
    ]
    code, out = command(monkeypatch, capsys, *nothing)
    assert code == 2
    assert not (tmp_path / "no").exists()


def test_verbs_over_the_run(runs, monkeypatch, capsys):
    code, out = command(
        monkeypatch, capsys, "attribute", str(runs / "ours"), "--json", "--top", "3"
    )
    part = json.loads(out.out)["rows"][0]["part"]
    assert "pos" in part
    code, out = command(
        monkeypatch, capsys, "explain", str(runs / "ours"), part, "--json", "--top", "2"
    )
    assert code == 0
    assert {"clean", "patch", "answers", "score"} <= set(json.loads(out.out)["rows"][0])
    code, out = command(monkeypatch, capsys, "ablate", str(runs / "ours"), "--part", part, "--json")
    assert code == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.pairs=none.jsonl", "target.train=true"], "no file"),
        (["target.path=somewhere"], "pairs of your own"),
        (["metric=logit_diference", "target.train=true"], "did you mean logit_difference"),
        (["reference=patch"], "reference"),
        ([], "your own model and pairs: --set target.path=MODEL_DIR"),
        (["target.train=true", "target.path=x"], "target.train trains a model"),
        (["target.train=true", "target.heads=3"], "multiple of target.heads"),
        (["target.train=true", "target.width=1048576"], "of memory are available"),
    ],
)
def test_bad_words(monkeypatch, capsys, tmp_path, overrides, message):
    sets = [word for override in overrides for word in ("--set", override)]
    code, out = command(
        monkeypatch, capsys, "run", "attribution", "-o", str(tmp_path / "run"), *sets
    )
    assert code == 2
    assert message in out.err
    assert not (tmp_path / "run").exists()


def test_bad_pairs_and_sites(runs, monkeypatch, capsys, tmp_path):
    model = ["--set", f"target.path={runs / 'ours' / 'model'}"]
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text(
        (runs / "ours" / "pairs.jsonl").read_text().splitlines()[0] + "\n{not json}\n"
    )
    for name, message in (("empty.jsonl", "no"), ("bad.jsonl", "2")):
        words = [
            "run",
            "attribution",
            "-o",
            str(tmp_path / name[:3]),
            *model,
            "--set",
            f"data.pairs={tmp_path / name}",
        ]
        code, out = command(monkeypatch, capsys, *words)
        assert code == 2
        assert message in out.err
    words = [
        *model,
        "--set",
        f"data.pairs={runs / 'ours' / 'pairs.jsonl'}",
        "--set",
        "sites=[blocks.0.hook_mlp_outt]",
    ]
    code, out = command(
        monkeypatch, capsys, "run", "attribution", "-o", str(tmp_path / "site"), *words
    )
    assert code == 2
    assert "did you mean" in out.err


@pytest.mark.slow
def test_integrated_gradients_agree_and_their_bars_are_valid_and_narrow(tmp_path):
    summary = runner.execute(runner.load("agreement-attribution"), tmp_path / "run")
    for kind in summary["methods"]["ig"]["by_kind"].values():
        assert kind["pearson"] >= 0.99
        assert 0.95 <= kind["slope"] <= 1.05
    mechanisms = load(opened(tmp_path / "run"))
    first, scores = Gradient().scores(mechanisms), IntegratedGradients().scores(mechanisms)
    audit = scores.audit(exact=60, against=first)
    assert audit.pooled.pearson >= 0.99
    assert 0.95 <= audit.pooled.slope <= 1.05
    again = [audit.at_level(0.1, seed=seed) for seed in range(300)]
    coverage = np.array([entry.coverage for entry in again])
    nominal = np.mean(
        [
            math.ceil(round((n + 1) * 0.9, 9)) / (n + 1)
            for entry in again
            for n in entry.bars.points.values()
        ]
    )
    assert abs(coverage.mean() - nominal) <= 3 * coverage.std(ddof=1) / math.sqrt(len(coverage))
    assert (
        np.mean([entry.width for entry in again])
        <= np.mean([entry.constant_width for entry in again]) / 4
    )
