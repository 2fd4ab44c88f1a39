"""The channels study end to end: the user's data, the verbs over a saved run, kill -9 and bad
input.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import polars as pl
import pytest
import torch
from command_line import command

from assay.io import files
from assay.io.runs import Run
from assay.studies import runner
from assay.studies.brackets import save_brackets
from assay.studies.channels import study

pytestmark = pytest.mark.slow

SMALL = [
    "model.hidden=32",
    "training.steps=120",
    "audit.examples=60",
    "audit.exact=8",
    "audit.resplits=3",
]


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def assay(*words, check=True):
    done = subprocess.run(
        [sys.executable, "-m", "assay.cli", *words],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")

    def one_bracket(run, mechanisms, sizes, counts, *, examples):
        save_brackets(run, mechanisms, sizes, counts[:1], examples=1)

    with mock.patch.object(study, "save_brackets", one_bracket):
        runner.execute(runner.load("digits-channels", [*SMALL, "seed=0"]), folder / "0")
    with mock.patch.object(study, "BRACKETED", 0):  # the second run is there to be compared with
        runner.execute(runner.load("digits-channels", [*SMALL, "seed=1"]), folder / "1")
    return folder


def test_summary_and_files(runs):
    summary = files.read_json(runs / "0" / "summary.json")
    assert summary["accuracy"] > 0.8
    shares = summary["certified_share"]
    tighter = shares["second_order_plus_remainder_bound"]
    assert 0 <= shares["first_order_bound"] <= tighter + 0.05
    top = summary["top"]
    assert top["channels"] == 300
    assert top["channels"] == top["exact_by_construction"] + top["need_certificate"]
    assert top["share_within_tolerance_first"] == pytest.approx(
        top["within_tolerance_first"] / top["need_certificate"]
    )
    assert summary["agreement"]["second"]["mae"] < summary["agreement"]["first"]["mae"]
    assert (
        summary["bars"]["second"]["mean_width"]
        <= summary["bars"]["second"]["constant_first_order_width"] / 4
    )
    page = (runs / "0" / "report.html").read_text()
    assert "What can be proved" in page
    assert not re.search(r"\bB[13]\b", re.sub(r"<script.*?</script>", "", page, flags=re.S))
    assert len(page) < 2_000_000
    for name in (
        "config.json",
        "versions.json",
        "metrics.jsonl",
        "model.safetensors",
        "scores.parquet",
        "channels.parquet",
    ):
        assert (runs / "0" / name).exists()


@pytest.mark.parametrize("method", ["gradient", "second-order", "exact"])
def test_attribute_audit_and_explain(runs, monkeypatch, capsys, method):
    code, out = command(
        monkeypatch, capsys, "attribute", str(runs / "0"), "--method", method, "--json"
    )
    assert code == 0
    part = json.loads(out.out)["rows"][0]["part"]
    code, out = command(
        monkeypatch, capsys, "explain", str(runs / "0"), part, "--method", method, "--json"
    )
    assert code == 0
    rows = json.loads(out.out)["rows"]
    assert {"example", "label", "prediction", "score"} <= set(rows[0])
    assert abs(rows[0]["score"]) >= abs(rows[-1]["score"])
    code, out = command(
        monkeypatch, capsys, "ablate", str(runs / "0"), "--part", part, "--method", method, "--json"
    )
    row = json.loads(out.out)["rows"][0]
    assert row["mean_abs_error"] == pytest.approx(0, abs=1e-9 if method == "exact" else 0.1)
    assert (runs / "0" / f"verb-scores-{method}.parquet").exists()


def test_audit_table_and_compare(runs, monkeypatch, capsys):
    code, out = command(monkeypatch, capsys, "audit", str(runs / "0"), "--exact", "4")
    assert code == 0
    assert "agreement.pearson" in out.out
    code, out = command(monkeypatch, capsys, "compare", str(runs / "0"), str(runs / "0"), "--json")
    assert json.loads(out.out)["stability"] == pytest.approx(1)
    code, out = command(monkeypatch, capsys, "compare", str(runs / "0"), str(runs / "1"), "--json")
    assert 0 < json.loads(out.out)["stability"] < 0.999
    code, out = command(monkeypatch, capsys, "report", str(runs / "0"), "--json")
    assert code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["attribute", "{run}", "--method", "gradiant"], "did you mean gradient"),
        (["explain", "{run}", "blocks.0"], "a part is written group"),
        (["explain", "{run}", "blocks.9[0]"], "unknown gate group"),
        (["explain", "{run}", "blocks.0[32]"], "the index takes 1 number, below 32"),
        (["audit", "{run}", "--exact", "1"], "give at least 4"),
        (["attribute", "{run}/nothing"], "no run in"),
        (["run", "digits-channels", "-o", "{run}"], "already exists"),
        (
            ["run", "digits-channels", "-o", "{run}", "--resume", "--set", "seed=7"],
            "another config",
        ),
        (["run", "channels", "-o", "{run}", "--resume"], "holds a run of the recipe"),
        (["run", "digits-chanels"], "did you mean digits-channels"),
        (
            ["run", "digits-channels", "-o", "{run}x", "--set", "model.gate=gelo"],
            "did you mean gelu",
        ),
        (
            ["run", "digits-channels", "-o", "{run}x", "--set", "training.step=2"],
            "did you mean training.steps",
        ),
        (["run", "channels", "-o", "{run}x", "--set", "data.path=none.npz"], "no file"),
    ],
)
def test_bad_words_exit_with_two_and_one_line(runs, monkeypatch, capsys, words, message):
    code, out = command(
        monkeypatch, capsys, *[word.replace("{run}", str(runs / "0")) for word in words]
    )
    assert code == 2
    assert message in out.err
    assert len(out.err.strip().splitlines()) == 1
    assert not out.out


def test_a_damaged_model_is_refused(runs, monkeypatch, capsys, tmp_path):
    import shutil

    shutil.copytree(runs / "0", tmp_path / "run")
    tensors = files.load_tensors(tmp_path / "run" / "model.safetensors")
    tensors["head.weight"][0, 0] = float("nan")
    files.save_tensors(tmp_path / "run" / "model.safetensors", tensors)
    code, out = command(monkeypatch, capsys, "attribute", str(tmp_path / "run"))
    assert code == 2
    assert "model.safetensors is damaged" in out.err


@pytest.fixture
def new_digits(tmp_path):
    """Digits as a user would save them: some that the run has seen, some moved by one pixel."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = x.reshape(-1, 8, 8)[:60], y[:60]
    moved = np.roll(x[:40], 1, axis=2)
    x, y = np.concatenate([x[:20], moved]), np.concatenate([y[:20], y[:40]])
    np.savez(tmp_path / "new.npz", x=x, y=y)
    return tmp_path / "new.npz"


def test_thresholds_and_bars_apply_to_inputs_that_were_not_there(runs, new_digits):
    from assay.studies.channels import study

    run = Run(runs / "0")
    summary, shown = study.apply(run, new_digits)
    assert summary["inputs"] == {"kept": 40, "seen_before": 20}
    assert summary["measured"]["inputs"] == 40
    assert summary["measured"]["channels"] == 200
    assert {"low", "high", "exact", "attribution"} <= set(shown.columns)
    assert shown.height == 20
    saved = run.table(summary["saved_as"])
    assert saved.height == 200
    assert set(saved["example"]) == set(range(20, 60))  # places in the file
    half = (saved["high"] - saved["low"]) / 2
    assert half.min() > 0
    # The bars are those of the run: a multiple of the certificate, and rounding.
    quantile = run.json("promises.json")["bars"]["quantile"]
    expected = quantile * saved["second_order_bound"] + saved["rounding"]
    assert half.to_numpy() == pytest.approx(expected.to_numpy(), rel=1e-6, abs=1e-15)
    inside = (saved["exact"] - saved["second_order"]).abs() <= half + 1e-12
    assert saved["in_bar"].to_list() == inside.to_list()
    threshold = run.json("promises.json")["threshold"]["threshold"]
    if threshold is not None:
        trusted = (saved["score"] <= threshold) | saved["exact_by_construction"]
        assert saved["trusted"].to_list() == trusted.to_list()


def test_inputs_that_cannot_be_applied_to_are_refused(runs, tmp_path):
    from sklearn.datasets import load_digits

    from assay.errors import InputError
    from assay.studies.channels import study

    run = Run(runs / "0")
    x, y = load_digits(return_X_y=True)
    x = x.reshape(-1, 8, 8)
    for name, arrays, message in (
        ("seen", {"x": x[:5], "y": y[:5]}, "all 5 inputs"),
        ("shape", {"x": x[:5, :4], "y": y[:5]}, "was trained on inputs of shape"),
        ("label", {"x": x[:5] + 1, "y": y[:5] + 30}, "has no class"),
        ("alone", {"x": x[:5] + 1}, "y missing"),
    ):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(InputError, match=message):
            study.apply(run, tmp_path / f"{name}.npz")


SHORT = [
    "training.steps=30",
    "model.hidden=4",
    "model.width=6",
    "model.blocks=2",
    "audit.exact=4",
    "audit.resplits=2",
]


def user_run(tmp_path, x, y, *extra):
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    overrides = [f"data.path={tmp_path / 'mine.npz'}", *SHORT, *extra]
    return runner.execute(runner.load("channels", overrides), tmp_path / "run")


def images(examples, *shape):
    generator = np.random.default_rng(0)
    x = generator.random((examples, *shape)).astype(np.float32)
    return x, (x.reshape(examples, -1)[:, 0] > 0.5).astype(np.int64)


@pytest.mark.slow
def test_blank_images_are_exact_and_do_not_end_the_study(tmp_path):
    x, y = images(160, 4, 4)
    x[::8] = 0
    summary = user_run(tmp_path, x, y)
    assert summary["repeated_inputs"] == 19
    assert summary["top"]["exact_by_construction"] >= 5


@pytest.mark.slow
def test_forty_rows_are_enough_or_refused_in_one_line(tmp_path):
    from assay.errors import InputError

    x, y = images(40, 4, 4)
    with pytest.raises(InputError, match="need 18 distinct held-out examples, and there are 10"):
        user_run(tmp_path, x, y)
    summary = user_run(tmp_path, x, y, "data.train=0.5")
    assert summary["calibrated_threshold"]["threshold"] is None
    assert "No threshold is returned" in summary["promises"]["threshold"]
    assert "No threshold is returned" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_other_objectives_and_depths_are_a_row_each(tmp_path):
    x, y = images(120, 4, 4)
    compared = ("compare.objectives=true", "compare.depths=[1, 3]", "audit.alpha=0.2")
    user_run(tmp_path, x, y, *compared)
    table = Run(tmp_path / "run").table("networks.parquet")
    assert table.height == 7
    assert table["network"].to_list()[-2:] == ["1 blocks", "3 blocks"]
    assert len(set(table["network"])) == 7
    deep = table.filter(pl.col("network") != "1 blocks")
    assert deep["|cos|"].is_between(0, 1).all()
    assert (deep["C, median"] <= deep["C certified, median"]).all()
    # The attributions of the last block are exact, and there is no other.
    assert table["right within tolerance"].null_count() == 1
    assert "What makes attributions right" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_copies_of_an_input_are_measured_once(tmp_path):
    x, y = images(100, 4, 4)
    summary = user_run(tmp_path, np.repeat(x, 5, 0), np.repeat(y, 5))
    assert summary["examples"] == 25
    assert summary["repeated_inputs"] == 400


@pytest.mark.slow
def test_images_with_their_channels_last_are_the_same_images(tmp_path):
    from assay.errors import InputError

    x, y = images(100, 6, 6, 3)
    folders = []
    for name, array in (("last", x), ("first", x.transpose(0, 3, 1, 2))):
        (tmp_path / name).mkdir()
        folders.append(user_run(tmp_path / name, array, y, "model.patch=3"))
    assert folders[0] == folders[1]
    (tmp_path / "unclear").mkdir()
    with pytest.raises(InputError, match=r"data.layout=channels-first or channels-last"):
        user_run(tmp_path / "unclear", x[:, :3], y)
    (tmp_path / "said").mkdir()
    user_run(tmp_path / "said", x[:, :3], y, "data.layout=channels-last", "model.patch=3")


@pytest.mark.slow
def test_a_choice_never_reads_the_test_part(tmp_path):
    x, y = images(200, 4, 4)
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    from assay.targets.data import split_data

    whole = split_data(x, y)
    choosing = whole.without_test()
    assert len(choosing.train_x) + len(choosing.test_x) == len(whole.train_x)
    held = {tuple(row) for row in whole.test_x.tolist()}
    assert not held & {tuple(row) for row in choosing.train_x.tolist()}
    assert not held & {tuple(row) for row in choosing.test_x.tolist()}
    summary = user_run(tmp_path, x.numpy(), y.numpy(), "data.choosing=true")
    assert summary["examples"] == len(choosing.test_x)


@pytest.fixture
def table(tmp_path):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(240, 5)).astype(np.float32)
    np.savez(tmp_path / "mine.npz", x=x, y=(x[:, 0] * x[:, 1] > 0).astype(np.int64) + 3)
    return tmp_path / "mine.npz"


@pytest.mark.parametrize(
    "extra",
    [
        [],
        pytest.param(["model.norm=true"], marks=pytest.mark.slow),
        pytest.param(["model.gate=gelu"], marks=pytest.mark.slow),
        pytest.param(["audit.functional=cross_entropy"], marks=pytest.mark.slow),
    ],
)
def test_the_users_own_data(table, tmp_path, monkeypatch, extra):
    monkeypatch.setattr(study, "BRACKETED", 0)
    overrides = [
        f"data.path={table}",
        "training.steps=40",
        "model.hidden=4",
        "model.width=6",
        "model.blocks=2",
        "audit.exact=4",
        "audit.resplits=2",
    ]
    summary = runner.execute(runner.load("channels", [*overrides, *extra]), tmp_path / "run")
    assert summary["examples"] == 60
    assert "gate" not in str(extra) or "quadratic" in summary["not_available"]["certificates"]
    assert "Channels of a bilinear network" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((4, 2))}, "y missing"),
        ({"x": np.zeros((0, 2)), "y": np.zeros(0, int)}, "not empty"),
        ({"x": np.ones((8, 2)), "y": np.zeros(8, int)}, "one class only"),
        ({"x": np.full((8, 2), np.nan), "y": np.arange(8) % 2}, "NaN"),
        ({"x": np.ones((8, 2)), "y": np.arange(7) % 2}, "one class per example"),
    ],
)
def test_bad_data_is_refused_before_any_work(tmp_path, monkeypatch, capsys, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    code, out = command(
        monkeypatch,
        capsys,
        "run",
        "channels",
        "-o",
        str(tmp_path / "run"),
        "--set",
        f"data.path={tmp_path / 'bad.npz'}",
    )
    assert code == 2
    assert message in out.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_kill_nine_in_the_middle_of_training_and_resume_gives_the_same_numbers(tmp_path):
    words = [
        "run",
        "digits-channels",
        "--json",
        "--set",
        "training.steps=1500",
        "--set",
        "audit.examples=60",
        "--set",
        "audit.exact=8",
        "--set",
        "audit.resplits=2",
    ]
    whole = assay(*words, "-o", str(tmp_path / "whole")).stdout
    process = subprocess.Popen(
        [sys.executable, "-m", "assay.cli", *words, "-o", str(tmp_path / "killed")],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoint = tmp_path / "killed" / "training.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert torch.load(checkpoint, weights_only=True)["step"] < 1500
    assert not (tmp_path / "killed" / "summary.json").exists()
    resumed = assay(*words, "-o", str(tmp_path / "killed"), "--resume").stdout
    assert resumed == whole
    first, second = (
        files.load_tensors(tmp_path / name / "model.safetensors") for name in ("whole", "killed")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    saved = assay(*words[:3], "-o", str(tmp_path / "killed"), "--resume").stdout
    assert saved == whole  # the keys come from the run's own config
    changed = [*words[:-1], "audit.exact=9"]
    other = assay(*changed, "-o", str(tmp_path / "killed"), "--resume", check=False)
    assert other.returncode == 2
    assert "another config" in other.stderr


def test_certify_brackets_the_damage_of_the_other_parts(runs, monkeypatch, capsys):
    folder = str(runs / "0")
    words = ["certify", folder, "--keep", "top:122", "--examples", "1", "--budget", "0.3"]
    code, said = command(monkeypatch, capsys, *words, "--json")
    assert code == 0
    found = json.loads(said.out)
    brackets = pl.read_parquet(runs / "0" / "brackets.parquet")
    assert (brackets["found"] <= brackets["proved"] + 1e-5).all()
    assert "What the others can do at most" in (runs / "0" / "report.html").read_text()
    (row,) = found["rows"]
    assert 0 <= row["found"] <= row["proved"] + 1e-5
    assert found["free_gates"] == 6
    assert found["level"] == "real"
    assert found["assumptions"]
    code, said = command(monkeypatch, capsys, *words, "--claim", "same-answer", "--low", "0.9")
    assert code == 0
    assert "certified" in said.out
    for wrong, message in (
        (["--keep", "best:3"], "--keep is written top:N"),
        (["--keep", "top:129"], "with N parts of 128 at most"),
        (["--keep", "top:3", "--low", "2"], "low: the lowest gate"),
        (["--keep", "top:3", "--claim", "damages"], "did you mean damage"),
        (["--keep", "top:3", "--level", "float16"], "unknown level"),
    ):
        code, said = command(monkeypatch, capsys, "certify", folder, "--examples", "1", *wrong)
        assert code == 2
        assert message in said.err
