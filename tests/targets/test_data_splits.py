"""Splits of a data set: copies stay together, layouts are told or asked for, later inputs are
scaled alike.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.errors import InputError
from assay.targets.data import group_inputs, load_arrays, load_digits, load_new, split_data


def rows(x: torch.Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in x.flatten(1).tolist()}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(8, 40), st.sampled_from([0.3, 0.5, 0.75]))
def test_copies_are_in_one_part_together(seed: int, distinct: int, train: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(distinct, 2, 2, generator=generator)
    copies = torch.randint(2, 5, (distinct,), generator=generator)
    order = torch.randperm(int(copies.sum()), generator=generator)
    x = x.repeat_interleave(copies, 0)[order]
    data = split_data(x, order % 2, train=train, seed=seed)  # copies of one input differ in class
    assert not rows(data.train_x) & rows(data.test_x)
    assert len(data.train_x) + len(data.test_x) == len(x)
    assert data.repeated == len(x) - distinct
    assert len(rows(data.train_x)) == round(train * distinct)
    once, labels = data.distinct_test()
    assert len(once) == len(labels) == len(rows(data.test_x))
    assert rows(once) == rows(data.test_x)
    assert len(data.distinct_test(3)[0]) == min(3, len(once))


def test_inputs_are_numbered_by_their_content() -> None:
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, -0.0], [2.0, 0.0], [3.0, 1.0]])
    assert group_inputs(x).tolist() == [0, 1, 0, 1, 2]


def test_digits_split_as_ever_and_once_more_to_choose_on() -> None:
    data = load_digits()
    assert data.repeated == 0
    choosing = data.without_test()
    assert (len(choosing.train_x), len(choosing.test_x)) == (1038, 259)
    assert not rows(choosing.test_x) & rows(data.test_x)
    assert not rows(choosing.test_x) & rows(choosing.train_x)
    assert rows(choosing.test_x) <= rows(data.train_x)
    assert torch.equal(data.without_test().test_x, choosing.test_x)


@pytest.mark.parametrize("shape", [(6, 5, 3), (6, 5, 1), (7, 9, 4)])
def test_channels_last_are_told_by_their_number(shape: tuple[int, ...]) -> None:
    x = torch.rand(20, *shape, generator=torch.Generator().manual_seed(0))
    y = torch.arange(20) % 2
    last, first = split_data(x, y), split_data(x.permute(0, 3, 1, 2), y)
    assert last.image == first.image == (shape[2], *shape[:2])
    # The split is by content, whose order differs: the same layout, the same numbers.
    assert torch.equal(last.test_x, first.test_x)
    assert torch.equal(last.scaling.apply(x[:3]), first.scaling.apply(x.permute(0, 3, 1, 2)[:3]))


@pytest.mark.parametrize("shape", [(3, 5, 3), (3, 3, 3), (8, 9, 10)])
def test_unclear_layouts_are_asked_for(shape: tuple[int, ...]) -> None:
    x = torch.rand(20, *shape, generator=torch.Generator().manual_seed(0))
    y = torch.arange(20) % 2
    with pytest.raises(InputError, match=r"say data\.layout=channels-first or channels-last"):
        split_data(x, y)
    assert split_data(x, y, layout="channels-first").image == shape
    assert split_data(x, y, layout="channels-last").image == (shape[2], shape[0], shape[1])
    with pytest.raises(InputError, match="did you mean channels-last"):
        split_data(x, y, layout="chanels-last")  # type: ignore[arg-type]


def test_later_inputs_are_scaled_and_named_as_the_first_ones(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(5, 3, (30, 2)).astype(np.float32)
    y = np.where(np.arange(30) % 2 == 0, 7, 3)
    np.savez(tmp_path / "first.npz", x=x, y=y)
    data = load_arrays(tmp_path / "first.npz")
    np.savez(tmp_path / "again.npz", x=x, y=y)
    again, labels = load_new(tmp_path / "again.npz", data)
    assert rows(again) == rows(data.train_x) | rows(data.test_x)
    assert [data.names[label] for label in labels.tolist()] == [str(label) for label in y]
    for arrays, message in (
        ({"x": x[:, :1], "y": y}, r"inputs of shape \(2,\)"),
        ({"x": x, "y": y + 1}, "no class 4; its classes are 3, 7"),
        ({"x": np.full((2, 2), np.nan), "y": y[:2]}, "NaN"),
        ({"x": x}, "y missing"),
    ):
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(InputError, match=message):
            load_new(tmp_path / "bad.npz", data)
