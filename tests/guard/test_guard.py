"""The acceptor: nothing is accepted without evidence, more explanations explain more, the tests
keep their level, and bad input is refused or rejected."""

from __future__ import annotations

import itertools
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from laboratories import chain, three

from assay.errors import InputError
from assay.guard import Explanation, Observed, Settings, fit, split
from assay.guard.admission import Laboratory, admit, candidates
from assay.guard.compiled import compile_explanations
from assay.guard.fitting import calibrate, laboratory
from assay.guard.tables import lower_bound

few = settings(max_examples=25, deadline=None)
SMALL = Settings(bins=4, least=10)


@pytest.fixture(scope="module")
def parts() -> list[Observed]:
    return three()


@pytest.fixture(scope="module")
def guard(parts):
    return fit(*parts, SMALL)


def test_without_explanations_everything_is_rejected(parts):
    bare = fit(*parts, replace(SMALL, modes=()))
    assert not bare.explanations
    for data in (*parts, chain(300, seed=9)):
        verdicts = bare(data)
        assert not verdicts.accepted.any()
        assert bool((verdicts.why == 2).all())


def test_most_new_inputs_are_accepted_with_explanations(guard):
    verdicts = guard(chain(1000, seed=5))
    assert float(verdicts.accepted.double().mean()) > 0.85
    assert {one.form for one in guard.explanations} >= {"edge", "root"}


def test_constants_alone_accept_only_where_all_features_are_constant(parts):
    only = fit(*parts, replace(SMALL, modes=("constant",)))
    assert not only(parts[0]).accepted.any()
    flat = [replace(part, values=torch.zeros_like(part.values)) for part in parts]
    constant = fit(*flat, replace(SMALL, modes=("constant",)))
    assert len(constant.explanations) == 5
    fresh = replace(chain(50, seed=8), values=torch.zeros(50, 5))
    assert bool(constant(fresh).explained.all())
    moved = fresh.values.clone()
    moved[:, 2] = 0.1  # fires, which it never did
    assert not constant(replace(fresh, values=moved)).accepted.any()


@few
@given(st.integers(0, 2**31), st.integers(0, 40))
def test_adding_an_explanation_only_enlarges_what_is_explained(parts, seed, count):
    lab, quantiser, _ = laboratory(parts[0], parts[1], SMALL)
    admitted, _ = admit(lab, candidates(lab, marginals=True, added=True))
    chosen = torch.randperm(len(admitted), generator=torch.Generator().manual_seed(seed)).tolist()
    some = [admitted[place] for place in chosen[:count]]
    more = [admitted[place] for place in chosen[: count + 1]]
    data = chain(200, seed=seed)
    bins, roots = quantiser(data.values), torch.zeros(200, dtype=torch.long)
    less = compile_explanations(lab, some).explained(bins, roots)
    assert bool((compile_explanations(lab, more).explained(bins, roots) >= less).all())


def test_every_accepted_event_has_its_evidence(guard, parts):
    lab, _, _ = laboratory(parts[0], parts[1], SMALL)
    data = chain(300, seed=3)
    verdicts = guard(data)
    roots = guard.scorer.roots(data)
    delta = SMALL.delta / lab.tables.candidates
    assert lab.needed > 1
    for row in verdicts.accepted.nonzero()[:40, 0].tolist():
        for feature in range(5):
            best = 0
            for one in guard.explanations:
                if feature not in one.features:
                    continue
                first, *rest = (int(verdicts.bins[row, place]) for place in one.features)
                i, *j = one.features
                seen = {
                    "edge": lambda: lab.tables.pairs[i, first, j[0], rest[0]],
                    "root": lambda: lab.tables.rooted[roots[row], i, first],
                    "marginal": lambda: lab.tables.single[i, first],
                }[one.form]()
                best = max(best, int(seen))
            assert lower_bound(best, lab.tables.total, delta) >= SMALL.theta


def test_the_likelihood_of_a_forest_sums_to_one(parts):
    data = parts[0].columns([0, 1, 2])
    lab, _, classes = laboratory(data, parts[1].columns([0, 1, 2]), replace(SMALL, bins=3))
    explanations = [Explanation("root", (0,)), Explanation("edge", (0, 1)),
                    Explanation("edge", (1, 2))]  # fmt: skip
    compiled = compile_explanations(lab, explanations)
    sizes = lab.tables.sizes.tolist()
    every = torch.tensor(list(itertools.product(*map(range, sizes))))
    total = 0.0
    for root in range(len(classes) + 1):
        cost, _ = compiled.likelihood(every, torch.full((len(every),), root))
        total += float((-cost.double()).exp().sum())
    assert total == pytest.approx(1, abs=1e-5)


def test_likelihood_and_dependence_are_those_of_the_tables(parts):
    lab, quantiser, _ = laboratory(parts[0], parts[1], SMALL)
    edges = [Explanation("edge", (0, 1)), Explanation("edge", (1, 2))]
    compiled = compile_explanations(lab, edges)
    bins = quantiser(parts[1].values)
    cost, dependence = compiled.likelihood(bins, torch.zeros(len(bins), dtype=torch.long))
    p = lab.tables.marginals()
    for row in range(20):
        terms = 0.0
        for edge in edges:
            i, j = edge.features
            a, b = int(bins[row, i]), int(bins[row, j])
            terms += float((p[i, a] * p[j, b] / lab.tables.joint(i, j)[a, b]).log())
        plain = -sum(float(p[i, int(bins[row, i])].log()) for i in range(5))
        root = -float(compiled.root_log[0])
        assert float(dependence[row]) == pytest.approx(terms, abs=1e-4)
        assert float(cost[row]) == pytest.approx(plain + terms + root, abs=1e-4)


def test_edges_need_to_pay_and_to_hold_on_the_fresh_split(parts):
    independent = [replace(part, values=torch.randn(part.values.shape,
                   generator=torch.Generator().manual_seed(4 + at)), keys=part.keys)
                   for at, part in enumerate(parts)]  # fmt: skip
    lab, _, _ = laboratory(independent[0], independent[1], SMALL)
    assert not [one for one in admit(lab, candidates(lab, marginals=False, added=True))[0]
                if one.form == "edge"]  # fmt: skip
    mixed, _, _ = laboratory(parts[0], independent[1], SMALL)
    admitted, refused = admit(mixed, candidates(mixed, marginals=False, added=True))
    assert not [one for one in admitted if one.form == "edge"]
    assert any("a fresh split contradicts its table" in one.reason for one in refused)


def test_the_first_explanation_unblocks_most(parts):
    lab, _, _ = laboratory(parts[0], parts[1], SMALL)
    every = [one for one in candidates(lab, marginals=True, added=True) if one.bits > 0]
    admitted, _ = admit(lab, every)
    unblocked = [int(lab.explained(one).sum()) * len(one.features) for one in every]
    assert admitted[0].explains == max(unblocked)
    gains = [one.explains for one in admitted]
    assert gains == sorted(gains, reverse=True)
    assert admit(lab, every, most=2)[0] == admitted[:2]


def test_the_tests_keep_their_level_over_resplits(parts):
    guard = fit(*parts, SMALL)
    pool = chain(400, seed=21)
    shares = []
    for seed in range(200):
        one, other = split(pool, (0.5, 0.5), seed)
        verdicts = calibrate(guard, parts[1], one)(other)
        shares.append(float((verdicts.p <= SMALL.alpha).double().mean()))
    rates = torch.tensor(shares, dtype=torch.float64)
    error = float(rates.std()) / len(rates) ** 0.5
    nominal = int(SMALL.alpha * 201) / 201  # of 200 calibration inputs
    assert abs(float(rates.mean()) - nominal) < 3 * error
    assert float(rates.mean()) <= SMALL.alpha + 3 * error


def test_single_p_values_count_the_calibration_scores(guard, parts):
    data = chain(30, seed=4)
    verdicts = guard(data)
    own = guard.scorer(parts[2]).scores
    found = guard.single_p_values(verdicts)
    for test, name in enumerate(guard.scorer.tests):
        for row in range(30):
            score = verdicts.scores[test, row]
            upper = (1 + int((own[test] >= score).sum())) / 201
            lower = (1 + int((own[test] <= score).sum())) / 201
            wanted = min(1, 2 * min(upper, lower)) if name in ("likelihood", "distance") else upper
            assert float(found[name][row]) == pytest.approx(wanted)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_rejected(guard, bad):
    data = chain(20, seed=6)
    values, logits = data.values.clone(), data.logits.clone()
    values[3, 1] = bad
    logits[5, 0] = bad
    before = guard(data)
    verdicts = guard(Observed(values, data.names, logits))
    for row in (3, 5):
        assert verdicts.why[row] == 1
        assert not verdicts.accepted[row]
        assert verdicts.p[row] == 0
        assert not verdicts.explained[row].any()
    others = [row for row in range(20) if row not in (3, 5)]
    assert torch.equal(verdicts.accepted[others], before.accepted[others])


def test_values_that_overflow_are_rejected(guard):
    data = chain(4, seed=6)
    assert not guard(replace(data, values=data.values * 1e30)).accepted.any()


def test_a_root_value_without_evidence_is_rejected(parts):
    guard = fit(*parts, SMALL)
    data = chain(20, seed=6)
    logits = torch.cat([data.logits, torch.full((20, 1), 99.0)], 1)
    verdicts = guard(replace(data, logits=logits))
    assert not verdicts.explained.any()


def test_memorised_inputs_alone(parts):
    guard = fit(*parts, replace(SMALL, modes=("memorise",)))
    assert bool(guard(parts[0]).accepted.all())
    assert bool((guard(parts[0]).why == 4).all())
    assert not guard(parts[1]).accepted.any()


def test_many_inputs_are_judged_as_one_by_one(guard):
    data = chain(2500, seed=12)
    whole = guard(data)
    for row in (0, 1023, 1024, 2499):
        one = guard(data.take(slice(row, row + 1)))
        assert bool(one.accepted[0]) == bool(whole.accepted[row])
        assert float(one.p[0]) == pytest.approx(float(whole.p[row]), abs=0.011)
    assert len(guard(data.take(slice(0, 0)))) == 0


def test_splits_must_be_disjoint_and_not_empty(parts):
    tables, fresh, calibration = parts
    nothing = calibration.take(slice(0, 0))
    for bad, message in (
        ((tables, fresh, nothing), "the calibration split is empty"),
        ((tables, fresh, tables), "calibration split shares 400 inputs with the training"),
        ((tables, fresh, fresh), "calibration split shares 200 inputs with the fresh"),
        ((tables, tables, calibration), "fresh split shares 400 inputs with the training"),
        ((tables, nothing, calibration), "the fresh split is empty"),
        ((nothing, fresh, calibration), "the training split is empty"),
        ((tables, fresh.columns([0, 1]), calibration), "other features"),
    ):
        with pytest.raises(InputError, match=message):
            fit(*bad, SMALL)
    dirty = replace(fresh, values=fresh.values * torch.nan)
    with pytest.raises(InputError, match="holds NaN"):
        fit(tables, dirty, calibration, SMALL)
    guard = fit(*parts, SMALL)
    with pytest.raises(InputError, match="shares 1 input with the training"):
        calibrate(guard, fresh, tables.take(slice(0, 1)))
    with pytest.raises(InputError, match="a reference score is NaN"):
        calibrate(guard, fresh, replace(calibration, values=calibration.values * torch.nan))


def test_edges_that_close_a_cycle_are_refused(parts):
    cycle = [Explanation("edge", pair) for pair in ((0, 1), (1, 2), (2, 0))]
    with pytest.raises(InputError, match=r"'f\[2\]' -> 'f\[0\]' closes a cycle"):
        fit(*parts, SMALL, given=cycle)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"modes": ("ad",)}, "unknown guard mode 'ad'"),
        ({"alpha": 0.0}, "alpha must lie"),
        ({"theta": 1.0}, "theta must lie"),
        ({"delta": float("nan")}, "delta must lie"),
        ({"bins": 1}, "bins must be a whole number of at least 2"),
        ({"most": -1}, "most must be"),
    ],
)
def test_settings_are_refused_by_name(keys, message):
    with pytest.raises(InputError, match=message):
        Settings(**keys)


@pytest.mark.parametrize(
    ("values", "names", "logits", "message"),
    [
        (torch.zeros(3), ("a",), None, r"must be \(inputs, features\)"),
        (torch.zeros(3, 2), ("a", "a"), None, "1 of them distinct"),
        (torch.zeros(3, 2), ("a",), None, "one name per feature"),
        (torch.zeros(3, 1), ("a",), torch.zeros(2, 2), r"logits must be \(3, classes\)"),
    ],
)
def test_observations_that_do_not_fit_are_refused(values, names, logits, message):
    with pytest.raises(InputError, match=message):
        Observed(values, names, logits)


def test_other_features_are_refused(guard):
    data = chain(3, seed=1)
    with pytest.raises(InputError, match=r"does not know 'g'"):
        guard(replace(data, names=(*data.names[:-1], "g")))
    with pytest.raises(InputError, match="reads the network's logits"):
        guard(replace(data, logits=None))


def test_a_guard_without_logits_has_three_tests(parts):
    bare = [replace(part, logits=None) for part in parts]
    guard = fit(*bare, SMALL)
    assert guard.scorer.tests == ("likelihood", "dependence", "distance")
    data = replace(chain(1000, seed=5), logits=None)
    assert float(guard(data).accepted.double().mean()) > 0.85


def test_a_laboratory_is_what_admission_reads(parts):
    lab, _, _ = laboratory(parts[0], parts[1], SMALL)
    assert isinstance(lab, Laboratory)
    with pytest.raises(InputError, match="leave none for a share"):
        split(parts[0].take(slice(0, 2)), (0.9, 0.05, 0.05))
