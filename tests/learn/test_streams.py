"""Streams: every position once an epoch, no padding, the same batch for the same step."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from assay.core.sites import read_sites
from assay.errors import InputError
from assay.learn import reading, streams
from assay.targets.names import resolve

SITES = ("blocks.0.hook_resid_post", "blocks.0.attn.hook_z", "blocks.1.hook_mlp_out")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_positions=8, n_embd=8, n_layer=2, n_head=2, attn_implementation="eager"
    )
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def rows():
    ids = torch.randint(50, (24, 8), generator=torch.Generator().manual_seed(1))
    lengths = torch.arange(24) % 7 + 2
    return reading.rows_of(ids, torch.arange(8) < lengths[:, None], constant=1)


def truth(model, rows):
    """Every kept value, read with the general reader of the core."""
    found = {}
    for name in SITES:
        ref = resolve(model, name)
        value = read_sites(model, rows.inputs(), [ref.site])[ref.site].value
        found[name] = value[rows.kept]
    return found


def sorted_rows(values):
    return values[values[:, 0].argsort()]


def test_reader_returns_the_kept_positions(model, rows):
    reader = reading.Reader(model, SITES)
    expected = truth(model, rows)
    for _ in range(2):  # the second pass ends early
        found = reader(rows)
        assert list(found) == list(SITES)
        for name in SITES:
            assert torch.equal(found[name], expected[name])
    for name in SITES:
        value = torch.randn(2, 3, 8)
        ref = resolve(model, name)
        part = reading.value_at(ref, value)
        assert torch.equal(reading.with_value(ref, torch.zeros_like(value), part), value)


@pytest.mark.parametrize("budget", [None, 1])
def test_an_epoch_gives_every_position_once(model, rows, budget):
    total = int(rows.kept.sum())
    stream = streams.Stream(model, rows, SITES, batch=1, seed=3, budget=budget)
    assert (stream.blocks > 1) == (budget is not None)
    expected = truth(model, rows)
    for epoch in range(2):
        drawn = [stream(step) for step in range(epoch * total, (epoch + 1) * total)]
        for name in SITES:
            values = torch.cat([batch[name] for batch in drawn])
            assert torch.allclose(sorted_rows(values), sorted_rows(expected[name]), atol=1e-6)
            assert not torch.allclose(values, expected[name], atol=1e-6)


@pytest.mark.parametrize("budget", [None, 1])
def test_a_batch_is_a_function_of_seed_and_step(model, rows, budget):
    first = streams.Stream(model, rows, SITES, batch=4, seed=3, budget=budget)
    for step in range(30):
        first(step)
    second = streams.Stream(model, rows, SITES, batch=4, seed=3, budget=budget)
    other = streams.Stream(model, rows, SITES, batch=4, seed=4, budget=budget)
    for step in (30, 31, 12):
        assert torch.equal(first(step)[SITES[0]], second(step)[SITES[0]])
        assert not torch.equal(first(step)[SITES[0]], other(step)[SITES[0]])
    assert torch.equal(first.draw_windows(5, 6).ids, second.draw_windows(5, 6).ids)


@pytest.mark.parametrize("shares", [1, 2])
def test_a_sample_holds_the_first_windows_and_reads_none_twice(model, rows, shares, monkeypatch):
    stream = streams.Stream(model, rows, SITES, batch=4, seed=3, shares=shares)
    first = stream.sample(5)
    expected = stream.read(rows.take(stream._of_epoch(0)[0][:5]))
    for name in SITES:
        torch.testing.assert_close(first[name], expected[name])
    before = stream(0)
    first[SITES[0]].zero_()
    assert torch.equal(stream(0)[SITES[0]], before[SITES[0]])
    if shares == 1:
        monkeypatch.setattr(stream, "read", None)
        stream(1), stream.sample(3)


def test_processes_share_the_batch_of_one(model, rows):
    def streams_of(world):
        return [
            streams.Stream(model, rows, SITES, batch=4, seed=0, shares=2, rank=rank, world=world)
            for rank in range(world)
        ]

    (alone,), both = streams_of(1), streams_of(2)
    for step in (0, 7, 20):
        parts = torch.cat([stream(step)[SITES[2]] for stream in both])
        assert torch.allclose(alone(step)[SITES[2]], parts, atol=1e-6)
        windows = torch.cat([stream.draw_windows(step, 4).ids for stream in both])
        assert torch.equal(alone.draw_windows(step, 4).ids, windows)


def test_bad_input_is_refused(model, rows):
    with pytest.raises(InputError, match=r"did you mean blocks\.0.hook_resid_post"):
        reading.Reader(model, ["blocks.0.hook_residpost"])
    with pytest.raises(InputError, match="fewer than one batch of 5000"):
        streams.Stream(model, rows, SITES, batch=5000)
    with pytest.raises(InputError, match="must divide"):
        streams.Stream(model, rows, SITES, batch=4, shares=3)
    with pytest.raises(InputError, match="no position is left"):
        reading.rows_of(torch.zeros(2, 1, dtype=torch.long), constant=1)
    with pytest.raises(InputError, match="one vector per token is needed"):
        reading.Reader(model, ["transformer.wpe"])(rows)
