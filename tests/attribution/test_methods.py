"""Every method on every tiny kind, against brute force over gates and finite differences in
float64.
"""

from __future__ import annotations

import pytest
import torch
from cases import KINDS, dictionary, displacements, rank_one, squared_logit, tiny_batch
from torch import nn

import assay.attribution.exact as exact_module
from assay.attribution import (
    Exact,
    Gradient,
    IntegratedGradients,
    SecondOrder,
    ablate,
    attribute,
    every,
)
from assay.core.target import Batch, Target
from assay.errors import InputError

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def shifted(mechanisms, name, place, value):
    """Return the metric with one gate set to a value, by plain gates and a full forward."""
    gates = mechanisms.ones([name])
    gates[name][(..., *place)] = value
    with torch.no_grad():
        return mechanisms.values(gates)


@kinds
def test_exact_is_brute_force(kind):
    mechanisms = kind()
    scores = attribute(mechanisms, Exact())
    for name in mechanisms.groups:
        for place in every(mechanisms, name):
            effect = mechanisms.values() - shifted(mechanisms, name, place, 0.0)
            torch.testing.assert_close(
                scores.values[name][(slice(None), *place)], effect.detach(), rtol=1e-10, atol=1e-12
            )


@kinds
def test_gradient_and_second_order_are_finite_differences(kind):
    mechanisms = kind()
    first, second = attribute(mechanisms), attribute(mechanisms, SecondOrder())
    step = 1e-4
    for name in mechanisms.groups:
        for place in every(mechanisms, name):
            up, here, down = (shifted(mechanisms, name, place, 1 + s) for s in (step, 0.0, -step))
            slope, bend = (up - down) / (2 * step), (up - 2 * here + down) / step**2
            torch.testing.assert_close(
                first.values[name][(slice(None), *place)], slope, rtol=1e-5, atol=1e-6
            )
            torch.testing.assert_close(
                second.values[name][(slice(None), *place)], slope - bend / 2, rtol=1e-4, atol=1e-5
            )


@kinds
@pytest.mark.parametrize("scope", ["group", "joint"])
def test_integrated_gradients_are_complete(kind, scope):
    mechanisms = kind()
    scores = attribute(mechanisms, IntegratedGradients(scope=scope, tolerance=1e-4, max_nodes=129))
    paths = (
        [[name] for name in mechanisms.groups] if scope == "group" else [list(mechanisms.groups)]
    )
    for path in paths:
        change = (mechanisms.values() - mechanisms.values(mechanisms.full(0.0, path))).detach()
        total = sum(scores.values[name].flatten(1).sum(1) for name in path)
        assert (total - change).abs().mean() <= 1.01e-4 * change.abs().mean() + 1e-12
        gap = scores.gaps["all" if scope == "joint" else path[0]]
        assert gap.relative == pytest.approx(
            float((total - change).abs().mean() / change.abs().mean()), abs=1e-9
        )


def test_integrated_gradients_spend_no_more_than_allowed_and_report_the_gap():
    scores = attribute(dictionary(), IntegratedGradients(tolerance=1e-12, max_nodes=5))
    assert all(gap.nodes <= 5 for gap in scores.gaps.values())
    assert any(gap.relative > 1e-12 for gap in scores.gaps.values())
    for bad in ({"scope": "layer"}, {"tolerance": 0.0}, {"max_nodes": 2}):
        with pytest.raises(InputError):
            attribute(dictionary(), IntegratedGradients(**bad))


class Linear(nn.Module):
    def __init__(self, power: int):
        super().__init__()
        self.power = power
        self.up = nn.Linear(3, 4, bias=False).double()
        self.up.weight.data = torch.randn(
            4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )

    def forward(self, x):
        return (self.up(x) ** self.power).sum((1, 2))


def weight_parts(power: int):
    class Site(rank_one().__class__):
        site = "up"

        @property
        def _factors(self):
            weight = self.target.model.up.weight.detach().T
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            return left * values, right, torch.zeros_like(weight)

    return Site(Target(Linear(power), lambda output, batch: output), tiny_batch())


def test_gradient_is_exact_on_a_linear_network_and_second_order_on_a_quadratic_one():
    for power, method in ((1, Gradient()), (2, SecondOrder())):
        mechanisms = weight_parts(power)
        estimate, truth = attribute(mechanisms, method), attribute(mechanisms, Exact())
        for name in mechanisms.groups:
            torch.testing.assert_close(
                estimate.values[name], truth.values[name], rtol=1e-12, atol=1e-12
            )
    first, truth = attribute(weight_parts(2)), attribute(weight_parts(2), Exact())
    assert not torch.allclose(first.values["components"], truth.values["components"], rtol=0.1)


def test_every_example_can_lose_a_part_of_its_own():
    mechanisms = dictionary()
    generator = torch.Generator().manual_seed(0)
    index = torch.stack(
        [
            torch.randint(0, n, (7, 5), generator=generator)
            for n in mechanisms.groups["features"].axes
        ],
        dim=-1,
    )
    rows = ablate(mechanisms, "features", index)
    dense = attribute(mechanisms, Exact())
    torch.testing.assert_close(rows, dense.at("features", index), rtol=1e-10, atol=1e-12)


def test_chunks_and_the_unbatched_fallback_give_the_same_numbers(monkeypatch):
    mechanisms = dictionary()
    index = every(mechanisms, "features")
    expected = ablate(mechanisms, "features", index)
    torch.testing.assert_close(
        ablate(mechanisms, "features", index, budget=1), expected, rtol=1e-12, atol=1e-13
    )

    def refuse(function):
        def call(*args):
            raise RuntimeError("vmap: data-dependent control flow")

        return call

    monkeypatch.setattr(exact_module.torch.func, "vmap", refuse)
    torch.testing.assert_close(
        ablate(mechanisms, "features", index), expected, rtol=1e-12, atol=1e-13
    )


def test_inactive_parts_have_no_effect_in_float32():
    mechanisms = dictionary(dtype=torch.float32)
    scores = attribute(mechanisms, Exact())
    inactive = mechanisms.norms()["features"] == 0
    assert inactive.any()
    assert (scores.values["features"][inactive] == 0).all()


def test_bad_part_indices_are_refused():
    with pytest.raises(InputError, match="within"):
        ablate(dictionary(), "features", torch.tensor([[0, 6]]))
    with pytest.raises(InputError, match="shared"):
        ablate(displacements(), "directions", torch.zeros(2, 5, 1, dtype=torch.long))


def test_nan_activations_are_refused():
    mechanisms = dictionary()
    broken = Target(
        mechanisms.target.model, lambda output, batch: squared_logit(output, batch) / 0 * 0
    )
    with pytest.raises(InputError, match="NaN or infinite"):
        attribute(type(mechanisms)(broken, mechanisms.batch, patch=mechanisms.patch))
    with pytest.raises(InputError, match="NaN"):
        Batch(torch.tensor([[float("nan")]]))
    with pytest.raises(InputError, match="empty"):
        Batch(torch.zeros(0, 3))


def test_tables_name_parts_and_keep_statistics():
    scores = attribute(dictionary())
    table = scores.to_polars()
    row = table.filter(table["part"] == "features[0, 1]").row(0, named=True)
    values = scores.values["features"][:, 0, 1]
    assert row["score"] == pytest.approx(float(values.mean()))
    assert row["sd"] == pytest.approx(float(values.std()))
    assert row["n"] == 5
    assert scores.top(3)["size"].is_sorted(descending=True)
    assert scores.estimand == "single removal"
    assert scores.reference == "counterfactual"
    assert "single removal" in scores._repr_html_()
