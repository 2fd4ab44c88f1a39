"""The guard verbs on a language model of the user's own, in the Hugging Face format."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from assay import cli
from assay.guard.files import load, save
from assay.targets.agreement import agreement_pairs, build_model, build_tokenizer
from assay.targets.language import save_language_model

pytestmark = pytest.mark.slow

FIT = ["--features", "24", "--seed", "3"]


def command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    before, sys.argv = sys.argv, ["assay", *map(str, words)]
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = before
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of nonsense, and 500 sentences."""
    folder = tmp_path_factory.mktemp("mine")
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), layers=2, width=32, heads=2, context=16, seed=0)
    save_language_model(folder / "model", model, tokenizer)
    other = build_model(len(tokenizer), layers=2, width=32, heads=2, context=16, seed=1)
    save_language_model(folder / "other", other, tokenizer)
    lines = [pair.clean_prefix for pair in agreement_pairs("nounpp", 500, held_out=False)]
    (folder / "inputs.txt").write_text("\n".join(sorted(set(lines))) + "\n")
    fresh = {pair.clean_prefix for pair in agreement_pairs("nounpp", 60, seed=5)} - set(lines)
    (folder / "new.txt").write_text("\n".join(sorted(fresh)) + "\n\nthe the the the the\n")
    return folder


def test_fit_propose_score_and_explain(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = here / "model", here / "inputs.txt"
    guard = here / "guard"
    code, out, err = command(
        capsys, "guard", "fit", model, data, "-o", guard, *FIT, "--theta", "1e-4", "--json"
    )
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["features"] == 24
    assert found["explanations"] > 0
    assert found["calibration_supported"] > 0.5
    assert len(found["rows"]) == 20

    code, out, _ = command(capsys, "guard", "score", guard, model, here / "new.txt", "--json")
    scored = json.loads(out)
    assert code == 0
    assert scored["inputs"] == len(scored["rows"])
    assert 0 < scored["accepted"] < 1
    for row in scored["rows"]:
        assert row["accepted"] == (row["reason"] == "accepted")

    names = load(guard).names
    first = next(name for name in names if ".h.0." in name)
    second = next(name for name in names if ".h.1." in name)
    (here / "p.json").write_text(json.dumps({"proposals": [{"cause": first, "effect": second}]}))
    code, out, _ = command(
        capsys, "guard", "propose", guard, here / "p.json", model, data, "-o", here / "two",
        "--json",
    )  # fmt: skip
    proposed = json.loads(out)
    assert code == 0
    assert proposed["proposed"] == 1
    row = proposed["rows"][0]
    assert 0 <= row["low"] <= row["predicted"] <= row["high"] <= 1
    assert row["admitted"] == (row["reason"] == "")
    again = load(here / "two")
    every = [*again.explanations, *(one.explanation for one in again.refused)]
    assert sum(one.sort == "mechanistic" for one in every) == 1

    code, out, _ = command(capsys, "guard", "explain", here / "two", "--json")
    explained = json.loads(out)
    assert code == 0
    assert explained["promise"].startswith("the tests reject at most 0.05")
    assert {row["sort"] for row in explained["rows"]} >= {"statistical"}
    code, out, _ = command(capsys, "guard", "explain", here / "two", "--top", 3)
    assert code == 0
    assert "promise" in out


def test_calibration_of_ones_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = here / "model", here / "inputs.txt"
    mine = here / "own"
    words = ["guard", "fit", model, data, "-o", mine, *FIT]
    code, _, err = command(capsys, *words, "--calibration", data)
    assert code == 2
    assert "the calibration split shares" in err
    assert not mine.exists()
    code, _, err = command(capsys, *words, "--calibration", here / "new.txt")
    assert code == 0


def test_bad_input_is_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data, guard = here / "model", here / "inputs.txt", here / "g"
    assert command(capsys, "guard", "fit", model, data, "-o", guard, *FIT)[0] == 0
    (here / "few.txt").write_text("The cat\n")
    (here / "none.txt").write_text("\n\n")
    (here / "odd.json").write_text('{"proposals": [{"cause": "a", "effect": "b"}]}')
    a, b = load(guard).names[:2]
    cycle = [{"cause": a, "effect": b}, {"cause": b, "effect": a}]
    (here / "cycle.json").write_text(json.dumps({"proposals": cycle}))
    out = ["-o", here / "x"]
    for words, message in (
        (["fit", model, here / "gone.txt", *out], "no file"),
        (["fit", model, here / "none.txt", *out], "holds no inputs; one per line"),
        (["fit", model, here / "few.txt", *out], "1 distinct inputs leave none for a share"),
        (["fit", model, data, *out, "--modes", "ad"], "unknown guard mode 'ad'"),
        (["fit", model, data, *out, "--modes", "prune"], "needs bounds of your network"),
        (["fit", model, data, *out, "--alpha", "2"], "alpha must lie between 0 and 1"),
        (["fit", model, data, *out, "--sites", "nowhere.*"], "unknown site"),
        (["fit", model, data, "-o", guard], "is not an empty folder"),
        (["fit", model, data, *out, "--features", "0"], "--features must lie"),
        (["score", here / "gone", model, data], "no file"),
        (["score", guard, here / "other", data], "fitted on another network than"),
        (["propose", guard, here / "odd.json", model, data, *out], "unknown feature 'a'"),
        (["propose", guard, here / "cycle.json", model, data, *out], "closes a cycle"),
        (
            ["propose", guard, here / "cycle.json", here / "other", data, *out],
            "fitted on another network",
        ),
    ):
        code, printed, err = command(capsys, "guard", *words)
        assert (code, printed) == (2, ""), words
        assert message in err, words
        assert err.count("\n") == 1, words
        assert not (here / "x").exists(), words
    good = json.dumps({"proposals": [cycle[0]]})
    (here / "good.json").write_text(good)
    code, _, err = command(
        capsys, "guard", "propose", guard, here / "good.json", model, here / "new.txt", *out
    )
    assert code == 2
    assert "does not hold the inputs that the guard was fitted on" in err


def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place, message in (
        (tmp_path / "file", "is not an empty folder"),
        (tmp_path / "file" / "sub", "is no folder to write in"),
        (tmp_path / "link", "is not an empty folder"),
        (tmp_path / ("a" * 300), "File name too long"),
    ):
        code, _, err = command(
            capsys, "guard", "fit", here / "model", here / "inputs.txt", "-o", place, *FIT
        )
        assert (code, err.count("\n")) == (2, 1), place
        assert message in err
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_proposals_to_a_guard_fitted_in_python_are_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = here / "model", here / "inputs.txt"
    assert command(capsys, "guard", "fit", model, data, "-o", here / "mine", *FIT)[0] == 0
    fitted = load(here / "mine")
    reading = {key: fitted.reading[key] for key in ("sites", "logits")}
    save(here / "python", replace(fitted, reading=reading))
    a, b = fitted.names[:2]
    (here / "ab.json").write_text(json.dumps({"proposals": [{"cause": a, "effect": b}]}))
    code, _, err = command(
        capsys, "guard", "propose", here / "python", here / "ab.json", model, data,
        "-o", here / "never",
    )  # fmt: skip
    assert (code, err.count("\n")) == (2, 1)
    assert "does not say how its inputs were split" in err


def test_too_few_inputs_to_calibrate_are_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (here / "inputs.txt").read_text().splitlines()[:12]
    (here / "twelve.txt").write_text("\n".join(lines))
    code, _, err = command(
        capsys, "guard", "fit", here / "model", here / "twelve.txt", "-o", here / "never", *FIT
    )
    assert (code, err.count("\n")) == (2, 1)
    assert "needs at least 19 calibration inputs" in err
