"""The scaling laws: every figure that is promised, and every factor against autograd on random
importances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from assay.errors import InputError
from assay.mechanisms.components import (
    Faithfulness,
    LpMinimality,
    Recon,
    SmoothL0,
    decomposition,
)
from assay.mechanisms.components.advice import MEANS, Setting, advise, batch_table
from assay.mechanisms.components.scaling import (
    batch_change,
    eps_floor,
    pressure,
    shard_bias,
    site_change,
)

N = 512 * 2048
FORM = {"coefficient": 5e-6, "beta": 0.2, "p": 0.4, "eps": 1e-12}


def random_importances(positions: int = 40, components: int = 7, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(positions, components, generator=generator, dtype=torch.float64)
    return drawn * (torch.rand(drawn.shape, generator=generator, dtype=torch.float64) < 0.6)


@pytest.mark.parametrize("p", [2.0, 1.0, 0.4])
@pytest.mark.parametrize("beta", [0.0, 0.2, 1.5])
def test_the_closed_form_is_the_gradient(p, beta):
    a = random_importances().clamp(min=1e-3).requires_grad_()
    form = LpMinimality(coefficient=3e-2, beta=beta, p=p, eps=1e-6)
    form({"site": a}, count=len(a)).backward()
    found = pressure(a.detach(), coefficient=3e-2, beta=beta, p=p, eps=1e-6)
    torch.testing.assert_close(found, a.grad, rtol=1e-12, atol=0)


def test_one_process_share_of_the_closed_form_is_its_share_of_the_gradient():
    a = random_importances().clamp(min=1e-2).requires_grad_()
    LpMinimality(**FORM)({"site": a}, count=len(a)).backward()
    total = ((a.detach() + 1e-12) ** 0.4).sum(0)
    own = pressure(a.detach()[:13], **FORM, total=total, count=len(a))
    torch.testing.assert_close(own, a.grad[:13], rtol=1e-12, atol=0)


def test_three_or_27_sites_put_the_same_pressure_on_one_value():
    a = random_importances().clamp(min=1e-3)
    slopes = []
    for sites in (3, 27):
        leaf = a.clone().requires_grad_()
        others = {f"other {index}": random_importances(seed=index) for index in range(1, sites)}
        LpMinimality(**FORM)({"site": leaf, **others}, count=len(a)).backward()
        slopes.append(leaf.grad)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-12, atol=0)
    assert site_change(3, 27).minimality == 1
    row = advise(Setting(3, 512, 2048), Setting(27, 512, 2048), beta=0.2, p=0.4)[0]
    assert (row.factor, row.keep) == (1, True)
    assert "9x under-penalty" in row.do


class Stack(nn.Module):
    def __init__(self, sites: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5, bias=False) for _ in range(sites))
        for index, layer in enumerate(self.layers):
            generator = torch.Generator().manual_seed(index)
            layer.weight.data = torch.randn(5, 5, generator=generator)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize(("form", "factor"), [("sum", 1 / 9), ("relative", 1.0)])
def test_faithfulness_dilutes_by_nine_as_sum_over_numel_and_not_when_relative(form, factor):
    slopes = []
    for sites in (3, 27):
        model = Stack(sites)
        found = decomposition(model, "layers.*", 4)
        for factor_of_site in (*found.V, *found.U):
            generator = torch.Generator().manual_seed(len(factor_of_site))
            drawn = torch.randn(factor_of_site.shape, generator=generator)
            factor_of_site.data.copy_(drawn)
        Faithfulness(form=form)(model, found).backward()
        slopes.append(found.V[0].grad.norm())
    assert float(slopes[1] / slopes[0]) == pytest.approx(factor, rel=1e-5)
    named = site_change(3, 27)
    assert {"sum": named.faithful, "relative": named.relative}[form] == pytest.approx(factor)


def test_uniform_k_routing_masks_14_sites_together_instead_of_2():
    assert site_change(3, 27).together == (2, 14)
    rows = {
        row.term: row
        for row in advise(Setting(3, 512, 2048), Setting(27, 512, 2048), beta=0.2, p=0.4)
    }
    subset = next(row for term, row in rows.items() if "subset" in term)
    assert subset.factor == pytest.approx((28 / 54) / (4 / 6))
    assert "14 sites are masked together instead of 2" in subset.do
    layerwise = rows["recon, layerwise"]
    assert (layerwise.factor, layerwise.keep) == (pytest.approx(1 / 9), False)
    assert Recon(routing="layerwise").name == "stochastic_layerwise"


HALF = {0.1: -4.6, 0.01: -5.4, 0.001: -6.6, 1e-4: -8.4}
QUARTER = {0.1: -9, 0.01: -11, 0.001: -13, 1e-4: -17}
ENTROPY = {0.1: -6, 0.01: -7.5, 0.001: -10, 1e-4: -15}


@pytest.mark.parametrize("mean", MEANS)
def test_the_penalty_at_half_and_a_quarter_of_the_batch(mean):
    half, quarter = (batch_change(mean, N, N // part, 0.2) for part in (2, 4))
    assert round(100 * half.penalty, 1) == HALF[mean]
    assert round(100 * quarter.penalty) == QUARTER[mean]
    assert 100 * half.entropy == pytest.approx(ENTROPY[mean], abs=0.55)
    assert half.lp == quarter.lp == 0
    assert batch_change(mean, N, N // 4, 0.0).penalty == 0
    # The mean part of the penalty with the coefficient that is advised.
    old, new = 1 + 0.2 * math.log2(1 + mean * N), 1 + quarter.beta * math.log2(1 + mean * N / 4)
    assert new == pytest.approx(old, rel=1e-12)


@pytest.mark.parametrize("mean", MEANS)
def test_beta_makes_sixty_to_eighty_percent_of_the_pressure(mean):
    share = batch_change(mean, N, N, 0.2).share
    assert 0.6 <= share <= 0.8
    # Against autograd: the same component with and without beta. One value in 1024 is above 0.
    rows = 1 << 14
    active = max(1, round(mean * rows))
    a = torch.zeros(rows, 1, dtype=torch.float64)
    a[:active] = 1
    slopes = []
    for beta in (0.2, 0.0):
        leaf = a.clone().requires_grad_()
        form = LpMinimality(coefficient=1.0, beta=beta, p=1.0)
        form({"site": leaf}, count=rows).backward()
        slopes.append(float(leaf.grad.sum()))
    here = batch_change(active / rows, rows, rows, 0.2).share
    assert 1 - slopes[1] / slopes[0] == pytest.approx(here, rel=1e-6)


def test_the_pressure_changes_as_autograd_says():
    big = random_importances(64).clamp(min=1e-2)
    slopes = []
    for rows in (big, big[:16].repeat(4, 1), big[:16]):
        leaf = rows.clone().requires_grad_()
        LpMinimality(coefficient=1.0, beta=0.2, p=0.4)({"site": leaf}, count=len(rows)).backward()
        slopes.append((leaf.grad * len(rows))[:16])
    same = ((big[:16] + 1e-12) ** 0.4).mean(0)
    for component, mean in enumerate(same.tolist()):
        expected = 1 + batch_change(mean, 64, 16, 0.2).pressure
        ratio = slopes[2][:, component] / slopes[1][:, component]
        torch.testing.assert_close(ratio, torch.full_like(ratio, expected), rtol=1e-9, atol=0)


def test_a_uniform_importance_of_a_ten_thousandth_has_a_mean_of_a_fortieth():
    values = LpMinimality(p=0.4).values(torch.full((3, 1), 1e-4, dtype=torch.float64), 1.0)
    assert float(values.mean()) == pytest.approx(0.025, abs=2e-4)


def test_a_dead_component_counts_as_16_6_virtual_firings():
    floor = eps_floor(N, p=0.4, eps=1e-12, beta=0.2, components=49_152)
    assert floor.firings == pytest.approx(16.6, abs=0.05)
    assert floor.loss == pytest.approx(1.42, abs=0.005)
    rows = 1 << 10
    dead = torch.zeros(rows, 50, dtype=torch.float64)
    whole = LpMinimality(coefficient=1.0, beta=0.2, p=0.4)({"site": dead}, count=rows)
    small = eps_floor(rows, p=0.4, eps=1e-12, beta=0.2, components=50)
    assert float(whole) == pytest.approx(small.loss, rel=1e-9)


def drawn_bias(rate: float, world: int, positions: int, beta: float, draws: int = 400_000):
    """Return the bias of the log term and of the penalty, from drawn counts of firings."""
    generator = np.random.default_rng(0)
    local = generator.binomial(positions, rate, draws).astype(float)
    whole = generator.binomial(world * positions, rate, draws).astype(float)
    log_local = (local * np.log2(1 + world * local)).mean() / (positions * rate)
    log_whole = (whole * np.log2(1 + whole)).mean() / (world * positions * rate)
    return log_local / log_whole, (1 + beta * log_local) / (1 + beta * log_whole)


@pytest.mark.parametrize(("rate", "log_term", "penalty"), [(1e-5, 2.89, 1.56), (1e-4, 1.33, None)])
def test_a_local_estimator_of_64_ranks_is_biased(rate, log_term, penalty):
    found = shard_bias(rate=rate, world=64, positions=4096, beta=0.2)
    # The stated figures are drawn; the sums are exact.
    assert found.log_term == pytest.approx(log_term, rel=0.012)
    if penalty is not None:
        assert found.penalty == pytest.approx(penalty, rel=0.01)
    drawn = drawn_bias(rate, 64, 4096, 0.2)
    assert found.log_term == pytest.approx(drawn[0], rel=0.02)
    assert found.penalty == pytest.approx(drawn[1], rel=0.02)
    ours = shard_bias(rate=rate, world=1, positions=64 * 4096, beta=0.2)
    assert (ours.log_term, ours.penalty) == (1, 1)


def test_the_penalty_of_summed_shares_has_no_bias_and_that_of_local_ones_has():
    generator = torch.Generator().manual_seed(0)
    a = (torch.rand(64, 512, 200, generator=generator) < 1e-4).double()
    form = LpMinimality(coefficient=1.0, beta=0.2, p=1.0)
    whole = form({"site": a.flatten(0, 1)}, count=64 * 512)
    total = form.values(a.flatten(0, 1), 1.0).sum(0)
    summed = [form({"site": own}, count=64 * 512, reduce=lambda own: total) for own in a[:3]]
    local = [form({"site": own}, count=64 * 512, reduce=lambda own: 64 * own) for own in a]
    for one in summed:
        torch.testing.assert_close(one, whole, rtol=1e-12, atol=0)
    expected = shard_bias(rate=1e-4, world=64, positions=512, beta=0.2).penalty
    assert expected > 1.2
    assert float(torch.stack(local).mean() / whole) == pytest.approx(expected, rel=0.1)


def test_the_successor_with_its_reference_count_depends_on_neither_batch_nor_shards():
    a = random_importances(40)
    form = SmoothL0(coefficient=1e-3, frequency=2e-4, references=1e4, gamma=0.1)
    once, thrice = (form({"site": a.repeat(k, 1)}, count=40 * k) for k in (1, 3))
    torch.testing.assert_close(once, thrice, rtol=1e-12, atol=0)


def test_the_tables_name_what_to_change():
    before, after = Setting(3, 512, 2048), Setting(27, 128, 2048)
    rows = {row.term: row for row in advise(before, after, beta=0.2, p=0.4)}
    assert rows["faithfulness, sum / numel"].factor == pytest.approx(1 / 9)
    assert "x 9" in rows["faithfulness, sum / numel"].do
    assert not rows["importance minimality, entropy part, batch"].keep
    assert rows["importance minimality, L_p part, batch"].keep
    same = advise(before, before, beta=0.2, p=0.4)
    assert all(row.factor == 1 and row.keep for row in same)
    table = batch_table(before, after, 0.2)
    assert [row["M"] for row in table] == list(MEANS)
    assert [round(100 * row["penalty"]) for row in table] == list(QUARTER.values())


@pytest.mark.parametrize(
    "call",
    [
        lambda: site_change(0, 3),
        lambda: batch_change(0.0, 3, 3, 0.2),
        lambda: batch_change(0.1, 0, 3, 0.2),
        lambda: eps_floor(0, p=0.4, eps=1e-12, beta=0.2, components=3),
        lambda: eps_floor(5, p=0.4, eps=0.0, beta=0.2, components=3),
        lambda: shard_bias(rate=0.0, world=2, positions=4, beta=0.2),
        lambda: shard_bias(rate=0.1, world=0, positions=4, beta=0.2),
        lambda: Setting(3, 0),
    ],
)
def test_numbers_that_are_not_positive_are_refused(call):
    with pytest.raises(InputError):
        call()
