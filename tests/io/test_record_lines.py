"""The record of a run names files in its folder alone, and vouches for every recorded byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from assay.errors import InputError
from assay.io import runs
from assay.io.commits import NAME, Commits, Entry, digest, parse

OUTSIDE = ["../x", "a/../../x", "..", "a/..", "/etc/passwd", "", ".", "./a", "a//b", "a/", NAME]


def record(path: Path, name: str) -> Path:
    """A record that is right in every check, with one name in it."""
    lines = Commits()
    data = lines.header("0" * 16) + lines.commit({name: Entry(1, digest(b"x"))})
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_name_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    inner = tmp_path / "run"
    inner.mkdir()
    with pytest.raises(InputError, match="line 2"):
        parse(record(inner / NAME, name))
    with pytest.raises(InputError, match="line 2"):
        runs.start(inner, {}, force=True)
    assert (tmp_path / "x").read_bytes() == b"x"
    assert parse(record(inner / NAME, "a/b")).files.keys() == {"a/b"}


@pytest.mark.parametrize("place", [0, 10, 40, 70])
@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json"])
def test_a_flipped_bit_is_found_in_logs_and_in_files(place: int, name: str, tmp_path: Path) -> None:
    with runs.start(tmp_path / "run", {}) as run:
        run.save_json("summary.json", {"loss": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]})
        for step in range(3):
            run.log("training", step, {"losses/total": 1.5})
    path = tmp_path / "run" / name
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=name):
        runs.opened(tmp_path / "run").checked(name)
