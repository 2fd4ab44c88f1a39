"""Certificates of gates for every kind, beside brute force; and what they refuse."""

from __future__ import annotations

import functools

import cases
import numpy as np
import pytest
import torch
from torch import Tensor

import assay
from assay.bounds.search.leaves import Budget
from assay.core.mechanisms import Mechanisms
from assay.errors import InputError
from assay.proofs.boxed import boxed
from assay.proofs.gates import Certified, certify

QUICK = Budget(seconds=0.3, whole=0, steps=(5, 3))
SLOW = {
    "channels, norms",
    "channels, patches",
    "components, tied",
    "crosscoder, clamp",
    "crosscoder, everywhere",
    "features, transcoders",
    "nodes, general rule",
    "nodes, zero",
    "nodes, residual",
    "nodes, neurons",
    "features, language",
    "features, identity",
}


@functools.cache
def one(name: str) -> Mechanisms:
    return cases.CASES[name]().take(slice(0, 1))


def few_free(mechanisms: Mechanisms, count: int) -> dict[str, Tensor]:
    """Keep all but some parts of every group, spread over the groups."""
    keep, left = {}, count
    for number, (name, gate) in enumerate(mechanisms.ones().items()):
        mask = torch.ones_like(gate, dtype=torch.bool)
        share = -(-left // (len(mechanisms.groups) - number))
        mask.reshape(-1)[-share:] = False
        left -= min(share, gate.numel())
        keep[name] = mask
    return keep


@torch.no_grad()
def damages(mechanisms: Mechanisms, keep: dict[str, Tensor], low: float, points: int) -> Tensor:
    """Damages at every corner of the free gates, and at random points."""
    narrowed = boxed(mechanisms, low)
    full = mechanisms.values().double()
    places = [(n, i) for n, mask in keep.items() for i in (~mask).flatten().nonzero().flatten()]
    generator, found = torch.Generator().manual_seed(0), []
    shares = [
        [float(code >> bit & 1) for bit in range(len(places))] for code in range(1 << len(places))
    ]
    shares += torch.rand(points, len(places), generator=generator).tolist()
    for share in shares:
        gates = {name: gate.clone() for name, gate in mechanisms.ones().items()}
        for (name, place), s in zip(places, share, strict=True):
            least = narrowed.lows[name].reshape(-1)[place]
            gates[name].reshape(-1)[place] = least + s * (1 - least)
        found.append(mechanisms.target.damage(full, mechanisms.values(gates).double()))
    return torch.stack(found)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in cases.CASES],
)
def test_no_corner_and_no_sample_leaves_the_bracket(name: str) -> None:
    mechanisms = one(name)
    keep = few_free(mechanisms, 4)
    low = 0.3
    found = certify(mechanisms, keep, low=low, budget=QUICK)
    seen = damages(mechanisms, keep, low, 24)
    assert bool((seen <= found.proved.values + 1e-9).all())
    assert bool((found.found.values <= found.proved.values + 1e-9).all())
    gates = found.found.gates[0]
    with torch.no_grad():
        again = mechanisms.target.damage(mechanisms.values(), mechanisms.values(gates)).double()
    assert torch.allclose(again, found.found.values, atol=1e-9)
    assert float(found.found.values) >= float(seen[: 1 << 4].max()) - 1e-9
    assert found.proved.level == "real"


@pytest.mark.parametrize("name", ["weight site", "channels", "nodes", "directions"])
def test_an_empty_box_is_exact(name: str) -> None:
    mechanisms = one(name)
    everything = {n: torch.ones_like(g, dtype=torch.bool) for n, g in mechanisms.ones().items()}
    nothing = certify(mechanisms, everything, budget=QUICK)
    assert nothing.free == 0
    assert nothing.proved.values.item() == nothing.found.values.item() == 0
    still = certify(mechanisms, low=1.0, budget=QUICK)
    assert still.proved.values.item() < 1e-5


def test_a_metric_that_holds_numbers_of_every_example_follows_the_examples() -> None:
    mechanisms = cases.CASES["directions, divergence"]().take(slice(0, 2))
    found = certify(mechanisms, budget=QUICK)
    for example in range(2):
        gates = dict(found.found.gates[example])
        alone = mechanisms.take(slice(example, example + 1))
        moved = float(alone.values(gates).detach() - alone.values().detach())
        assert float(found.found.values[example]) == pytest.approx(moved, rel=1e-5, abs=1e-7)
        assert moved <= float(found.proved.values[example]) + 1e-6


def test_a_bracket_is_the_damage_where_the_network_is_multi_affine() -> None:
    mechanisms = one("channels")
    keep = {
        name: torch.ones_like(gate, dtype=torch.bool) for name, gate in mechanisms.ones().items()
    }
    keep["blocks.2"][:] = False  # the last block: the logit is linear in its gates
    found = certify(mechanisms, keep, budget=Budget(seconds=20))
    assert float(found.found.values) > 0
    assert found.ratio == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
def test_transformers_meet_their_corners() -> None:
    mechanisms = one("nodes")
    keep = few_free(mechanisms, 3)
    found = certify(mechanisms, keep, low=0.5, budget=Budget(seconds=60, gap=1e-3))
    assert float(found.found.values) <= float(found.proved.values)
    assert found.ratio > 0.99


@pytest.mark.slow
def test_same_answer_is_certified_broken_or_open() -> None:
    mechanisms = cases.CASES["channels"]().take(slice(0, 2))
    narrow = certify(mechanisms, low=0.999, claim="same-answer", budget=QUICK)
    assert bool(narrow.certified.all())
    assert not narrow.broken.any()
    assert bool((narrow.proved.values <= narrow.full).all())
    # All channels off leaves the embedding alone: some answer changes.
    wide = certify(mechanisms, claim="same-answer", budget=QUICK)
    for index in range(2):
        gates = dict(wide.found.gates[index])
        model = mechanisms.target.model
        with torch.no_grad():
            logits = _gated_logits(mechanisms.take(slice(index, index + 1)), gates)
            answer = model(mechanisms.batch.inputs[index : index + 1]).argmax(-1)
        margin = logits[0, answer] - logits[0, torch.arange(logits.shape[1]) != answer].max()
        assert float(margin) == pytest.approx(float(wide.found.values[index]), abs=1e-9)
        assert bool(wide.broken[index]) == (float(margin) <= 0)
        assert not (bool(wide.broken[index]) and bool(wide.certified[index]))
    assert wide.summary()["certified"] + wide.summary()["broken"] + wide.summary()["open"] == 2


def _gated_logits(mechanisms: Mechanisms, gates: dict[str, Tensor]) -> Tensor:
    from assay.core.sites import run_edited

    return run_edited(mechanisms.target.model, mechanisms.batch.inputs, mechanisms.edits(gates))


@pytest.mark.slow
def test_nodes_keep_their_answer() -> None:
    mechanisms = one("nodes")
    found = certify(mechanisms, few_free(mechanisms, 2), low=0.9, claim="same-answer", budget=QUICK)
    assert bool(found.certified.all())
    assert float(found.full) == pytest.approx(abs(float(mechanisms.values())), abs=1e-9)


def test_bounds_and_estimates_are_different_types() -> None:
    found = certify(one("directions"), budget=QUICK)
    assert type(found.found) is not type(found.proved)
    assert isinstance(found, Certified)
    assert found.rows()[0]["proved"] == float(found.proved.values)
    with pytest.raises(InputError, match="same-answer"):
        _ = found.certified
    assert found.summary()["level"] == "real"


def test_a_lower_box_per_gate_and_per_group() -> None:
    mechanisms = one("channels")
    names = list(mechanisms.groups)
    lows = {names[0]: torch.linspace(0.5, 1, 6, dtype=torch.float64)[None]}
    narrow = certify(
        mechanisms,
        {name: torch.ones(1, 6, dtype=torch.bool) for name in names[1:]},
        low=lows,
        budget=QUICK,
    )
    wide = certify(
        mechanisms,
        {name: torch.ones(1, 6, dtype=torch.bool) for name in names[1:]},
        low=0.5,
        budget=QUICK,
    )
    assert narrow.free == 5
    assert float(narrow.found.values) <= float(wide.proved.values)
    kind = one("weight site")  # its own box ends at .2
    assert float(boxed(kind, 0.0).lows["components"].min()) == pytest.approx(0.2)


@pytest.mark.parametrize("low", [1.5, float("nan")])
def test_bad_boxes_are_refused(low: float) -> None:
    with pytest.raises(InputError, match="low: the lowest gate"):
        certify(one("directions"), low=low)


@pytest.mark.parametrize("low", [-0.5, -1e308])
def test_gates_below_what_the_kind_allows_are_refused_and_not_cut(low: float) -> None:
    with pytest.raises(InputError, match=r"low: the gates of .* go down to 0.0 at least, got -"):
        certify(one("channels"), low=low)


def test_bad_input_is_refused() -> None:
    mechanisms = one("directions")
    with pytest.raises(InputError, match="claim 'damages'; did you mean damage"):
        certify(mechanisms, claim="damages")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="level"):
        certify(mechanisms, level="float16")
    with pytest.raises(InputError, match="must broadcast"):
        certify(mechanisms, low={next(iter(mechanisms.groups)): torch.zeros(3)})
    with pytest.raises(InputError, match="gate group"):
        certify(mechanisms, low={"nothing": torch.zeros(3)})
    with pytest.raises(InputError, match="boolean mask"):
        certify(mechanisms, {next(iter(mechanisms.groups)): torch.zeros(4)})
    with pytest.raises(InputError, match="must not be negative"):
        certify(mechanisms, budget=-1)


def test_certify_is_a_public_name() -> None:
    assert assay.certify is certify


def test_the_search_level_proves_nothing_and_says_so() -> None:
    found = certify(one("directions"), budget=QUICK, level="float64")
    assert "nothing is proved" in found.proved.assumptions[0]
    assert np.isfinite(found.proved.values.item())
