"""Reading, replacing and resuming, on plain modules."""

from __future__ import annotations

import pytest
import torch
from cases import Tiny, tiny_batch
from torch import Tensor, nn

from assay.core.sites import read_sites, record_outputs, run_edited
from assay.errors import InputError


def model() -> nn.Module:
    return Tiny().double().eval()


def test_record_and_resume_are_bitwise_and_skip_the_prefix():
    network, inputs = model(), tiny_batch().inputs
    record = record_outputs(network, inputs)
    inner: list[str] = []
    original = nn.Linear.forward
    nn.Linear.forward = lambda self, x: (inner.append("linear"), original(self, x))[1]  # type: ignore[method-assign]
    try:
        edits = {"blocks.2.up": lambda seen: seen.written + 1}
        resumed = run_edited(network, inputs, edits, record=record, resume=list(edits))
        count = len(inner)
        full = run_edited(network, inputs, edits)
    finally:
        nn.Linear.forward = original  # type: ignore[method-assign]
    assert torch.equal(resumed, full)
    assert count == 3  # up, down of the last block, and the head; a full run has eight
    assert len(inner) - count == 8


def test_resume_from_a_parameter_and_from_an_input():
    network, inputs = model(), tiny_batch().inputs
    record = record_outputs(network, inputs)
    for site in ("blocks.1.down.weight", "blocks.1.down:input", "blocks.2 + blocks.0"):
        edits = {site: lambda seen: seen.written * 1.5}
        assert torch.equal(
            run_edited(network, inputs, edits, record=record, resume=[site]),
            run_edited(network, inputs, edits),
        )


def test_composite_site_sees_the_sum_and_writes_the_first():
    network, inputs = model(), tiny_batch().inputs
    seen = read_sites(
        network, inputs, ["blocks.0.down + blocks.0:input", "blocks.0", "blocks.0.down"]
    )
    assert torch.equal(seen["blocks.0.down + blocks.0:input"].value, seen["blocks.0"].value)
    assert torch.equal(seen["blocks.0.down + blocks.0:input"].written, seen["blocks.0.down"].value)


def test_a_module_that_runs_twice_is_refused_as_a_site():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.last = nn.Linear(2, 1)

        def forward(self, x):
            return self.last(self.layer(self.layer(x)))[:, 0]

    network, inputs = Twice(), torch.ones(1, 2)
    with pytest.raises(InputError, match="more than once"):
        run_edited(network, inputs, {"layer": lambda seen: seen.written})
    record = record_outputs(network, inputs)
    with pytest.raises(InputError, match="more than once"):
        record.done_before(network, ["layer"])
    edits = {"last": lambda seen: seen.written + 1}
    assert torch.equal(
        run_edited(network, inputs, edits, record=record, resume=["last"]),
        run_edited(network, inputs, edits),
    )


def test_an_output_changed_in_place_is_not_replayed():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(2, 2)
            self.last = nn.Linear(2, 1)

        def forward(self, x):
            x = self.first(x)
            x += 1
            return self.last(x)[:, 0]

    network, inputs = InPlace(), torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    record = record_outputs(network, inputs)
    edits = {"last": lambda seen: seen.written + 1}
    assert torch.equal(
        run_edited(network, inputs, edits, record=record, resume=["last"]),
        run_edited(network, inputs, edits),
    )


def test_hooks_are_gone_afterwards_even_after_an_error():
    network, inputs = model(), tiny_batch().inputs

    def fail(seen):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run_edited(
            network,
            inputs,
            {"blocks.1": fail},
            record=record_outputs(network, inputs),
            resume=["blocks.1"],
        )
    assert all(
        not module._forward_hooks and not module._forward_pre_hooks for module in network.modules()
    )
    assert all("forward" not in module.__dict__ for module in network.modules())


def test_tuple_outputs_keyword_inputs_and_order():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, *, x):
            return self.inner(x), "kept"

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair()
            self.late = nn.Linear(2, 2)

        def forward(self, x):
            value, word = self.pair(x=x)
            assert word == "kept"
            return self.late(value)[:, 0]

    network, inputs = Outer(), torch.ones(1, 2)
    doubled = run_edited(
        network,
        inputs,
        {"pair": lambda seen: seen.written * 2, "pair:input": lambda seen: seen.written},
    )
    with torch.no_grad():
        expected = network.late(2 * network.pair(x=inputs)[0])[:, 0]
    assert torch.equal(doubled, expected)
    with pytest.raises(InputError, match="not computed before"):
        run_edited(network, inputs, {"pair + late": lambda seen: seen.written})


def test_a_shared_parameter_begins_at_its_first_owner():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.middle = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.last = nn.Linear(3, 3, bias=False)
            self.last.weight = self.first.weight

        def forward(self, x):
            return self.last(self.middle(self.first(x)).tanh())

    network, inputs = Tied(), torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    record = record_outputs(network, inputs)
    edits = {"last.weight": lambda seen: seen.written * 1.5}
    assert record.done_before(network, edits) == []
    resumed = run_edited(network, inputs, edits, record=record, resume=edits)
    assert torch.equal(resumed, run_edited(network, inputs, edits))


def test_nothing_is_skipped_before_a_shared_parameter_whose_owner_runs_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.again, self.middle = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.last = nn.Linear(3, 3, bias=False)
            self.last.weight = self.again.weight

        def forward(self, x):
            return self.last(self.middle(self.again(self.again(x))).tanh())

    network, inputs = Twice(), torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    record = record_outputs(network, inputs)
    edits = {"last.weight": lambda seen: seen.written * 1.5}
    resumed = run_edited(network, inputs, edits, record=record, resume=edits)
    assert torch.equal(resumed, run_edited(network, inputs, edits))


class InPlace(nn.Module):
    """Everything that one network may write into what a module has put out, or the same network
    without.
    """

    def __init__(self, inside: bool):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.inside = inside
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)
        self.act, self.last = nn.SiLU(inplace=inside), nn.Linear(4, 2)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        acted = self.act(first)
        second = self.second(torch.tanh(acted))
        if self.inside:
            second.view(-1)[::2].mul_(3)
            second += acted
            second[:, 0] = 1
        else:
            second = torch.where(torch.arange(4) % 2 == 0, 3 * second, second) + acted
            second = torch.cat([torch.ones_like(second[:, :1]), second[:, 1:]], 1)
        return self.last(second)


def test_what_is_read_was_there_before_anything_was_written_in_place() -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    sites = ["first", "act:input", "act", "second", "second + act", "last:input", "first.weight"]
    plain, inside = (read_sites(InPlace(kind), x, sites) for kind in (False, True))
    assert torch.equal(InPlace(False)(x), InPlace(True)(x))
    for site in sites:
        torch.testing.assert_close(plain[site].value, inside[site].value, rtol=0, atol=0)
        torch.testing.assert_close(plain[site].written, inside[site].written, rtol=0, atol=0)
    with torch.inference_mode():
        assert torch.equal(read_sites(InPlace(False), x, sites)["act"].value, plain["act"].value)
