"""Claims of the mean cross-entropy: supported where they are shown, refused where they are not."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checker_cases import (
    KINDS,
    Tensors,
    Truth,
    certify,
    draw,
    right,
    sizes_of,
    write_tensors,
)
from flint import arb, ctx
from test_check_execution import executed

from assay.errors import AssayError
from assay.proofs.max_of_k.prove import prove_cross_entropy
from assay.targets.max_of_k import from_tensors
from assay_check import InputError, Verdict, check
from assay_check.max_of_k import cross_entropy
from assay_check.max_of_k.execution import logit_error
from assay_check.max_of_k.margins import Margins
from assay_check.max_of_k.model import Model

EVERYTHING = {"name": "all inputs alike", "tokens": None, "cells": None}


def claim(
    folder: Path,
    w: Tensors,
    bound: Fraction | str,
    /,
    **changes: Any,
) -> tuple[Path, Path]:
    """Write a claim of the mean cross-entropy by hand; return the certificate and the weights."""
    settings = {"rule": "cross-entropy", "measure": EVERYTHING, **changes}
    return certify(folder, w, 0, None, claim={"cross_entropy": str(bound)}, **settings)


def recomputed(folder: Path, w: Tensors, level: str = "real") -> Fraction | None:
    """Return the bound that the checker finds, or none."""
    return check(*claim(folder, w, "1000000", level=level)).bound


def above(bound: Fraction, value: arb) -> bool:
    with ctx.workprec(400):
        return bool(arb(bound.numerator) / arb(bound.denominator) > value)


@pytest.mark.parametrize("kind", KINDS)
def test_the_recomputed_bound_is_above_the_mean_loss(kind: str, tmp_path: Path) -> None:
    finite = 0
    for seed in range(12):
        w = draw(seed, kind, most=100)
        bound = recomputed(tmp_path, w)
        if bound is not None:
            finite += 1
            assert above(bound, Truth(w).mean_loss()), seed
    assert finite or kind in ("huge", "mixed", "steep")


@pytest.mark.parametrize("kind", ["right", "rough", "random", "tiny"])
def test_float32_bounds_are_above_what_is_executed(kind: str, tmp_path: Path) -> None:
    for seed in range(6):
        w, rng = draw(seed, kind, most=60), np.random.default_rng(seed)
        bound = recomputed(tmp_path, w, "float32")
        assert bound is not None
        model = Model(write_tensors(tmp_path / "w.safetensors", w).read_bytes())
        assert above(bound, Truth(w, logit_error(model, 2.0)).mean_loss())
        V, K = sizes_of(w)
        for order in ("sequential", "shuffled"):
            losses = []
            for tokens in product(range(V), repeat=K):
                logits = executed(w, tokens, order, rng).astype(np.longdouble)
                losses.append(np.log(np.exp(logits - logits[max(tokens)]).sum()))
            assert float(np.mean(losses)) <= float(bound)


def test_the_bound_is_tight_where_tokens_agree(tmp_path: Path) -> None:
    w = right(5, 3, np.random.default_rng(0), 0.01)
    bound, loss = recomputed(tmp_path, w), Truth(w).mean_loss()
    assert bound is not None
    with ctx.workprec(400):
        assert float(bound) < 1.5 * float(loss.mid())


@pytest.mark.parametrize("level", ["real", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_prover_claims_is_confirmed_and_less_is_not(
    kind: str, level: str, tmp_path: Path
) -> None:
    path, accepted = tmp_path / "loss.json", 0
    for seed in range(8):
        w = draw(seed, kind, most=300)
        weights = write_tensors(tmp_path / "weights.safetensors", w)
        loaded = from_tensors({name: torch.from_numpy(array) for name, array in w.items()})
        try:
            found = prove_cross_entropy(loaded, level, certificate_path=path)
        except AssayError:
            continue
        verdict = check(path, weights)
        assert verdict.accepted, verdict
        assert verdict.bound is not None
        assert verdict.bound <= found.claimed
        entry = json.loads(path.read_text())
        less = verdict.bound - Fraction(1, 10**9) * verdict.bound
        entry["claim"] = {"cross_entropy": str(less)}
        path.write_text(json.dumps(entry))
        assert not check(path, weights).accepted
        accepted += 1
    assert accepted or kind in ("huge", "mixed", "steep")


@pytest.fixture
def network() -> Tensors:
    return right(5, 3, np.random.default_rng(7), 0.2)


def test_a_verdict_says_what_it_is_about(network: Tensors, tmp_path: Path) -> None:
    verdict = check(*claim(tmp_path, network, "100", level="float32"))
    assert verdict.accepted
    assert verdict.measure == "the mean cross-entropy, all 5^3 = 125 inputs alike"
    assert verdict.level == "float32"
    assert any("2.0 units in the last place" in line for line in verdict.assumptions)
    assert "100.000000000 are claimed" in verdict.reason
    assert "accuracy" not in " ".join(verdict.lines())


def test_claims_below_the_bound_are_refused(network: Tensors, tmp_path: Path) -> None:
    bound = recomputed(tmp_path, network)
    assert bound is not None
    assert check(*claim(tmp_path, network, bound)).accepted
    for less in (bound - Fraction(1, 1 << 60), bound / 2, Fraction(0)):
        verdict = check(*claim(tmp_path, network, less))
        assert not verdict.accepted
        assert verdict.bound == bound
    true = Fraction(float(Truth(network).mean_loss().mid()))
    assert not check(*claim(tmp_path, network, true * Fraction(99, 100))).accepted


def test_other_weights_are_refused(network: Tensors, tmp_path: Path) -> None:
    bound = recomputed(tmp_path, network)
    assert bound is not None
    certificate, weights = claim(tmp_path, network, bound)
    for name in network:
        change = np.zeros_like(network[name])
        change.flat[0] = 0.5
        write_tensors(weights, {**network, name: network[name] + change})
        verdict = check(certificate, weights)
        assert not verdict.accepted
        assert "other weights" in verdict.reason
    # With the digest made right again the claim stands or falls with the new weights.
    worse = {**network, "unembed.W_U": network["unembed.W_U"][:, ::-1].copy()}
    assert not check(*claim(tmp_path, worse, bound)).accepted


def test_another_level_is_refused(network: Tensors, tmp_path: Path) -> None:
    bounds = {level: recomputed(tmp_path, network, level) for level in ("real", "float32")}
    assert bounds["real"] is not None
    assert bounds["float32"] is not None
    assert bounds["real"] < bounds["float32"]
    assert not check(*claim(tmp_path, network, bounds["real"], level="float32")).accepted
    verdict = check(*claim(tmp_path, network, 100, level="float64"))
    assert not verdict.accepted
    assert "not a proof" in verdict.reason
    # A less accurate exponential needs a larger bound, and is printed with the verdict.
    loose = {"exp_ulp": 64.0}
    verdict = check(
        *claim(tmp_path, network, bounds["float32"], level="float32", assumptions=loose)
    )
    assert not verdict.accepted
    assert any("64.0 units" in line for line in verdict.assumptions)


@pytest.mark.parametrize(
    "advice",
    [
        None,
        {},
        [],
        {"file": None},
        {"file": "weights.safetensors", "sha256": None},
        {"file": None, "sha256": "0" * 64},
        {"file": "../x", "sha256": None},
    ],
)
def test_advice_that_nothing_asked_for_is_refused(
    advice: Any, network: Tensors, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="takes no advice"):
        check(*claim(tmp_path, network, 100, advice=advice))


@pytest.mark.parametrize(
    "measure",
    [
        {"name": "some", "tokens": [[1] * 5] * 3, "cells": None},
        {"name": "some", "tokens": None, "cells": [[0, 1, 0]]},
    ],
)
def test_only_all_inputs_alike_have_a_mean_loss(
    measure: Any, network: Tensors, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="all inputs alike"):
        check(*claim(tmp_path, network, 100, measure=measure))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"cross_entropy": None},
        {"cross_entropy": 100},
        {"cross_entropy": "-1"},
        {"cross_entropy": "1/0"},
        {"cross_entropy": "1.5"},
        {"cross_entropy": "1e9"},
        {"cross_entropy": " 100"},
        {"cross_entropy": "100\n"},
        {"cross_entropy": "٣"},
        {"cross_entropy": "9" * 4001},
        {"cross_entropy": "1/" + "9" * 4001},
        {"cross_entropy": "100", "count": "125"},
        {"count": "1", "total": "125", "bound": "1/125"},
    ],
    ids=lambda change: str(change)[:40],
)
def test_claims_that_are_none_are_refused(
    change: dict[str, Any], network: Tensors, tmp_path: Path
) -> None:
    certificate, weights = claim(tmp_path, network, 100)
    entry = json.loads(certificate.read_text())
    certificate.write_text(json.dumps({**entry, "claim": change}))
    with pytest.raises(InputError, match="claim"):
        check(certificate, weights)


def test_a_fraction_that_is_not_reduced_is_rejected(network: Tensors, tmp_path: Path) -> None:
    for text in ("200/2", "0100", "100/1"):
        verdict: Verdict = check(*claim(tmp_path, network, text))
        assert not verdict.accepted
        assert "reduced" in verdict.reason


def test_a_count_is_no_cross_entropy(network: Tensors, tmp_path: Path) -> None:
    """A claim of one kind under a rule of the other is refused."""
    certificate, weights = claim(tmp_path, network, 100)
    entry = json.loads(certificate.read_text())
    certificate.write_text(json.dumps({**entry, "rule": "sequences"}))
    with pytest.raises(InputError, match=r"claim\.count"):
        check(certificate, weights)


def test_weights_without_a_finite_bound(tmp_path: Path) -> None:
    w = right(3, 2, np.random.default_rng(0), 0.02)
    w["unembed.W_U"] = w["unembed.W_U"][:, ::-1] * np.float32(1e6)
    verdict = check(*claim(tmp_path, w, 10**6))
    assert not verdict.accepted
    assert verdict.bound is None
    assert "no finite bound" in verdict.reason


def test_elementary_functions_round_up_by_little() -> None:
    x = np.concatenate(
        [
            np.linspace(-690, 690, 3001),
            np.linspace(-1e-3, 1e-3, 201),
            np.arange(-64, 65) / 256,
            [-0.0, 1e-300, -1e-300, 5e-324, -5e-324, -(2.0**-60), 700.0, -700.0],
        ]
    )
    with ctx.workprec(400):
        for one, got in zip(x.tolist(), cross_entropy._exp_up(x).tolist(), strict=True):
            assert arb(got) >= arb(one).exp()
            assert arb(got) <= arb(one).exp() * (1 + arb(1e-8))
        z = np.concatenate([1 + np.logspace(-15, 300, 2001), np.linspace(1, 3, 1001), [1.0]])
        for one, got in zip(z.tolist(), cross_entropy._log_up(z).tolist(), strict=True):
            assert arb(got) >= arb(one).log()
            assert arb(got) <= arb(one).log() * (1 + arb(1e-12)) + arb(4e-8)
    assert cross_entropy._exp_up(np.array([700.5, np.inf, np.nan])).tolist() == [np.inf] * 3
    assert cross_entropy._exp_up(np.array([-1e6, -np.inf])).max() < 1e-300
    assert cross_entropy._log_up(np.array([np.inf])).tolist() == [np.inf]


def test_a_loss_known_in_closed_form_is_met_from_above(tmp_path: Path) -> None:
    """Without any weights every input loses log V, which no float holds."""
    for V in (3, 5, 7, 8, 11):
        w = {name: np.zeros_like(a) for name, a in right(V, 3, np.random.default_rng(0), 0).items()}
        bound = recomputed(tmp_path, w)
        assert bound is not None
        with ctx.workprec(400):
            true = arb(V).log()
            assert arb(bound.numerator) / bound.denominator > true
            assert arb(bound.numerator) / bound.denominator < true * (1 + arb(1e-7))


def test_attention_lost_to_underflow_leaves_the_largest_value(tmp_path: Path) -> None:
    """Weights below float64's range cannot be compared, and then the worst token stands for all."""
    w = right(4, 3, np.random.default_rng(3), 0.1)
    w["blocks.0.attn.W_K"] *= np.float32(300.0)
    bound = recomputed(tmp_path, w)
    assert bound is not None
    assert above(bound, Truth(w).mean_loss())
    margins = Margins(Model(write_tensors(tmp_path / "w", w).read_bytes()), np.zeros((4, 4)))
    assert margins.ea.min() == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", ["real", "float32"])
def test_many_networks(kind: str, level: str, tmp_path: Path) -> None:
    path = tmp_path / "loss.json"
    for seed in range(1000, 1060):
        w = draw(seed, kind, most=200)
        weights = write_tensors(tmp_path / "weights.safetensors", w)
        loaded = from_tensors({name: torch.from_numpy(array) for name, array in w.items()})
        try:
            prove_cross_entropy(loaded, level, certificate_path=path)
        except AssayError:
            continue
        verdict = check(path, weights)
        assert verdict.accepted, (seed, verdict)
        assert verdict.bound is not None
        error = logit_error(Model(weights.read_bytes()), 2.0) if level == "float32" else None
        assert above(verdict.bound, Truth(w, error).mean_loss()), seed
