"""The attribution study end to end: our model, a user's model, the verbs, and bad input."""

from __future__ import annotations

import json
import math
from unittest import mock

import numpy as np
import pytest
from command_line import command

from assay.attribution import Exact, Gradient, IntegratedGradients
from assay.io import files
from assay.io.runs import opened
from assay.studies import runner
from assay.studies.attribution import study
from assay.studies.attribution.study import load

pytestmark = pytest.mark.slow

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
    with mock.patch.object(study, "save_brackets"):  # the shipped model has them
        runner.execute(runner.load("agreement-attribution", TINY), folder / "ours")
    return folder


def test_summary_tables_and_report(runs):
    """Patching everything is cheap here: exact effects are shown, and the cheap score is audited
    against them.
    """
    summary = files.read_json(runs / "ours" / "summary.json")
    method = summary["method"]
    assert (method["asked"], method["taken"]) == ("auto", "exact")
    assert (
        "the exact effects are shown, and integrated gradients is not computed" in method["reason"]
    )
    assert set(summary["methods"]) == {"gradient"}
    assert set(summary["methods"]["gradient"]["by_kind"]) == {"head", "mlp", "residual"}
    assert summary["completeness_gaps"] == {}
    run = opened(runs / "ours")
    exact = exact_scores(run)
    top = run.table("top.parquet")
    for row in top.head(5).iter_rows(named=True):
        assert row["low"] <= row["effect"] <= row["high"]
        assert row["inputs"] == 36
        values = exact.values[row["group"]][(slice(None), *row["index"])]
        assert abs(float(values.mean()) - row["effect"]) <= 4 * float(values.std()) / 6 + 1e-6
    heat = run.table("heat.parquet")
    assert heat["score"].sum() == pytest.approx(
        -sum(float(v.double().mean(0).sum()) for v in exact.values.values()), rel=1e-6
    )
    total = summary["totals"]["all"]
    assert total["estimate"] == pytest.approx(-heat["score"].sum(), rel=1e-6)
    page = (runs / "ours" / "report.html").read_text()
    for words in ("Where it happens", "The largest nodes", "Why exact patching", "clean answer is"):
        assert words in page
    assert len(page) < 2_000_000


def exact_scores(run):
    return Exact().scores(load(run))


def test_what_is_promised_is_printed_with_its_support(runs, monkeypatch, capsys, tmp_path):
    words = ["run", "attribution", "-o", str(tmp_path / "run"), "--json"]
    for entry in (
        f"target.path={runs / 'ours' / 'model'}",
        f"data.pairs={runs / 'ours' / 'pairs.jsonl'}",
        "data.limit=400",
    ):
        words += ["--set", entry]
    code, out = command(monkeypatch, capsys, *words)
    assert code == 0, out.err
    summary = json.loads(out.out)
    assert summary["method"]["taken"] in ("exact", "ig")
    assert "CPU s" in summary["method"]["reason"]
    for name in ("all", "top 5 % by score", "listed"):
        found = summary["coverage"][name]
        assert found["n"] > 0
        assert found["inputs"] >= 5
        assert 0 <= found["low"] <= found["share"] <= found["high"] <= 1
        assert "bars contain the exact effect" in found["sentence"]
    assert summary["signs"]["metric"].startswith(
        "logit_difference: logit(patch answer) - logit(clean answer)"
    )


def test_an_estimate_is_shown_where_it_is_asked_for(runs, tmp_path):
    sets = [*OURS(runs), "method=ig", "audit.fix=4"]
    summary = runner.execute(runner.load("attribution", sets), tmp_path / "run")
    assert summary["method"]["taken"] == "ig"
    assert set(summary["methods"]) == {"gradient", "ig"}
    assert all(gap <= 0.011 for gap in summary["completeness_gaps"].values())
    maes = [summary["methods"][name]["agreement"]["mae"] for name in ("ig", "gradient")]
    assert maes[0] <= maes[1]
    # Both audits share their ablations: fewer were computed than the tables have rows.
    rows = sum(entry["exact_ablations"] for entry in summary["methods"].values())
    assert summary["exact_effects"] < rows + 24 * 30
    assert 0 < summary["fixed"]["patches"] <= 40 * 4
    assert summary["fixed"]["share_exact"] > 0
    run = opened(tmp_path / "run")
    assert run.has("scores-fixed.parquet")
    assert "further exact patches" in (tmp_path / "run" / "report.html").read_text()
    top = run.table("top.parquet")
    assert set(top["inputs"]) == {30}
    assert (top["ablated"] <= 30).all()
    assert (top["ablated"] > 0).all()


def test_the_choice_is_kept_with_the_run(runs, tmp_path):
    """A resumed run takes the method that the probe chose before, whatever a probe says now."""
    recipe = runner.load("attribution", OURS(runs))
    runner.execute(recipe, tmp_path / "other")
    saved = files.read_json(tmp_path / "other" / "config.json")
    started = runner.runs.start(tmp_path / "run", saved)
    started.save_json("method.json", {"asked": "auto", "taken": "ig", "reason": "an old probe"})
    started.close()
    summary = runner.execute(recipe, tmp_path / "run", resume=True)
    assert summary["method"] == {"asked": "auto", "taken": "ig", "reason": "an old probe"}
    assert "ig" in summary["methods"]


def OURS(runs):  # noqa: N802
    return [
        f"target.path={runs / 'ours' / 'model'}",
        f"data.pairs={runs / 'ours' / 'pairs.jsonl'}",
        "data.limit=40",
        "audit.exact=6",
    ]


def test_bars_are_applied_to_pairs_that_were_not_there(runs, monkeypatch, capsys, tmp_path):
    lines = (runs / "ours" / "pairs.jsonl").read_text().splitlines()
    (tmp_path / "old.jsonl").write_text("\n".join(lines[:60]) + "\n")
    (tmp_path / "new.jsonl").write_text("\n".join(lines[40:100]) + "\n")
    sets = [
        f"target.path={runs / 'ours' / 'model'}",
        f"data.pairs={tmp_path / 'old.jsonl'}",
        "audit.exact=12",
    ]
    runner.execute(runner.load("attribution", sets), tmp_path / "run")
    words = ["audit", str(tmp_path / "run"), "--on", str(tmp_path / "new.jsonl"), "--json"]
    code, out = command(monkeypatch, capsys, *words)
    assert code == 0, out.err
    found = json.loads(out.out)
    unique = set(lines[40:100]) - set(lines[:60])
    assert found["pairs"]["seen_before"] >= 20
    assert found["pairs"]["kept"] <= 40
    assert found["pairs"]["kept"] >= len(unique) - 1
    assert found["promises"]["largest"]["inputs"] == found["pairs"]["kept"]
    assert found["verdict"]
    assert {"low", "high", "together_low", "together_high", "exact"} <= set(found["rows"][0])
    table = opened(tmp_path / "run").table(found["saved_as"])
    assert table["example"].n_unique() == found["pairs"]["kept"]
    words[3] = str(tmp_path / "old.jsonl")
    code, out = command(monkeypatch, capsys, *words)
    assert code == 2
    assert "were there when the run was made" in out.err
    words[3] = str(tmp_path / "none.jsonl")
    assert command(monkeypatch, capsys, *words)[0] == 2


def test_further_methods(runs, tmp_path):
    sets = [*OURS(runs), 'more=["ig", "atp-star", "relp", "probes"]', "method=exact"]
    summary = runner.execute(runner.load("attribution", sets), tmp_path / "run")
    assert set(summary["methods"]) == {"gradient", "ig", "atp-star", "relp", "probes"}
    assert summary["fixed"] is None
    assert summary["method"]["reason"] == "it was asked for"
    run = opened(tmp_path / "run")
    # AtP* has no sign: it is compared with sizes.
    sizes = run.table("audit-atp-star.parquet")
    assert bool((sizes["exact"] >= 0).all())
    assert bool((sizes["exact"] == run.table("audit-ig.parquet")["exact"].abs()).all())
    assert summary["methods"]["atp-star"]["agreement"]["pearson"] > 0
    total = summary["totals"]["all"]
    assert total["low"] <= total["estimate"] <= total["high"]
    assert 0 <= summary["top_recall"]["low"] <= summary["top_recall"]["high"] <= 1
    page = (tmp_path / "run" / "report.html").read_text()
    assert "AtP*" in page


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
    assert summary["top_recall"]["estimate"] is None
    assert summary["top_recall"]["reason"].endswith("and at least 5 are needed")
    for name in ("all", "top 5 % by score"):
        assert summary["coverage"][name]["share"] is None
        assert summary["coverage"][name]["reason"]
    if count == 1:
        assert summary["circuit"]["scrubbed_share_kept"] is None
        assert summary["circuit"]["scrubbed_reason"]
    total = summary["totals"]["all"]
    assert (total["estimate"] is None) == (count == 1)
    assert bool(total.get("reason")) == (count == 1)
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
    assert json.loads(out.out)["score"].startswith("A score is F(all gates at one)")
    words = ["audit", str(runs / "ours"), "--json"]
    code, out = command(monkeypatch, capsys, *words, "--method", "auto")
    found = json.loads(out.out)
    assert found["method"] == "exact"
    assert "the exact effects are shown" in found["taken_because"]
    assert {"effect", "low", "high"} <= set(found["rows"][0])
    code, out = command(monkeypatch, capsys, *words, "--exact", "9")
    found = json.loads(out.out)
    assert found["bars"]["promises"]["all"]["sentence"]
    row = found["rows"][0]
    assert row["low"] <= row["effect"] <= row["high"]
    assert "score_sampled" not in row


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


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The shipped agreement model, trained once."""
    folder = tmp_path_factory.mktemp("shipped") / "run"
    runner.execute(runner.load("agreement-attribution", ["data.limit=40"]), folder)
    return folder


@pytest.mark.slow
def test_the_report_brackets_what_nodes_can_do(shipped):
    brackets = opened(shipped).table("brackets.parquet")
    assert brackets["free"].to_list() == [3, 6]
    # What was found is rounded as the network computes, in float32.
    assert (brackets["found"] <= brackets["proved"] + 1e-5).all()


@pytest.mark.slow
@pytest.mark.parametrize("construction", ["nounpp", "within_rc"])  # four positions act, and one
def test_bars_hold_where_users_read_over_resplits(shipped, tmp_path, construction):
    sets = [
        f"target.path={shipped / 'model'}",
        f"data.pairs={shipped / 'pairs' / f'{construction}.jsonl'}",
        "more=[ig]",
    ]
    runner.execute(runner.load("attribution", sets), tmp_path / "run")
    mechanisms = load(opened(tmp_path / "run"))
    first, exact = Gradient().scores(mechanisms), Exact().scores(mechanisms)
    scores = IntegratedGradients().scores(mechanisms)
    audits = [scores.audit(seed=seed, against=first, effects=exact) for seed in range(200)]
    assert audits[0].pooled.pearson >= 0.99
    assert 0.95 <= audits[0].pooled.slope <= 1.05
    named = [name for name in audits[0].promises if not name.startswith("top of")]
    assert {"all", "top 5 % by score", "largest", "listed", "largest, together"} <= set(named)
    for name in named:
        found = np.array([audit.promises[name].share for audit in audits], dtype=float)
        found = found[np.isfinite(found)]
        assert len(found) >= 150, name
        least = 0.85 if name == "top 5 % by exact effect" else 0.9
        assert found.mean() >= least - 3 * found.std(ddof=1) / math.sqrt(len(found)), name
    widths = np.array([(audit.width, audit.constant_width) for audit in audits])
    assert widths[:, 0].mean() <= widths[:, 1].mean() / 4
