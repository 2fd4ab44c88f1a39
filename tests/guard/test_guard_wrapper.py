"""The served path under attack: networks that change, odd inputs, and modes that must stay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from laboratories import drawn, small_network
from torch import nn

from assay.errors import InputError
from assay.guard import Settings, fit
from assay.guard.fitting import calibrate
from assay.guard.observed import Observed
from assay.guard.reading import Reading, input_keys, last_positions, read, whole
from assay.guard.wrapper import Guarded, hash_of


def guard_of(model: nn.Module):
    reading = whole(model, drawn(50), ["1", "3"])
    parts = [read(model, drawn(n, seed=s), reading) for n, s in ((300, 1), (100, 2), (100, 3))]
    return fit(*parts, Settings(bins=3), model_hash=hash_of(model), reading=reading.to_json())


def test_a_network_that_is_changed_or_replaced_is_noticed():
    model = small_network()
    guarded = Guarded(model, guard_of(model))
    x = drawn(20, seed=9)
    good = guarded(x)
    assert any(good.accepted)
    kept = model[2].weight.clone()
    with torch.no_grad():
        model[2].weight[0, 0] += 1e-3
    for _ in range(2):
        served = guarded(x)
        assert not any(served.accepted)
        assert "the network was changed" in served.error
    with torch.no_grad():
        model[2].weight.copy_(kept)
    assert guarded(x).accepted == good.accepted
    model[1] = nn.Tanh()
    assert "its modules are not those" in guarded(x).error
    model[1] = nn.ReLU()
    assert guarded(x).accepted == good.accepted
    model.bfloat16()
    assert "the network was changed" in guarded(x.bfloat16()).error
    guarded.model = small_network(seed=4)
    assert "the network was changed" in guarded(x).error


def test_every_module_keeps_its_mode():
    model = small_network()
    guarded = Guarded(model, guard_of(model))
    model.train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    assert any(guarded(drawn(20, seed=9)).accepted)
    assert [module.training for module in model.modules()] == before
    model.eval()
    model[3].train()
    guarded(drawn(3))
    assert model[3].training
    assert not model.training


def test_inputs_by_position_and_by_keyword_are_not_mixed():
    model = small_network()
    guarded = Guarded(model, guard_of(model))
    served = guarded(torch.zeros(2, 4), input=drawn(2))
    assert served.accepted == (False, False)
    assert "all by keyword" in served.error


class SilentError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def test_an_exception_without_words_is_a_rejection():
    model = small_network()
    guarded = Guarded(model, guard_of(model))

    def fail(*_: object) -> None:
        raise SilentError

    model[0].register_forward_hook(fail)
    served = guarded(drawn(2))
    assert served.accepted == (False, False)
    assert served.error == "SilentError"


class Twice(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + self.inner(x)


def test_a_site_that_runs_twice_is_a_rejection():
    guard = guard_of(small_network())
    sites = {f"inner.{site}": tuple(columns) for site, columns in guard.reading["sites"].items()}
    moved = replace(
        guard,
        model_hash="",
        names=Reading(sites).names,
        reading={"sites": {site: list(columns) for site, columns in sites.items()}, "logits": True},
    )
    served = Guarded(Twice(small_network()), moved)(drawn(3))
    assert served.accepted == (False, False, False)
    assert "more than once" in served.error


def test_keys_tell_what_the_network_is_given_apart():
    a, b = torch.tensor([[5, 0]]), torch.tensor([[5]])
    keys = [
        input_keys({"input_ids": a.int()}),
        input_keys({"input_ids": b}),
        input_keys({"input_ids": a.flip(1), "attention_mask": torch.tensor([[0, 1]])}),
        input_keys({"input_ids": b, "position_ids": b}),
        input_keys({"input_ids": b, "position_ids": b + 1}),
        input_keys({"x": a, "y": a + 1}),
        input_keys({"x": a + 1, "y": a}),
        input_keys({"y": a, "x": a + 1, "flag": True}),
    ]
    assert len(set(keys)) == len(keys)
    assert input_keys({"x": a, "y": a + 1}) == input_keys({"y": a + 1, "x": a})
    padded = {"input_ids": a, "attention_mask": torch.tensor([[1, 0]])}
    assert input_keys(padded) == keys[1]


def test_an_input_without_a_token_is_refused():
    mask = torch.tensor([[1, 1], [0, 0]])
    with pytest.raises(InputError, match="an input has no token"):
        last_positions({"input_ids": mask, "attention_mask": mask})


def discrete(inputs: int, seed: int) -> Observed:
    """Return features of two values, so that many inputs tie."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.rand(inputs, 8, generator=generator) < 0.15).float()
    logits = torch.stack([values[:, 0] - 0.5, 0.5 - values[:, 0]], 1) + 0.3 * values[:, 1:3]
    keys = tuple(f"{seed} {place}" for place in range(inputs))
    return Observed(values, tuple(f"f[{place}]" for place in range(8)), logits, keys)


def test_ties_are_ties_however_many_inputs_are_scored_at_once():
    guard = fit(discrete(400, 1), discrete(200, 2), discrete(200, 3), Settings(bins=3, least=5))
    data = discrete(300, 4)
    together = guard(data).p
    alone = torch.cat([guard(data.take(slice(row, row + 1))).p for row in range(300)])
    assert torch.equal(together, alone)


def test_tests_that_could_reject_nothing_are_refused():
    parts = discrete(400, 1), discrete(200, 2)
    with pytest.raises(InputError, match="at least 19 calibration inputs, got 18"):
        fit(*parts, discrete(18, 3), Settings(bins=3, least=5))
    guard = fit(*parts, discrete(19, 3), Settings(bins=3, least=5))
    with pytest.raises(InputError, match="could reject nothing"):
        calibrate(guard, parts[1], discrete(5, 6))
    far = replace(discrete(5, 7), values=torch.full((5, 8), 50.0))
    assert bool((guard(far).p <= 0.05).all())
