"""Supernodes that a user groups by hand: from the file of one run into the circuit of the next."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
from command_line import command

from assay.errors import InputError
from assay.io.runs import Run
from assay.io.supernodes import Supernode, read_supernodes, write_supernodes
from assay.learn.language import _save_pairs
from assay.studies.features.circuit import find_circuits
from assay.studies.features.config import Config
from assay.studies.features.grouping import require_supernodes
from assay.studies.features.inputs import find_dictionaries, make_batches
from assay.studies.features.page_circuit import circuit_sections
from assay.targets.agreement import agreement_pairs, build_model, build_tokenizer
from assay.targets.language import load_language_model, save_language_model

pytestmark = pytest.mark.slow

RESID = "blocks.{}.hook_resid_post"
CIRCUIT = {"nodes": 4, "pairs": 12, "searched": 0, "receivers": 8}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A folder with a model that is not ours, and its circuit as it is found without a file."""
    folder = tmp_path_factory.mktemp("hand")
    tokenizer = build_tokenizer()
    made = build_model(
        len(tokenizer), layers=2, width=16, heads=2, context=16, seed=0, stop=tokenizer.eos_token_id
    )
    save_language_model(folder / "model", made, tokenizer)
    model = load_language_model(folder / "model")
    run = Run(folder / "first")
    _save_pairs(run, "pairs.jsonl", agreement_pairs("nounpp", 12))
    find(run, model, {})
    return run, model


def find(run, model, circuit):
    """Find the circuits as a study does, with the given keys."""
    config = Config.model_validate(
        {
            "target": {"path": "somewhere"},
            "dictionaries": {"kind": "identity"},
            "effects": {"everything": True},
            "circuit": CIRCUIT | circuit,
        }
    )
    from assay.studies.pairs import read_all

    pairs = read_all(run.path("pairs.jsonl"), model)
    target, clean, _ = make_batches(config, model, pairs)
    dictionaries = find_dictionaries(config, run, model, target, clean)
    require_supernodes(config, run, model, dictionaries)
    found = find_circuits(config, run, model, target, dictionaries)
    run.save_json("config.json", {"config": config.model_dump(mode="json")})
    return found


def nodes_of(run):
    rows = run.table("circuit-parts.parquet").select("group", "index").iter_rows()
    return [(group, tuple(index)) for group, index in rows]


def test_groups_of_an_edited_file_are_everywhere(first, tmp_path):
    run, model = first
    (name,) = read_supernodes(run.checked("supernodes.json"))
    one, two, three, four = nodes_of(run)
    hand = [Supernode("the <noun>", (three, one)), Supernode("alone", (four,))]
    file = write_supernodes(tmp_path / "mine.json", {name: hand})
    again = Run(tmp_path / "again")
    _save_pairs(again, "pairs.jsonl", agreement_pairs("nounpp", 12))
    (found,) = find(again, model, {"supernodes": str(file)})
    assert [(row["name"], len(row["parts"])) for row in found["supernodes"]] == [
        ("the <noun>", 2),
        ("alone", 1),
    ]
    assert read_supernodes(again.checked("supernodes.json")) == {name: hand}
    parts = again.table("circuit-parts.parquet")
    groups = dict(zip(nodes_of(again), parts["supernode"], strict=True))
    assert groups == {one: "the <noun>", two: "", three: "the <noun>", four: "alone"}
    graph = json.loads(again.checked(f"circuit-{name}.json").read_text())
    assert [len(group) for group in graph["qParams"]["supernodes"]] == [3, 2]
    root = ElementTree.parse(again.checked(f"circuit-{name}.graphml")).getroot()
    named = [data.text for data in root.iter() if data.get("key") == "node-supernode"]
    assert sorted(named) == ["alone", "the <noun>", "the <noun>"]
    summary = {"circuits": [found | {"worst": {}}]}
    (section,) = circuit_sections(again, summary)
    assert f"grouped by hand, in {file}" in section.text
    picture = section.charts[1].to_dict()["layer"][1]["encoding"]["stroke"]
    assert picture["scale"]["domain"] == ["the <noun>", "alone"]


BAD = {
    "another circuit": ("9-at-1", (RESID.format(0), (1, 0)), "and this run finds 5-at-"),
    "a dictionary that is not there": ("", (RESID.format(5), (1, 0)), "it has features of blocks"),
    "an error": ("", (f"{RESID.format(0)} error", (1,)), "it has features of blocks"),
    "a feature outside": ("", (RESID.format(0), (1, 16)), "5 positions and 16 features"),
    "a position outside": ("", (RESID.format(0), (-1, 0)), "5 positions and 16 features"),
    "an index of one number": ("", (RESID.format(0), (1,)), "5 positions and 16 features"),
    "a part that is not in the circuit": ("", None, "its 4 parts are others"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_parts_that_are_not_there_are_named(case, first, tmp_path):
    run, model = first
    (name,) = read_supernodes(run.checked("supernodes.json"))
    circuit, node, message = BAD[case]
    if node is None:
        every = ((RESID.format(layer), (1, unit)) for layer in (0, 1) for unit in range(16))
        node = next(one for one in every if one not in nodes_of(run))
    file = write_supernodes(tmp_path / "mine.json", {circuit or name: [Supernode("x", (node,))]})
    again = Run(tmp_path / "again")
    _save_pairs(again, "pairs.jsonl", agreement_pairs("nounpp", 12))
    with pytest.raises(InputError, match=message) as refused:
        find(again, model, {"supernodes": str(file)})
    assert "\n" not in str(refused.value)
    assert str(file) in str(refused.value)


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("{", (), "is not JSON"),
        ("[]", (), "holds no supernodes"),
        (None, (), "no file"),
        ("{}", ("--set", "circuit.lengths=0"), "circuit.lengths = 0 finds none"),
    ],
)
def test_files_that_are_none_are_refused_before_any_work(
    text, more, message, monkeypatch, capsys, tmp_path
):
    file = tmp_path / "mine.json"
    if text is not None:
        file.write_text(text)
    words = ["run", "agreement-features", "-o", tmp_path / "run", *more]
    code, out = command(monkeypatch, capsys, *words, "--set", f"circuit.supernodes={file}")
    assert (code, out.err.count("\n")) == (2, 1)
    assert message in out.err
    assert not (tmp_path / "run").exists()
