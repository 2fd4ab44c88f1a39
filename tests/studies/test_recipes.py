"""Recipes and configs: every key is checked before PyTorch is loaded, a resume knows its
overrides, and no value ends in a traceback.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from assay.errors import InputError
from assay.io import runs
from assay.io.runs import Run
from assay.learn.settings import AgreementTraining
from assay.mechanisms.channels.training import Training
from assay.studies import recipes
from assay.studies.fields import input_paths

# Recipes that take files of the user's own need some to be complete.
OWN = {
    "attribution": ["target.path=model", f"data.pairs={__file__}"],
    "channels": [f"data.path={__file__}"],
    "directions": ["target.path=model", f"data.path={__file__}"],
    "components": ["target.path=model", f"data.path={__file__}"],
    "crosscoder": ["target.path=model", f"data.path={__file__}"],
    "dictionaries": ["target.path=model", f"data.path={__file__}"],
    "features": ["target.path=model", f"data.pairs={__file__}"],
    "gemma2-features": [f"data.pairs={__file__}", f"dictionaries.path={Path(__file__).parent}"],
    "llama-components": ["target.path=model", f"data.path={__file__}"],
    "prompt-graph": [
        "target.path=model",
        f"dictionaries.path={Path(__file__).parent}",
        "prompt=The keys",
    ],
    "text-dictionaries": [f"data.path={__file__}"],
}
BAD = {
    "a negative number": "-5",
    "infinity": ".inf",
    "no number": ".nan",
    "beyond float64": "1e400",
    "a half": "0.5",
    "a truth value": "true",
    "a list": "[1]",
    "a mapping": "{a: 1}",
    "nothing": "null",
    "an empty text": "''",
    "a word": "many",
    "thousands of digits": "1" * 5000,
    "a huge integer": "1" + "0" * 400,
    "a surrogate": "'\\ud800'",
    "a NUL": '"\\0"',
    "a date": "2020-01-01",
    "no date": "2020-99-99",
    "a list of itself": "&a [*a]",
    "bytes": "!!binary aGk=",
    "a Python object": "!!python/object:os.system {}",
}


def value_at(config: BaseModel, key: str):
    for part in key.split("."):
        config = getattr(config, part)
    return config


def takes_nothing(config: BaseModel, key: str) -> bool:
    """Say whether a key may be left empty."""
    *path, last = key.split(".")
    field = type(value_at(config, ".".join(path)) if path else config).model_fields[last]
    return type(None) in get_args(field.annotation)


def refusal(name: str, overrides: list[str]) -> str:
    """Return what a recipe with these overrides is refused with, "" when it is not."""
    try:
        recipes.load(name, overrides).config.require()
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", recipes.shipped())
def test_every_key_takes_every_bad_value_or_refuses_it_in_one_line(name):
    own = OWN.get(name, [])
    config = recipes.load(name, own).config
    config.require()
    for key in recipes._names(type(config)):
        value = value_at(config, key)
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        taken = set()
        for what, text in BAD.items():
            refused = refusal(name, [*own, f"{key}={text}"])
            assert len(refused) < 700, (key, what)
            if not refused:
                taken.add(what)
        if numeric:
            taken -= {"nothing"} if takes_nothing(config, key) else set()
            assert taken <= {"a half", "a negative number", "thousands of digits"}, (key, taken)
            assert ("a half" in taken) <= isinstance(value, float), key
            assert ("a negative number" in taken) <= (key == "block"), key
            assert "thousands of digits" not in taken, key


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=-1", "seed: .*greater than or equal to 0"),
        (f"seed={2**31}", "seed: .*less than or equal to 2147483647"),
        ("seed=true", "seed: .*a number is expected, not true or false"),
        ("audit.alpha=2", "audit.alpha: .*less than 1"),
        ("audit.alpha=.nan", "audit.alpha: .*greater than or equal"),
        ("audit.examples=16", "error bars at audit.alpha = 0.1 need 18 distinct held-out examples"),
        ("audit.exact=3", "audit.exact = 3 parts per example cannot cover model.blocks = 4"),
        ("model.width=1048576", "training 4 blocks .* GB of memory are available"),
        ("data.digits=false", "this recipe takes your own data"),
        ("data.path=x.npz", "data.digits takes scikit-learn's digits and data.path names a file"),
        ("training.steps.more=1", "unknown config key 'training.steps.more'"),
        ("=3", "--set takes key=value"),
        ("training.steps", "--set takes key=value"),
    ],
)
def test_single_values_are_refused_by_name(override, message, monkeypatch):
    monkeypatch.setattr("assay.memory.available", lambda device=None: 1 << 30)
    with pytest.raises(InputError, match=message):
        recipes.load("digits-channels", [override]).config.require()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("study: [a]", "a recipe is a mapping with a key 'study'"),
        ("study: 5", "a recipe is a mapping with a key 'study'"),
        ("- study", "a recipe is a mapping with a key 'study'"),
        ("study: chanels", "unknown study 'chanels'; did you mean channels"),
        ("study: channels\ntraining: 5", "training: (.*valid dictionary|a mapping of keys)"),
        ("study: channels\nshort: 5", "'about' is a text and 'short' a mapping"),
        ("study: channels\nabout: [a]", "'about' is a text and 'short' a mapping"),
        ("study: channels\n5: 6", "5: Keys should be strings"),
        ("study: channels\n? [a]\n: b", "is not YAML"),
        ("study: channels\nseed: 2020-99-99", "is not YAML"),
        ("study: channels\nseed: " + "[" * 900, "is not YAML"),
        ("study: channels\nseed: " + "9" * 5000, "is not YAML|seed"),
        ("", "a recipe is a mapping"),
        ("\0", "is not YAML"),
    ],
)
def test_malformed_recipe_files_are_one_line(text, message, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    for overrides in ([], ["training.steps=5"]):
        with pytest.raises(InputError, match=message) as refused:
            recipes.load(str(tmp_path / "mine.yaml"), overrides)
        assert len(str(refused.value)) < 700


def test_a_section_that_is_no_mapping_is_named_with_an_override_too(tmp_path):
    (tmp_path / "mine.yaml").write_text("study: channels\ntraining: 5")
    with pytest.raises(InputError, match=r"training: a mapping .* \(got 5\)"):
        recipes.load(str(tmp_path / "mine.yaml"), ["training.steps=3"])


def test_a_byte_order_mark_is_accepted(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xef\xbb\xbfstudy: channels\nseed: 3\n")
    assert recipes.load(str(tmp_path / "mine.yaml")).config.seed == 3
    (tmp_path / "latin.yaml").write_bytes(b"study: channels # \xe9")
    with pytest.raises(InputError, match="not UTF-8"):
        recipes.load(str(tmp_path / "latin.yaml"))


def test_a_resume_without_overrides_uses_those_of_the_run(tmp_path):
    words = ["training.steps=7", "seed=3"]
    first = recipes.load("digits-channels", words)
    with runs.start(tmp_path / "run", first.saved()):
        pass
    again = recipes.load("digits-channels", resumes=tmp_path / "run")
    assert again.config == first.config
    runs.start(tmp_path / "run", again.saved(), resume=True).close()
    partly = recipes.load("digits-channels", ["seed=3"], resumes=tmp_path / "run")
    runs.start(tmp_path / "run", partly.saved(), resume=True).close()
    other = recipes.load("digits-channels", ["seed=4"], resumes=tmp_path / "run")
    with pytest.raises(InputError, match=r"\(config.seed: 3 there, 4 here\)"):
        runs.start(tmp_path / "run", other.saved(), resume=True)
    with pytest.raises(InputError, match="holds a run of the recipe 'digits-channels', not of"):
        recipes.load("channels", resumes=tmp_path / "run")
    assert recipes.load("digits-channels", resumes=tmp_path / "none").overrides == {}


def test_a_run_that_kept_no_settings_is_not_resumed_with_the_defaults(tmp_path):
    folder = tmp_path / "run"
    with Run(folder).held():  # killed before it wrote its config
        pass
    assert folder.is_dir()
    with pytest.raises(InputError, match="stopped before it kept its settings; give them again"):
        recipes.load("digits-channels", resumes=folder)
    given = recipes.load("digits-channels", ["seed=3"], resumes=folder)
    runs.start(folder, given.saved(), resume=True).close()
    assert recipes.load("digits-channels", resumes=folder).config == given.config
    (tmp_path / "empty").mkdir()
    assert recipes.load("digits-channels", resumes=tmp_path / "empty").overrides == {}


@pytest.mark.parametrize("lost", ["recipe", "study", "config", "overrides"])
def test_a_saved_config_that_lacks_a_key_is_named(lost, tmp_path):
    saved = recipes.load("digits-channels").saved()
    del saved[lost]
    with (
        runs.start(tmp_path / "run", saved) as run,
        pytest.raises(InputError, match=f"no '{lost}'"),
    ):
        recipes.saved_recipe(run)
    with pytest.raises(InputError, match=f"no '{lost}'"):
        recipes.load("digits-channels", resumes=tmp_path / "run")


def test_inputs_are_the_keys_that_name_files():
    config = recipes.load("attribution", ["target.path=a", "data.pairs=b", "metric=kl"]).config
    assert input_paths(config) == ["a", "b"]
    assert input_paths(recipes.load("digits-channels").config) == []


def test_defaults_stand_once():
    channels = recipes.load("digits-channels").config.training.model_dump()
    assert all(getattr(Training(), key) == value for key, value in channels.items())
    target = recipes.load("agreement-attribution").config.target
    assert target.width == AgreementTraining().width
    short = recipes.load("agreement-attribution", short=True).config.target
    assert short.width == 64


TYPOS = [
    (["run", "digits-chanels"], "did you mean digits-channels"),
    (["run", "digits-channels", "--set", "traning.steps=3"], "did you mean training.steps"),
    (["run", "agreement-attribution", "--set", "target.stepz=3"], "did you mean target.steps"),
    (["run", "max-of-k", "--set", "model.vocabulry=3"], "did you mean model.vocabulary"),
    (["run", "tms-directions", "--set", "method.kk=3"], "did you mean method.k"),
    (["run", "agreement-directions", "--set", "blok=3"], "did you mean block"),
    (["run", "directions", "--set", "dat.path=3"], "did you mean data.path"),
    (["run", "attribution"], "this recipe takes your own model and pairs"),
    (["run", "channels"], "this recipe takes your own data"),
    (["run", "directions"], "this recipe takes your own model and text"),
    (["atribute", "x"], "Did you mean 'attribute'"),
    (["attribute", "x", "--method", "gradint"], "did you mean gradient"),
    (["attribute", "nowhere"], "no run in 'nowhere'"),
    (["run", "digits-channels", "--resume", "--force"], "give one of them"),
]
ASK = """
import sys
from assay import cli
for words in {typos!r}:
    sys.argv = ["assay", *words]
    try:
        cli.main()
    except SystemExit as ended:
        print(ended.code, file=sys.stderr)
print(sorted({{"torch", "transformers", "polars", "altair", "scipy"}} & set(sys.modules)))
"""


def test_typos_are_answered_without_loading_torch(tmp_path):
    code = ASK.format(typos=[words for words, _ in TYPOS])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=True,
    )
    lines = done.stderr.splitlines()
    assert len(lines) == 2 * len(TYPOS)
    for (words, message), line, exit_code in zip(TYPOS, lines[::2], lines[1::2], strict=True):
        assert message in line, words
        assert exit_code == "2", words
    assert done.stdout.strip() == "[]"
    assert not any(tmp_path.iterdir())
