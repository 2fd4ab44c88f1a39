"""A search that is stopped goes on where it was, and finds what one that never was finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from killing import KilledError, Killing, always_saving
from torch import Tensor

from assay.bounds.search import branch
from assay.bounds.search.branch import least
from assay.bounds.search.leaves import Budget, Found
from assay.bounds.search.unfinished import Store
from assay.bounds.trace import Traced, trace
from assay.errors import InputError
from assay.io.runs import Run

pytestmark = pytest.mark.slow

ONES = torch.ones(6, dtype=torch.float64)
BUDGET = Budget(seconds=1e9, boxes=60, steps=(5, 3), whole=2, gap=0.0)


def network(name: str) -> Traced:
    generator = torch.Generator().manual_seed(2)
    first, second = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((6, 9), (9, 2))
    )

    def relu(x: Tensor) -> Tensor:
        return torch.relu(x @ first) @ second

    def smooth(x: Tensor) -> Tensor:
        return (torch.softmax(3 * x, -1) @ first).tanh() @ second

    return trace({"relu": relu, "smooth": smooth}[name], ONES)


def search(
    traced: Traced, store: Store | None = None, above: float | None = None, **changed: Any
) -> Found:
    row = torch.tensor([1.0, -1.0]).numpy()
    budget = Budget(**(BUDGET.__dict__ | changed))
    return least(traced, [0 * ONES - 1], [ONES], row, budget=budget, store=store, above=above)


def same(one: Found, other: Found) -> bool:
    names = ("bound", "value", "boxes", "closed", "root", "level")
    return all(getattr(one, name) == getattr(other, name) for name in names) and all(
        torch.equal(x, y) for x, y in zip(one.point, other.point, strict=True)
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return always_saving(tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ["relu", "smooth"])
def test_a_search_that_is_killed_again_and_again_finds_the_same(name: str, folder: Path) -> None:
    traced = network(name)
    whole = search(traced)
    assert whole.boxes > 30
    killed, seconds = 0, [0.0]
    for left in (1, 1, 2, 1, 100):
        run = Killing(folder)
        run.left = left
        try:
            found = search(network(name), Store(run, "x.pt", "key", leaves=True))
        except KilledError:
            killed += 1
            held = Run(folder).state("x.pt")
            assert not held["search"]["finished"]
            seconds.append(held["search"]["seconds"])
            assert len(held["search"]["leaves"]["paths"]) <= held["search"]["boxes"]
    assert killed == 4
    assert sorted(seconds) == seconds
    assert found.seconds > seconds[-1]
    assert same(found, whole)
    for mine, other in zip(found.leaves, whole.leaves, strict=True):
        assert mine.path == other.path
        assert all((x == y).all() for x, y in zip(mine.lows, other.lows, strict=True))
        assert all((x == y).all() for x, y in zip(mine.highs, other.highs, strict=True))
        for slopes, others in ((mine.before, other.before), (mine.after, other.after)):
            assert slopes.keys() == others.keys()
            assert all(
                torch.equal(x, y)
                for ref in slopes
                for x, y in zip(slopes[ref], others[ref], strict=True)
            )


def test_what_was_found_is_not_searched_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(Run(folder), "x.pt", "key")
    first = search(network("relu"), store)
    monkeypatch.setattr(branch._Search, "begin", lambda *_: pytest.fail("begun again"))
    again = search(network("relu"), store)
    assert same(first, again)
    assert again.seconds == first.seconds
    assert again.leaves == []


def test_another_search_is_not_gone_on_with(folder: Path) -> None:
    first = search(network("relu"), Store(Run(folder), "x.pt", "one"), boxes=4)
    other = search(network("relu"), Store(Run(folder), "x.pt", "two"))
    assert other.boxes > first.boxes
    assert same(other, search(network("relu")))


def test_a_file_that_was_changed_is_refused(folder: Path) -> None:
    store = Store(Run(folder), "x.pt", "key")
    search(network("relu"), store, boxes=4)
    path = folder / "x.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match="damaged"):
        search(network("relu"), Store(Run(folder), "x.pt", "key"), boxes=4)


def test_what_a_deleted_file_held_is_searched_again(folder: Path) -> None:
    whole = search(network("relu"), Store(Run(folder), "x.pt", "key"))
    (folder / "x.pt").unlink()
    again = search(network("relu"), Store(Run(folder), "x.pt", "key"))
    assert same(again, whole)
    assert Run(folder).has("x.pt")


def test_leaves_stay_within_the_memory() -> None:
    traced = network("relu")
    whole = search(traced)
    little = search(traced, memory=2000)
    assert 1 < little.boxes < whole.boxes
    assert little.bound <= whole.bound <= whole.value + 1e-12
    assert little.bound >= little.root


def test_boxes_that_are_proved_stay_proved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search without slopes bounds a closed box at the level once, also where it goes on."""
    plain = {"steps": (0, 0), "whole": 0, "boxes": 1 << 12}
    above = search(network("relu"), boxes=400).value - 1.0
    whole = search(network("relu"), above=above, **plain)
    assert whole.closed
    assert whole.bound > above
    run = Killing(folder)
    run.left = 8
    with pytest.raises(KilledError):
        search(network("relu"), Store(run, "x.pt", "key"), above=above, **plain)
    proved, go_on = list[float](), branch._Search.go_on

    def gone_on(self: Any, held: Any) -> Any:
        work = go_on(self, held)
        proved.extend(leaf.bound for leaf in work.proved)
        return work

    monkeypatch.setattr(branch._Search, "go_on", gone_on)
    found = search(network("relu"), Store(Run(folder), "x.pt", "key"), above=above, **plain)
    assert same(found, whole)
    assert proved
    assert min(proved) > above
