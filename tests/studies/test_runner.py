"""Recipes: every key is checked before any work, runs are resumable, and the command speaks in
one line.
"""

from __future__ import annotations

import json
import sys
import types

import polars as pl
import pytest
from command_line import command

from assay import cli
from assay.cli.printing import print_table
from assay.errors import InputError
from assay.io import runs
from assay.report.page import Fact, Section
from assay.studies import runner


class Inner(runner.Config):
    steps: int = 3
    rate: float = 0.1


class Settings(runner.StudyConfig):
    inner: Inner = Inner()
    name: str = "a"


@pytest.fixture
def fake(monkeypatch, tmp_path):
    module = types.ModuleType("fake_study")
    calls = []

    def run(config, folder):
        calls.append(config)
        return {"steps": config.inner.steps, "seed": config.seed}

    module.Config = Settings
    module.run = run
    module.check = lambda config: None
    module.sections = lambda run: ([Fact("steps", 3)], [Section("One", "<b>text</b>")])
    module.headline = lambda run: ("A fake", "lead")
    monkeypatch.setitem(sys.modules, "fake_study", module)
    monkeypatch.setitem(runner.STUDIES, "fake", "fake_study")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("study: fake\nabout: a test\ninner: {steps: 5}\nshort: {inner.steps: 1}\n")
    return types.SimpleNamespace(recipe=str(recipe), calls=calls, folder=tmp_path / "out")


def test_overrides_are_typed_and_checked(fake):
    loaded = runner.load(fake.recipe, ["inner.rate=1e-3", "seed=4", "name=b"])
    assert loaded.config == Settings(inner=Inner(steps=5, rate=0.001), seed=4, name="b")
    assert runner.load(fake.recipe, short=True).config.inner.steps == 1
    for override, message in {
        "inner.step=2": "unknown config key 'inner.step'; did you mean inner.steps",
        "iner.steps=2": "did you mean inner.steps",
        "inner=2": "inner",
        "inner.steps=many": "inner.steps.*integer.*'many'",
        "steps": "takes key=value",
        "seed.x=1": "unknown config key 'seed.x'",
    }.items():
        with pytest.raises(InputError, match=message):
            runner.load(fake.recipe, [override])


def test_unknown_and_malformed_recipes(fake, tmp_path):
    with pytest.raises(InputError, match="unknown recipe 'digits-chanels'"):
        runner.load("digits-chanels")
    with pytest.raises(InputError, match="no recipe file"):
        runner.load("nowhere.yaml")
    (tmp_path / "bad.yaml").write_text("study: [")
    with pytest.raises(InputError, match="not YAML"):
        runner.load(str(tmp_path / "bad.yaml"))
    (tmp_path / "none.yaml").write_text("seed: 1")
    with pytest.raises(InputError, match="key 'study'"):
        runner.load(str(tmp_path / "none.yaml"))
    (tmp_path / "extra.yaml").write_text("study: fake\ninner: {stepz: 1}")
    with pytest.raises(
        InputError, match=r"unknown config key 'inner\.stepz'; did you mean inner\.steps"
    ):
        runner.load(str(tmp_path / "extra.yaml"))


def test_a_finished_run_is_not_run_again_and_its_report_escapes(fake):
    recipe = runner.load(fake.recipe)
    assert runner.execute(recipe, fake.folder) == {"steps": 5, "seed": 0}
    with pytest.raises(InputError, match="already exists"):
        runner.execute(recipe, fake.folder)
    assert runner.execute(recipe, fake.folder, resume=True) == {"steps": 5, "seed": 0}
    assert len(fake.calls) == 1
    page = (fake.folder / "report.html").read_text()
    assert "&lt;b&gt;text" in page
    assert "inner.steps" in page


def test_the_command_prints_json_and_one_line_errors(fake, monkeypatch, capsys):
    code, out = command(
        monkeypatch, capsys, "run", fake.recipe, "-o", str(fake.folder), "--json", "--set", "seed=2"
    )
    assert code == 0
    assert json.loads(out.out) == {"steps": 5, "seed": 2}
    code, out = command(monkeypatch, capsys, "run", fake.recipe, "-o", str(fake.folder))
    assert code == 2
    assert out.err.startswith("assay: ")
    assert len(out.err.strip().splitlines()) == 1
    code, out = command(monkeypatch, capsys, "attribute", str(fake.folder))
    assert code == 2
    assert "no parts to attribute" in out.err
    code, out = command(monkeypatch, capsys, "report", str(fake.folder / "nothing"))
    assert code == 2
    code, out = command(monkeypatch, capsys, "run", "--wrong")
    assert code == 2
    code, out = command(monkeypatch, capsys, "recipes", "--json")
    assert code == 0
    assert set(json.loads(out.out)) == set(runner.shipped())


def test_a_stopped_run_says_how_to_go_on_with_its_settings(fake, monkeypatch, capsys):
    def stop(config, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["fake_study"], "run", stop)
    code, out = command(
        *(monkeypatch, capsys, "run", fake.recipe, "-o", str(fake.folder), "--set", "seed=2")
    )
    assert code == 130
    again = f"assay run {fake.recipe} --set seed=2 -o {fake.folder} --resume"
    assert f"stopped; go on with: {again}" in out.err


def test_an_unfinished_run_says_how_to_go_on(fake, monkeypatch, capsys):
    saved = {
        "recipe": fake.recipe,
        "study": "fake",
        "overrides": {},
        "config": Settings().model_dump(),
    }
    runs.start(fake.folder, saved).close()
    code, out = command(monkeypatch, capsys, "report", str(fake.folder))
    assert code == 2
    assert "--resume" in out.err


def test_a_summary_that_is_gone_is_named(fake, monkeypatch, capsys):
    runner.execute(runner.load(fake.recipe), fake.folder)
    (fake.folder / "summary.json").unlink()
    code, out = command(monkeypatch, capsys, "report", str(fake.folder))
    assert code == 2
    assert "summary.json is missing" in out.err


def test_every_shipped_recipe_is_valid_in_both_forms():
    for name in runner.shipped():
        for short in (False, True):
            recipe = runner.load(name, short=short)
            assert recipe.about
            assert recipe.study in runner.STUDIES


def test_tables_in_a_terminal_show_every_column_and_small_numbers(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    names = [f"column_{number}" for number in range(12)]
    frame = pl.DataFrame({"group": ["g"], "part": ["g[pos 1]"], "index": [[1]], "reason": [""]})
    print_table({}, frame.with_columns(*(pl.lit(-1.9e-5).alias(name) for name in names)), False)
    text = capsys.readouterr().out
    assert all(name in text for name in ("part", "g[pos 1]", *names))
    assert text.count("-1.9e-05") == 12
    assert not any(name in text for name in ("group", "index", "reason"))
    print_table({}, pl.DataFrame({"n": list(range(250))}), False)
    assert "the first 100 of 250 rows; --json gives all" in capsys.readouterr().out


def test_help_keeps_the_brackets_of_a_part(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["assay", "explain", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "group[index]" in capsys.readouterr().out
