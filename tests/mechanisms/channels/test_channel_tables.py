"""Weights alone: static tables of the last two blocks, and the interaction matrix of one."""

from __future__ import annotations

import pytest
import torch
from channel_oracle import ablated, batch, network
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.errors import InputError
from assay.mechanisms.channels.clean import run_clean
from assay.mechanisms.channels.interaction import interaction_matrix
from assay.mechanisms.channels.tables import ablate_last_two, build_tables
from assay.mechanisms.channels.weights import read_weights


@pytest.mark.parametrize("blocks", [2, 4])
def test_static_tables_give_the_exact_effects_of_the_last_two_blocks(blocks: int) -> None:
    model = network(blocks, blocks=blocks, scale=2.0)
    x, y = batch(blocks, examples=6)
    weights = read_weights(model)
    clean = run_clean(weights, x, y)
    effects = ablate_last_two(
        build_tables(weights), y, clean.hidden[-2], clean.left[-1], clean.right[-1]
    )
    assert torch.allclose(effects, ablated(model, x, y, "logit")[:, -2:], rtol=1e-10, atol=1e-11)


def test_tables_that_would_depend_on_the_input_are_refused() -> None:
    for options, message in (
        ({"norm": True}, "norms"),
        ({"gate": "relu"}, "gate"),
        ({"blocks": 1}, "two blocks"),
    ):
        with pytest.raises(InputError, match=message):
            build_tables(read_weights(network(0, **options)))  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(-3, 2), st.integers(0, 6))
def test_interaction_and_its_truncation(seed: int, block: int, rank: int) -> None:
    model = network(seed)
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(6, generator=generator, dtype=torch.float64)
    states = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    found = interaction_matrix(model, block, direction)
    layer = model.blocks[block]
    exact = (layer.left(states) * layer.right(states)) @ layer.down.weight.T @ direction
    assert torch.equal(found.matrix, found.matrix.T)
    assert torch.allclose(found.evaluate(states), exact, atol=1e-12)
    assert bool((found.values.abs().diff() <= 0).all())
    kept = found.truncate(rank)
    assert bool(((kept.evaluate(states) - exact).abs() <= kept.error_bound(states)).all())
    # The bound is attained along the largest dropped eigenvector.
    if rank < 6:
        worst = found.vectors[:, rank].unsqueeze(0)
        gap = (kept.evaluate(worst) - found.evaluate(worst)).abs()
        assert torch.allclose(gap, kept.error_bound(worst), rtol=1e-6, atol=1e-11)


def test_bad_interactions_are_refused() -> None:
    model = network(0)
    with pytest.raises(InputError, match=r"block must lie in 0\.\.2"):
        interaction_matrix(model, 3, torch.zeros(6))
    with pytest.raises(InputError, match="6 finite numbers"):
        interaction_matrix(model, 0, torch.zeros(5))
    with pytest.raises(InputError, match="6 finite numbers"):
        interaction_matrix(model, 0, torch.full((6,), float("nan")))
    with pytest.raises(InputError, match="gate"):
        interaction_matrix(network(0, gate="tanh"), 0, torch.zeros(6))
    with pytest.raises(InputError, match="rank"):
        interaction_matrix(model, 0, torch.ones(6)).truncate(7)
