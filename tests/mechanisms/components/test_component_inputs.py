"""What a decomposition is given: networks of every precision, in training mode, with modules that
are no products, shared and computed weights; importances and factors that are damaged."""

from __future__ import annotations

import math

import pytest
import torch
from component_networks import TOKENS, Mixed, mixed
from torch import Tensor, nn

from assay.core.target import Batch, target
from assay.errors import InputError
from assay.mechanisms.components import (
    Decomposition,
    Faithfulness,
    Fresh,
    Objective,
    Persistent,
    Problem,
    Recon,
    Rows,
    components,
    decomposition,
    match_sites,
    start_at_data,
    start_at_singular,
)
from assay.mechanisms.components.halves import split_component
from assay.mechanisms.components.importance import Importance
from assay.mechanisms.components.minimality import RunningMeans
from assay.mechanisms.components.reconstruction import climb_ladder, open_scene, reconstruct
from assay.mechanisms.components.scene import diverge
from assay.mechanisms.components.singular import gate_scene, singular_parts

SITES = ["embed", "up", "out"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def first_logit(output: Tensor, batch: Batch) -> Tensor:
    return output[:, -1, 0].float()


def numbers(dtype: torch.dtype, importance: str = "shared") -> dict[str, float]:
    """Return what the objective, the evaluation and the gates find, the network in a precision."""
    model = Mixed().to(dtype)
    found = decomposition(model, SITES, 3, importance=importance, generator=seeded())
    start_at_singular(model, found, TOKENS, seeded())
    terms = (Recon(), Recon(Fresh(2, 0.5)), Recon(Persistent(), "all"))
    objective = Objective(terms, faithfulness=Faithfulness(), divergence="kl")
    problem = Problem(model, found, objective, seeded())
    weights = torch.tensor([[1.0, 1, 0], [1, 1, 1]])
    out = {
        name: float(term.detach())
        for name, term in problem(Rows(TOKENS, weights, 5), 0.5)[1].items()
    }
    scene = open_scene(model, found, TOKENS, "kl", seeded())
    out |= {row["masks"]: row["ce_difference"] for row in reconstruct(scene, TOKENS % 3).to_dicts()}
    out["ladder"] = climb_ladder(scene, (2,))["divergence"].item()
    own = gate_scene(
        scene, singular_parts(model, found), "gradient", dict.fromkeys(SITES, 1.0), TOKENS % 3
    )
    out["singular"] = reconstruct(own)["divergence"][1]
    mechanisms = components(target(model, first_logit), Batch(TOKENS), found)
    with torch.no_grad():
        assert torch.equal(
            mechanisms.values(mechanisms.ones()), mechanisms.target.values(mechanisms.batch)
        )
        out["base"] = float(mechanisms.values(mechanisms.full(0.0)).sum())
    return out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_number_is_that_of_float32_up_to_the_rounding_of_the_network(dtype):
    expected, found = numbers(torch.float32), numbers(dtype)
    near = max(16 * torch.finfo(dtype).eps, 1e-5)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=near, abs=near), name


@pytest.mark.parametrize("importance", ["scalar", "vector", "shared", "relative", "transformer"])
def test_components_start_at_the_data_of_a_network_of_another_precision(importance):
    model = Mixed().double()
    found = decomposition(model, SITES, 3, importance=importance, generator=seeded())
    start_at_data(model, found, TOKENS, seeded())
    assert all(bool(g.isfinite().all()) for g in found.importances(model, TOKENS).values())


def test_sums_over_many_positions_and_large_weights_stay_in_range():
    far = torch.tensor([[30.0, 0.0]]).half().expand(5000, 2)
    each = diverge(far.flip(1), far, "kl")
    assert each.dtype == torch.float32
    assert float(each.sum()) == pytest.approx(5000 * 30, rel=1e-3)
    assert float(diverge(far * 10, -far * 10, "mse").sum()) == pytest.approx(
        5000 * 600**2 / 2, rel=1e-3
    )
    model = nn.Sequential(nn.Linear(4, 4, bias=False)).half()
    model[0].weight.data.fill_(100.0)
    found = decomposition(model, "0", 1)
    with torch.no_grad():
        found.V[0].zero_()
    with torch.no_grad():
        assert float(Faithfulness()(model, found)) == pytest.approx(1.0)


def test_a_long_half_life_is_debiased_from_the_first_step_on():
    (site,) = match_sites(nn.Sequential(nn.Linear(2, 2)), "0", 3)
    state = RunningMeans([site], half_life=1e6)
    for _ in range(3):
        found = state.update({"0": torch.full((3,), 0.25)})
        torch.testing.assert_close(found["0"], torch.full((3,), 0.25), rtol=1e-6, atol=0)


class Random(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 3))


def test_a_network_in_training_mode_is_run_in_evaluation_mode_and_left_as_it_was():
    model, x = Random().train(), torch.randn(6, 4, generator=seeded())
    found = decomposition(model, ["0", "3"], 2, generator=seeded())
    start_at_data(model, found, x, seeded())
    before = {name: entry.clone() for name, entry in model.state_dict().items()}
    first, again = (
        reconstruct(open_scene(model, found, x, "mse", seeded()))["divergence"].to_list()
        for _ in range(2)
    )
    problems = [
        Problem(model, found, Objective((Recon(),)), seeded())(Rows(x), 0.5)[0] for _ in range(2)
    ]
    assert first == again
    assert torch.equal(*problems)
    assert model.training
    assert all(torch.equal(before[name], entry) for name, entry in model.state_dict().items())


class Scaled(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return 1.5 * super().forward(tokens)


def test_a_module_that_is_no_product_with_its_matrix_is_refused():
    model = nn.Sequential(Scaled(7, 4), nn.Linear(4, 3))
    found = decomposition(model, ["0", "1"], 2)
    calls = (
        lambda: open_scene(model, found, TOKENS, "mse", seeded()),
        lambda: components(target(model, first_logit), Batch(TOKENS), found),
        lambda: Problem(model, found, Objective(), seeded())(Rows(TOKENS), 0.5),
    )
    for call in calls:
        with pytest.raises(
            InputError, match=r"'0' writes something else than the product .*Scaled"
        ):
            call()
    plain = decomposition(model, "1", 2)
    open_scene(model, plain, TOKENS, "mse", seeded())


def test_weights_that_are_computed_at_every_look_are_not_taken_for_shared_ones():
    parametrized = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(*[parametrized(nn.Linear(4, 4)) for _ in range(6)])
    assert [site.name for site in match_sites(model, "*", 2)] == list("012345")


def test_a_tied_matrix_has_all_its_uses_whichever_of_them_is_named():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False))
    model[2].weight = model[0].weight
    for pattern in ("0", "2"):
        (site,) = match_sites(model, pattern, 2)
        assert (site.name, site.tied, site.components) == ("0", ("2",), 2)
    assert [site.name for site in match_sites(model, "1", 2)] == ["1"]


@pytest.mark.parametrize("count", [2.5, "2", 0, -1])
def test_the_number_of_components_is_a_whole_number_above_zero(count):
    with pytest.raises(InputError, match="needs at least 1 component"):
        match_sites(Mixed(), {"up": count})


class Given(Importance):
    """Logits that are made up."""

    def __init__(self, sites, make) -> None:
        super().__init__(sites)
        self.make = make

    def forward(self, inputs, inner, shares=None):
        return {name: self.make(3) for name in inputs if self.make(3) is not None}


DAMAGED = {
    "NaN": (lambda count: torch.full((2, 3, count), math.nan), "holds 18 NaN"),
    "one for all": (lambda count: torch.zeros(2, 3, 1), r"of shape \(2, 3, 3\), got \(2, 3, 1\)"),
    "too many": (lambda count: torch.zeros(2, 3, 4), r"got \(2, 3, 4\)"),
    "no examples": (lambda count: torch.zeros(3, count), r"got \(3, 3\)"),
    "whole": (lambda count: torch.ones(2, 3, count).long(), "must be real numbers.*int64"),
    "none": (lambda count: None, "got none"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_importances_are_refused(name):
    model, whole = mixed()
    make, message = DAMAGED[name]
    found = Decomposition(whole.sites, Given(whole.sites, make), seeded()).double()
    for call in (
        lambda: components(target(model, first_logit), Batch(TOKENS), found),
        lambda: open_scene(model, found, TOKENS, "mse", seeded()),
    ):
        with pytest.raises(InputError, match=f"the importances of '(embed|up|out)' .*{message}"):
            call()


def test_importances_outside_of_the_unit_interval_are_refused():
    model, whole = mixed()

    class Wide(Decomposition):
        def importances(self, model, inputs):
            return {name: 1.5 * g for name, g in super().importances(model, inputs).items()}

    found = Wide(whole.sites, Given(whole.sites, lambda count: torch.ones(2, 3, count)), seeded())
    with pytest.raises(
        InputError, match=r"importances of 'embed' must lie in \[0, 1\], got 1.5 to"
    ):
        components(target(model, first_logit), Batch(TOKENS), found)


def test_damaged_factors_and_masks_are_refused():
    model, found = mixed()
    bound = (target(model, first_logit), Batch(TOKENS), found)
    with pytest.raises(InputError, match=r"type torch.float32.*routed or not"):
        components(*bound, routed=torch.ones(2, 3))
    for component in (-1, 3):
        with pytest.raises(InputError, match=f"'up' has components 0 to 2, got {component}"):
            split_component(found, "up", component)
    with torch.no_grad():
        found.V[1][0, 0] = math.nan
    with pytest.raises(InputError, match=r"V\.1 of the decomposition holds 1 NaN"):
        components(*bound)
