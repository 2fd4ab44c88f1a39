"""The objective of a step against a plain loop, its bad input, and the terms that are not
finite."""

from __future__ import annotations

import pytest
import torch
from component_networks import TOKENS, mixed
from torch import nn

from assay.errors import AssayError, InputError
from assay.io.runs import Run
from assay.mechanisms.components import (
    Faithfulness,
    Fresh,
    LpMinimality,
    Merged,
    Monitor,
    Objective,
    Persistent,
    Problem,
    Recon,
    Rows,
    SmoothL0,
    Stochastic,
    Training,
    decomposition,
    skip_zeros,
    start_at_data,
    start_at_singular,
    train,
    zeros_are_inert,
)
from assay.mechanisms.components.decomposition import read_clean
from assay.mechanisms.components.masks import make_mask, run_masked
from assay.mechanisms.components.squash import lower, upper
from assay.targets.tms import TMS


def test_the_loss_of_a_step_is_the_sum_written_out():
    model, found = mixed()
    objective = Objective(
        (Recon(coefficient=0.7), Recon(routing="layerwise", coefficient=0.2)),
        LpMinimality(coefficient=1e-2, beta=0.3, p=0.9),
        Faithfulness(0.4),
    )
    problem = Problem(model, found, objective, torch.Generator().manual_seed(3))
    loss, terms = problem(Rows(TOKENS), 1.0)
    generator = torch.Generator().manual_seed(3)

    def draw(shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def masked_error(names, drawn):
        masks = {
            name: make_mask(g[name], drawn[name][..., :-1], drawn[name][..., -1]) for name in names
        }
        return ((run_masked(model, TOKENS, found, masks) - model(TOKENS)) ** 2).mean()

    z = found.logits(read_clean(model, TOKENS, found.sites))
    g = {name: lower(entry) for name, entry in z.items()}
    names = list(g)

    def sources():
        return {name: draw((*TOKENS.shape, 4)) for name in names}

    every = masked_error(names, sources())
    single = sum(masked_error([name], sources()) for name in names) / 3
    totals = [((upper(entry) + 1e-12) ** 0.9).flatten(0, 1).sum(0) for entry in z.values()]
    sparse = 1e-2 * sum((s / 6 * (1 + 0.3 * (1 + s).log2())).sum() for s in totals)
    faithful = sum(
        ((site.matrix(model) - v @ u) ** 2).sum() / (site.matrix(model) ** 2).sum()
        for site, v, u in zip(found.sites, found.V, found.U, strict=True)
    )
    torch.testing.assert_close(terms["stochastic_all"], every)
    torch.testing.assert_close(terms["stochastic_layerwise"], single)
    torch.testing.assert_close(terms["minimality"], sparse)
    torch.testing.assert_close(terms["faithfulness"], faithful)
    torch.testing.assert_close(loss, 0.7 * every + 0.2 * single + sparse + 0.4 * faithful)


@pytest.mark.parametrize(
    "source", [Stochastic(), Fresh(2, 0.5), Persistent(warm=1), Merged(Persistent(warm=1))]
)
@pytest.mark.parametrize("routing", ["all", "layerwise", "subset"])
def test_every_source_trains_with_every_routing(source, routing):
    model, found = mixed()
    problem = Problem(
        model,
        found,
        Objective((Recon(source, routing),), SmoothL0(half_life=3.0, frequency=1e-3)),
        torch.Generator().manual_seed(0),
    ).double()
    before = {name: entry.clone() for name, entry in problem.adversaries.state_dict().items()}
    for _ in range(2):
        loss, terms = problem(Rows(TOKENS), 0.5)
        loss.backward()
        problem.finish()
    assert set(terms) == {f"{type(source).__name__.lower()}_{routing}", "minimality"}
    assert all(parameter.grad is not None for parameter in found.parameters())
    assert all(bool(parameter.grad.isfinite().all()) for parameter in found.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    after = problem.adversaries.state_dict()
    sources = [name for name in after if ".source_" in name]
    assert bool(sources) == isinstance(source, Persistent | Merged)
    assert all(not torch.equal(after[name], before[name]) for name in sources)


def test_the_main_backward_pass_is_one_more_ascent():
    model, found = mixed()
    term = Recon(Persistent(warm=2))
    problem = Problem(model, found, Objective((term,)), torch.Generator().manual_seed(0)).double()
    loss, _ = problem(Rows(TOKENS), 0.5)
    (adversary,) = problem.adversaries.values()
    assert int(adversary.steps) == 2
    loss.backward()
    problem.finish()
    assert int(adversary.steps) == 3
    values = []
    for _ in range(6):
        loss, terms = problem(Rows(TOKENS), 0.5)
        loss.backward()
        problem.finish()
        values.append(float(terms["persistent_all"].detach()))
    assert values[-1] > values[0]


def small_tms() -> TMS:
    model = TMS(5, 2)
    angles = 2 * torch.pi * torch.arange(5) / 5
    with torch.no_grad():
        model.linear1.weight.copy_(1.13 * torch.stack([angles.cos(), angles.sin()]))
        model.linear2.weight.copy_(model.linear1.weight.T)
        model.linear2.bias.fill_(-0.25)
    return model


def draw_sparse_rows(generator: torch.Generator, rows: int = 256) -> torch.Tensor:
    x = torch.rand(rows, 5, generator=generator)
    return x * (torch.rand(x.shape, generator=generator) < 0.1)


def test_duplicate_rows_of_zeros_are_skipped_exactly():
    model = small_tms()
    found = decomposition(model, "*", 6)
    assert zeros_are_inert(model, found, 5)
    x = draw_sparse_rows(torch.Generator().manual_seed(0))
    kept = skip_zeros(x)
    assert len(kept.inputs) < len(x) == kept.count
    assert float(kept.weights.sum()) == len(x)
    objective = Objective((Recon(Fresh(1, 0.1)),), LpMinimality(beta=0.2), Faithfulness())
    gradients = []
    for rows in (Rows(x), kept):
        problem = Problem(model, found, objective, torch.Generator().manual_seed(0))
        found.zero_grad()
        loss, _ = problem(rows, 0.5)
        loss.backward()
        gradients.append([loss.detach(), *(entry.grad.clone() for entry in found.parameters())])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-4, atol=1e-6)
    assert skip_zeros(x[(x != 0).any(1)]).weights is None
    biased = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    assert not zeros_are_inert(biased, decomposition(biased, "*", 2), 5)


def trained(run: Run | None, steps: int = 40, *, objective: Objective | None = None):
    model = small_tms()
    generator = torch.Generator().manual_seed(0)
    found = decomposition(model, "*", 6, generator=generator)
    start_at_data(model, found, draw_sparse_rows(generator), generator)
    train(
        model,
        found,
        objective
        or Objective(
            (Recon(), Recon(Merged(), "subset"), Recon(Persistent(), "layerwise")),
            SmoothL0(1e-3, frequency=1e-4, references=100.0, half_life=10.0),
        ),
        lambda generator: skip_zeros(draw_sparse_rows(generator)),
        Training(steps=steps, warmup_steps=20, log_every=10, save_every=10),
        generator=generator,
        run=run,
    )
    return found


class StoppedError(Exception):
    pass


def test_training_resumes_to_the_same_bits(tmp_path, monkeypatch):
    whole = trained(Run(tmp_path / "whole"))
    saved = Run.save_state

    def stop_at_third(self, name, state):
        saved(self, name, state)
        if name == "components.pt" and state["step"] == 30:
            raise StoppedError

    monkeypatch.setattr(Run, "save_state", stop_at_third)
    with pytest.raises(StoppedError):
        trained(Run(tmp_path / "killed"))
    monkeypatch.setattr(Run, "save_state", saved)
    resumed = trained(Run(tmp_path / "killed"))
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_training_lowers_the_loss_and_leaves_the_network_alone():
    model = small_tms()
    before = {name: entry.clone() for name, entry in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    found = decomposition(model, "*", 6, generator=generator)
    objective = Objective((Recon(),), SmoothL0(1e-3), Faithfulness())
    rows = Rows(draw_sparse_rows(torch.Generator().manual_seed(5), 2000))

    def loss() -> float:
        problem = Problem(model, found, objective, torch.Generator().manual_seed(1))
        return float(problem(rows, 1.0)[0].detach())

    first = loss()
    train(
        model,
        found,
        objective,
        lambda generator: skip_zeros(draw_sparse_rows(generator)),
        Training(steps=60, rate=3e-3, warmup_steps=100),
        generator=generator,
    )
    assert loss() < first / 3
    assert float(Faithfulness()(model, found).detach()) < 1e-2
    assert all(torch.equal(model.state_dict()[name], entry) for name, entry in before.items())
    assert not any(parameter.grad is not None for parameter in model.parameters())


class Breaks(SmoothL0):
    """A penalty that is NaN from a share of training on."""

    def values(self, upper, done):
        return super().values(upper, done) * (float("nan") if done > 0.6 else 1.0)


def test_a_loss_that_is_not_finite_names_its_term_and_keeps_the_last_good_state(tmp_path):
    run = Run(tmp_path / "run")
    with pytest.raises(AssayError, match="minimality is nan") as raised:
        trained(run, objective=Objective((Recon(),), Breaks()))
    assert "stochastic" not in str(raised.value)
    assert "step 25" in str(raised.value)
    state = run.state("components.pt")
    assert state["step"] == 20
    assert all(bool(entry.isfinite().all()) for entry in state["model"].values())


def test_a_start_at_singular_parts_is_the_matrix_and_its_largest_parts():
    model, found = mixed(3, importance="relative", hidden=4)
    start_at_singular(model, found, TOKENS, torch.Generator())
    for site in found.sites:
        v, u = found.factors(site.name)
        matrix = site.matrix(model).detach()
        left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
        torch.testing.assert_close(v @ u, left[:, :3] * sizes[:3] @ right[:3])
        torch.testing.assert_close(v.norm(dim=0), u.norm(dim=1))
    values = torch.cat([g.flatten() for g in found.importances(model, TOKENS).values()])
    assert 0 < float((values > 0.5).double().mean()) < 0.6
    model, found = mixed(4, importance="shared")
    with pytest.raises(InputError, match="'out' has 4 components and its matrix 3 singular parts"):
        start_at_singular(model, found, TOKENS, torch.Generator())


def test_a_start_at_data_is_where_single_features_are():
    model = small_tms()
    found = decomposition(model, "*", 8)
    generator = torch.Generator().manual_seed(0)
    start_at_data(model, found, draw_sparse_rows(generator, 2000), generator)
    v, u = found.factors("linear1")
    largest = v[:, :5].abs() / v[:, :5].norm(dim=0)
    assert sorted(largest.argmax(0).tolist()) == [0, 1, 2, 3, 4]
    assert (largest.amax(0) > 0.97).all()
    # The decoder's features are on the side of its outputs.
    v, u = found.factors("linear2")
    largest = u[:5].abs() / u[:5].norm(dim=1, keepdim=True)
    assert sorted(largest.argmax(1).tolist()) == [0, 1, 2, 3, 4]
    # Large features interfere with their neighbours; the direction without that recurs most.
    assert (largest.amax(1) > 0.9999).all()
    for site, v, u in zip(found.sites, found.V, found.U, strict=True):
        matrix = site.matrix(model)
        assert float((matrix - v @ u).detach().norm() / matrix.detach().norm()) < 0.5
    with pytest.raises(InputError, match="reads nothing but zeros"):
        start_at_data(model, found, torch.zeros(4, 5), generator)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Objective(()), "recon is empty"),
        (lambda: Objective((Recon(Monitor("ci")),)), "watched and never trained on"),
        (lambda: Objective(divergence="l1"), "unknown divergence 'l1'"),
        (lambda: Recon(routing="layer-wise"), "did you mean layerwise"),
        (lambda: Recon(coefficient=-1.0), "coefficient must be at least 0"),
        (lambda: Faithfulness(form="summ"), "did you mean sum"),
        (lambda: Training(steps=0), "steps must be at least 1"),
        (lambda: Training(rate=0.0), "rate must be above 0"),
        (lambda: Training(importance_rate=-1.0), "importance_rate must be above 0"),
        (lambda: Training(warmup_steps=-1), "warmup_steps"),
        (lambda: Training(floor=2.0), "floor must lie"),
    ],
)
def test_bad_objectives_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_terms_of_one_kind_are_numbered():
    terms = (Recon(), Recon(coefficient=0.5), Recon(routing="subset"))
    assert Objective(terms).names == ("stochastic_all", "stochastic_all_1", "stochastic_subset")
