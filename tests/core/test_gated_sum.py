"""The gated sum itself: equal to the network at all ones, to the base at all zeros, and
consistent with its adjoint.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import KINDS, dictionary, rank_one, tiny_batch, tiny_target
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.attribution.exact import every
from assay.core.parts import Atoms, Group, Shifts, Whole, mix
from assay.core.sites import Seen, read_sites
from assay.errors import InputError

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_all_ones_is_the_network_bit_for_bit(kind, dtype):
    mechanisms = kind(dtype=dtype)
    assert torch.equal(
        mechanisms.values(mechanisms.ones()), mechanisms.target.values(mechanisms.batch)
    )


def test_all_zeros_is_the_counterfactual():
    mechanisms = dictionary()
    patched = mechanisms.values(mechanisms.full(0.0))
    torch.testing.assert_close(
        patched, mechanisms.target.values(mechanisms.patch), rtol=1e-12, atol=1e-12
    )


def test_all_zeros_of_a_weight_is_the_network_without_it():
    mechanisms = rank_one()
    gone = mechanisms.values(mechanisms.full(0.0))
    with torch.no_grad():
        mechanisms.target.model.get_parameter("blocks.1.up.weight").zero_()
    torch.testing.assert_close(
        gone, mechanisms.target.values(mechanisms.batch), rtol=1e-12, atol=1e-12
    )


@kinds
def test_adjoint_single_and_norm_agree_with_add(kind):
    mechanisms = kind()
    generator = torch.Generator().manual_seed(0)
    clean = read_sites(mechanisms.target.model, mechanisms.batch.inputs, mechanisms.sites)
    for site, groups in mechanisms.clean_parts():
        seen = clean[site]
        for name, parts in groups.items():
            group = mechanisms.group(name)
            assert parts.shape == group.shape
            weights = torch.randn(group.shape, generator=generator, dtype=torch.float64)
            cotangent = torch.randn(seen.value.shape, generator=generator, dtype=torch.float64)
            left = (parts.add(weights) * cotangent).sum()
            torch.testing.assert_close(
                left, (weights * parts.dot(cotangent)).sum(), rtol=1e-10, atol=1e-10
            )
            for place in every(mechanisms, name):
                weights = torch.zeros(group.axes, dtype=torch.float64)
                weights[tuple(place)] = 1
                index = place.expand(len(mechanisms.batch), -1) if group.per_example else place
                whole = parts.add(weights.expand(group.shape))
                torch.testing.assert_close(parts.one(index), whole, rtol=1e-12, atol=1e-12)
                squares = whole.square().flatten(1 if group.per_example else 0).sum(-1)
                expected = (
                    parts.norm()[(..., *place)] if group.per_example else parts.norm()[tuple(place)]
                )
                torch.testing.assert_close(expected, squares.sqrt(), rtol=1e-10, atol=1e-10)


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_atoms_property(examples, positions, size, width, shared, seed):
    generator = torch.Generator().manual_seed(seed)
    coefficients = torch.randn(examples, positions, size, generator=generator, dtype=torch.float64)
    atoms = torch.randn(size, width, generator=generator, dtype=torch.float64)
    shape = (examples, 1 if shared else positions, size)
    parts = Atoms(coefficients, atoms, shape)
    weights = torch.randn(shape, generator=generator, dtype=torch.float64)
    expected = torch.einsum(
        "bpk,bpk,kd->bpd", weights.expand(examples, positions, size), coefficients, atoms
    )
    torch.testing.assert_close(parts.add(weights), expected)


def test_gates_are_mixed_wider_than_a_narrow_value():
    value = torch.full((1, 2), 256.0, dtype=torch.bfloat16)
    seen = Seen(value, value)
    parts = {"g": Whole(torch.ones(1, 2), (1,), (1, 2))}
    gate = torch.tensor([1 - 2**-10])  # bfloat16 would round this gate to one
    assert torch.equal(mix(seen, parts, {"g": gate}), value - 0)
    wide = mix(Seen(value.float(), value.float()), parts, {"g": gate})
    assert torch.allclose(wide, torch.full((1, 2), 256.0 - 2**-10))


def test_parts_of_a_narrow_value_add_up_before_they_are_rounded():
    value = torch.full((1, 2), 256.0, dtype=torch.bfloat16)
    half = Whole(torch.full((1, 2), 0.5), (1,), (1, 2))
    gates = {"a": torch.zeros(1), "b": torch.zeros(1)}
    # 255.5 would round back to 256 after each of the two.
    assert torch.equal(mix(Seen(value, value), {"a": half, "b": half}, gates), value - 1)


def test_the_norm_of_a_part_at_two_sites_is_the_root_of_the_summed_squares():
    mechanisms = KINDS["two sites"]()
    sites = mechanisms.clean_parts()
    squares = sum(parts["reader"].norm().square() for _, parts in sites)
    torch.testing.assert_close(mechanisms.norms()["reader"], squares.sqrt())


def test_damage_is_the_loss_of_the_right_answer():
    from assay.core.target import Target

    full, values = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 5.0])
    higher = tiny_target()
    lower = Target(higher.model, higher.metric, higher_is_right=False)
    assert torch.equal(higher.damage(full, values), torch.tensor([1.0, -3.0]))
    assert torch.equal(lower.damage(full, values), torch.tensor([-1.0, 3.0]))


def test_gates_wider_than_the_value_keep_their_own_precision():
    value = torch.zeros(1, 2)
    parts = {"g": Whole(torch.full((1, 2), 2.0**30), (1,), (1, 2))}
    gate = torch.tensor([1 - 2.0**-30], dtype=torch.float64)  # float32 would round this to one
    assert torch.equal(mix(Seen(value, value), parts, {"g": gate}), value - 1)


def test_shifts_and_groups():
    shifts = Shifts(torch.eye(3).reshape(3, 3, 1))
    assert shifts.shape == (3,)
    assert torch.equal(
        shifts.add(torch.tensor([1.0, 2.0, 3.0])), torch.tensor([[1.0], [2.0], [3.0]])
    )
    assert Group("g", ("a",), (4, 2)).axes == (2,)
    assert Group("g", ("a",), (4, 2), per_example=False).axes == (4, 2)


def test_bad_gates_are_refused():
    mechanisms = dictionary()
    with pytest.raises(InputError, match="must broadcast"):
        mechanisms.values({"features": torch.ones(2, 2)})
    with pytest.raises(InputError, match="did you mean features"):
        mechanisms.values({"feature": torch.ones(1)})


def test_unknown_site_names_the_nearest():
    with pytest.raises(InputError, match=r"did you mean .*blocks\.1"):
        read_sites(tiny_target().model, tiny_batch().inputs, ["block.1"])


def test_nan_weights_and_wrong_metric_shape():
    model = tiny_target().model
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    from assay.core.target import Target

    with pytest.raises(InputError, match=r"head\.weight.*NaN"):
        Target(model, lambda output, batch: output[:, 0])
    with pytest.raises(InputError, match="one number per example"):
        Target(tiny_target().model, lambda output, batch: output).values(tiny_batch())


def test_only_sites_that_a_group_says_it_reads_are_remembered():
    class Undeclared(type(KINDS["reads earlier"]())):
        @property
        def groups(self):
            return {name: replace(group, reads=()) for name, group in super().groups.items()}

    declared = KINDS["reads earlier"]()
    undeclared = Undeclared(declared.target, declared.batch)
    assert declared.values(declared.full(0.5)).shape == (5,)
    for act in (lambda: undeclared.values(undeclared.full(0.5)), undeclared.norms):
        with pytest.raises(InputError, match="not reached before"):
            act()
