"""What must hold for every kind of part: each function takes a maker of mechanisms and asserts one
invariant. A new kind passes them all without a change to the core.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from assay.attribution import (
    Exact,
    Gradient,
    IntegratedGradients,
    SecondOrder,
    ablate,
    attribute,
    curvature,
    every,
    gate_gradient,
)
from assay.audit import exhaustive, faithfulness, worst_case
from assay.core.mechanisms import Mechanisms
from assay.core.values import active_rows, dense
from assay.errors import InputError

Make = Callable[..., Mechanisms]


def some_places(mechanisms: Mechanisms, name: str, count: int = 4) -> Tensor:
    """Return up to `count` parts of a group, drawn at random: (rows, axes)."""
    index = every(mechanisms, name)
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))
    return index[order[:count]]


def random_gates(mechanisms: Mechanisms, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(gate.shape, generator=generator, dtype=torch.float64).to(gate)
        for name, gate in mechanisms.ones().items()
    }


def with_gate(
    gates: dict[str, Tensor], mechanisms: Mechanisms, name: str, place: Tensor, value: float
) -> dict[str, Tensor]:
    """Return the gates with one part's gate, in every example, at another value."""
    gate = gates[name].clone()
    gate[(..., *place.tolist()) if mechanisms.group(name).per_example else tuple(place)] = value
    return {**gates, name: gate}


def all_ones_is_the_network_bit_for_bit(make: Make) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        mechanisms = make(dtype=dtype)
        plain = mechanisms.target.values(mechanisms.batch)
        assert torch.equal(mechanisms.values(mechanisms.ones()), plain), dtype
        assert torch.equal(mechanisms.values(), plain), dtype


def the_gradient_is_the_finite_difference(make: Make) -> None:
    mechanisms = make()
    for gates in (mechanisms.ones(), random_gates(mechanisms)):
        _, found = gate_gradient(mechanisms, gates)
        for name in mechanisms.groups:
            slopes = dense(found[name])
            for place in some_places(mechanisms, name):
                own = (slice(None), *place.tolist())
                here = gates[name][own if mechanisms.group(name).per_example else tuple(place)]
                step = 1e-5
                up, down = (
                    mechanisms.values(
                        {**gates, name: _moved(gates[name], mechanisms, name, place, here + change)}
                    )
                    for change in (step, -step)
                )
                expected = (up - down) / (2 * step)
                torch.testing.assert_close(slopes[own], expected, rtol=1e-5, atol=1e-8)


def _moved(gate: Tensor, mechanisms: Mechanisms, name: str, place: Tensor, value: Tensor) -> Tensor:
    moved = gate.clone()
    own = (slice(None), *place.tolist()) if mechanisms.group(name).per_example else tuple(place)
    moved[own] = value
    return moved


def exact_is_one_gate_at_zero(make: Make) -> None:
    mechanisms = make()
    scores = attribute(mechanisms, Exact())
    full, ones = mechanisms.values(mechanisms.ones()), mechanisms.ones()
    for name in mechanisms.groups:
        for place in some_places(mechanisms, name):
            without = mechanisms.values(with_gate(ones, mechanisms, name, place, 0.0))
            found = dense(scores.values[name])[(slice(None), *place.tolist())]
            torch.testing.assert_close(found, (full - without).double(), rtol=1e-8, atol=1e-9)


def the_ablate_rule_is_the_general_rule(make: Make) -> None:
    mechanisms = make()
    for name, group in mechanisms.groups.items():
        index = some_places(mechanisms, name)
        found = ablate(mechanisms, name, index)
        general = ablate(mechanisms, name, index, general=True)
        torch.testing.assert_close(found, general, rtol=1e-8, atol=1e-9)
        if group.per_example:  # a part of its own in every example
            rows, mask = active_rows(mechanisms.norms()[name])
            own = ablate(mechanisms, name, rows[:2])
            other = ablate(mechanisms, name, rows[:2], general=True)
            torch.testing.assert_close(own[mask[:2]], other[mask[:2]], rtol=1e-8, atol=1e-9)


def the_second_rule_is_the_general_rule(make: Make) -> None:
    mechanisms = make()
    first, second = attribute(mechanisms), attribute(mechanisms, SecondOrder())
    for name in mechanisms.groups:
        for place in some_places(mechanisms, name, 2):
            own = (slice(None), *place.tolist())
            bend = curvature(mechanisms, name, place[None])[0]
            expected = dense(first.values[name])[own] - bend / 2
            found = dense(second.values[name])[own]
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


def path_scores_add_up_to_the_joint_removal(make: Make) -> None:
    mechanisms = make()
    method = IntegratedGradients(scope="joint", tolerance=1e-4, max_nodes=257)
    scores = attribute(mechanisms, method)
    total = sum(
        dense(entry).reshape(len(mechanisms.batch), -1).sum(1) for entry in scores.values.values()
    )
    change = mechanisms.values(mechanisms.ones()) - mechanisms.values(mechanisms.full(0.0))
    torch.testing.assert_close(
        total, change.double(), rtol=2e-3, atol=2e-3 * float(change.detach().abs().mean())
    )


def the_baseline_is_the_metric_of_the_untouched_network(make: Make) -> None:
    mechanisms = make()
    plain = mechanisms.target.values(mechanisms.batch).double()
    for method in (Gradient(), IntegratedGradients(max_nodes=5), Exact()):
        torch.testing.assert_close(attribute(mechanisms, method).baseline, plain)


def an_audit_of_exact_scores_finds_no_error(make: Make) -> None:
    mechanisms = make()
    found = attribute(mechanisms, Exact()).audit(exact=8)
    assert found.table.height > 0
    assert found.pooled.mae <= 1e-9
    rough = attribute(mechanisms, Gradient()).audit(exact=8)
    assert (rough.table["exact"] - rough.table["estimate"]).is_finite().all()


def the_worst_case_is_the_exhaustive_one_on_small_boxes(make: Make) -> None:
    mechanisms = make()
    keep, free = {}, 0
    for name, gate in mechanisms.ones().items():
        mask = torch.ones(gate.shape, dtype=torch.bool)
        for place in some_places(mechanisms, name, 2):
            if free < 5:
                own = (..., *place.tolist())
                mask[own if mechanisms.group(name).per_example else tuple(place)] = False
                free += 1
        keep[name] = mask
    found, best = worst_case(mechanisms, keep, steps=4), exhaustive(mechanisms, keep)
    shared = not all(group.per_example for group in mechanisms.groups.values())
    if shared:
        assert found.damage.mean() >= best.damage.mean() - 1e-9
    else:
        assert (found.damage >= best.damage - 1e-9).all()
    full = mechanisms.values().double()
    for name, gate in found.gates.items():
        low, high = mechanisms.box(name)
        assert ((gate >= low) & (gate <= high) | keep[name]).all()
        assert (gate[keep[name].expand(gate.shape)] == 1).all()
    moved = mechanisms.target.damage(full, mechanisms.values(found.gates).double())
    torch.testing.assert_close(moved, found.damage, rtol=1e-9, atol=1e-9)


def keeping_everything_is_faithful_and_nothing_is_not(make: Make) -> None:
    mechanisms = make()
    every_part = {
        name: torch.ones(gate.shape, dtype=torch.bool) for name, gate in mechanisms.ones().items()
    }
    whole, none = faithfulness(mechanisms, every_part), faithfulness(mechanisms, {})
    assert whole.faithfulness == pytest.approx(1)
    assert none.faithfulness == pytest.approx(0, abs=1e-9)


def parts_have_names_of_their_own(make: Make) -> None:
    mechanisms = make()
    for name in mechanisms.groups:
        places = [tuple(place) for place in every(mechanisms, name).tolist()]
        assert len({mechanisms.describe(name, place) for place in places}) == len(places)


def results_say_where_parts_come_from(make: Make) -> None:
    mechanisms = make()
    scores = attribute(mechanisms)
    assert set(scores.sources) == set(mechanisms.groups)
    for name, group in mechanisms.groups.items():
        expected = "fixed" if group.fixed else "read at" if group.reads else "read where they act"
        assert scores.sources[name].startswith(expected)
    assert scores.reference
    assert scores.convention
    assert mechanisms.kind != "mechanisms"


def a_resumed_run_is_the_whole_run(make: Make) -> None:
    mechanisms = make()
    record, gates = mechanisms.record(), random_gates(mechanisms)
    for chosen in (gates, {name: gates[name] for name in list(gates)[-1:]}):
        assert torch.equal(mechanisms.values(chosen, record=record), mechanisms.values(chosen))


def some_of_the_examples_score_as_among_all(make: Make) -> None:
    mechanisms = make()
    index = torch.tensor([2, 0])
    some = mechanisms.take(index)
    assert len(some.batch) == 2
    for method in (Gradient(), Exact()):
        whole, part = attribute(mechanisms, method), attribute(some, method)
        for name, values in part.values.items():
            expected = dense(whole.values[name])[index]
            torch.testing.assert_close(dense(values), expected, rtol=1e-8, atol=1e-9)


def boxes_broadcast_to_the_gates(make: Make) -> None:
    mechanisms = make()
    for name, group in mechanisms.groups.items():
        low, high = mechanisms.box(name)
        for bound in (low, high):
            assert torch.broadcast_shapes(bound.shape, group.shape) == group.shape
        assert (low <= high).all()


def bad_gates_are_refused(make: Make) -> None:
    mechanisms = make()
    name = next(iter(mechanisms.groups))
    with pytest.raises(InputError, match="must broadcast"):
        mechanisms.values({name: torch.ones(1, 7, 11, 13, 17)})
    with pytest.raises(InputError, match="did you mean"):
        mechanisms.values({f"{name}s": torch.ones(1)})


INVARIANTS = (
    all_ones_is_the_network_bit_for_bit,
    the_gradient_is_the_finite_difference,
    exact_is_one_gate_at_zero,
    the_ablate_rule_is_the_general_rule,
    the_second_rule_is_the_general_rule,
    path_scores_add_up_to_the_joint_removal,
    the_baseline_is_the_metric_of_the_untouched_network,
    an_audit_of_exact_scores_finds_no_error,
    the_worst_case_is_the_exhaustive_one_on_small_boxes,
    keeping_everything_is_faithful_and_nothing_is_not,
    parts_have_names_of_their_own,
    results_say_where_parts_come_from,
    a_resumed_run_is_the_whole_run,
    some_of_the_examples_score_as_among_all,
    boxes_broadcast_to_the_gates,
    bad_gates_are_refused,
)
