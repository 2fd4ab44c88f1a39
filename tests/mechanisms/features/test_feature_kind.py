"""Features and errors: what dictionaries of known behaviour must give, references, and refusals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import cases
import node_models
import pytest
import torch
from cases import random_dictionary, tiny_batch, tiny_target

import assay
from assay.attribution import (
    Exact,
    Gradient,
    IntegratedGradients,
    NodePath,
    ablate,
    attribute,
    every,
)
from assay.attribution.node_path import node_path
from assay.core.target import Batch, Target
from assay.core.values import dense
from assay.dictionaries import Placed
from assay.dictionaries.identity import Identity
from assay.dictionaries.relu import ReLU
from assay.errors import InputError
from assay.mechanisms.features import bound as bound_module
from assay.mechanisms.features import codes as codes_module
from assay.mechanisms.features import features, identities
from assay.mechanisms.nodes import nodes
from assay.targets.metrics import logit_difference

SITES = ["blocks.0", "blocks.1"]


def batches() -> tuple[Batch, Batch]:
    return tiny_batch(4, positions=2, seed=1), tiny_batch(4, positions=2, seed=2)


def places(sites=SITES, **options) -> dict[str, Placed]:
    return {
        site: Placed(random_dictionary(4, 5, seed, **options), site, (site,))
        for seed, site in enumerate(sites)
    }


@pytest.mark.parametrize("reference", ["counterfactual", "mean", "zero"])
@pytest.mark.parametrize("method", [Gradient(), Exact(), NodePath(3)], ids=lambda m: m.name)
def test_an_identity_dictionary_gives_neurons_and_no_error(reference, method):
    model, (clean, patch) = tiny_target(), batches()
    found = attribute(
        features(model, identities(model, clean, SITES), clean, patch, reference), method
    )
    neurons = attribute(nodes(model, clean, patch, SITES, reference, neurons=SITES), method)
    for site in SITES:
        torch.testing.assert_close(found.values[site], neurons.values[site], rtol=0, atol=1e-12)
        assert not found.values[f"{site} error"].any()


@pytest.mark.parametrize("reference", ["counterfactual", "mean", "zero"])
@pytest.mark.parametrize("method", [Gradient(), Exact(), NodePath(3)], ids=lambda m: m.name)
def test_a_dictionary_of_zeros_leaves_everything_in_the_error(reference, method):
    model, (clean, patch) = tiny_target(), batches()
    zeros = {site: Placed(ReLU(4, 3).double(), site, (site,)) for site in SITES}
    found = attribute(features(model, zeros, clean, patch, reference), method)
    whole = attribute(nodes(model, clean, patch, SITES, reference), method)
    for site in SITES:
        torch.testing.assert_close(
            found.values[f"{site} error"], whole.values[site], rtol=0, atol=1e-12
        )
        assert not found.values[site].any()


class Rotation(Identity):
    """A linear dictionary: coordinates in another basis, which lose nothing."""

    def __init__(self, d_in: int):
        super().__init__(d_in)
        generator = torch.Generator().manual_seed(0)
        basis, _ = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator).double())
        self.W_dec = basis

    def encode(self, x):
        return x @ self.W_dec.T.to(x.dtype)


def test_a_linear_dictionary_splits_the_gradient_exactly():
    model, (clean, patch) = tiny_target(), batches()
    basis = Rotation(4)
    bound = features(model, {"blocks.1": Placed(basis, "blocks.1", ("blocks.1",))}, clean, patch)
    found = attribute(bound)
    whole = attribute(nodes(model, clean, patch, ["blocks.1"]))
    torch.testing.assert_close(found.values["blocks.1"].sum(-1), whole.values["blocks.1"])
    assert found.values["blocks.1 error"].abs().max() < 1e-12
    now, other = (
        model.model.blocks[1](model.model.blocks[0](model.model.embed(batch.inputs)))
        for batch in (clean, patch)
    )
    tail = now.detach().requires_grad_()
    out = model.model.head(model.model.blocks[2](tail)).mean(1)
    (gradient,) = torch.autograd.grad((out[:, 0] - 0.3 * out[:, 1] ** 2).sum(), tail)
    expected = ((now - other) @ basis.W_dec.T) * (gradient @ basis.W_dec.T)
    torch.testing.assert_close(found.values["blocks.1"], expected.detach())


@pytest.mark.parametrize("reference", ["counterfactual", "mean", "zero"])
def test_sparse_parts_are_the_dense_ones(reference, monkeypatch):
    model, (clean, patch) = tiny_target(), batches()
    whole = features(model, places(), clean, patch, reference)
    expected = {method: attribute(whole, method) for method in (Gradient(), Exact())}
    norms = whole.norms()
    rows = torch.stack([torch.arange(2), torch.tensor([4, 0])], dim=1)
    singles = ablate(whole, "blocks.0", rows)
    monkeypatch.setattr(bound_module, "DENSE", 1)
    monkeypatch.setattr(codes_module, "_ENTRIES", 1)  # one example at a time
    some = features(model, places(), clean, patch, reference)
    assert {type(p).__name__ for _, parts in some.clean_parts() for p in parts.values()} == {
        "SparseAtoms",
        "Whole",
    }
    for method, scores in expected.items():
        for name, values in attribute(some, method).values.items():
            torch.testing.assert_close(dense(values), dense(scores.values[name]))
    for name, values in some.norms().items():
        torch.testing.assert_close(dense(values), norms[name])
    torch.testing.assert_close(ablate(some, "blocks.0", rows), singles)
    gates = {name: torch.rand(gate.shape).double() for name, gate in some.ones().items()}
    with torch.no_grad():
        torch.testing.assert_close(some.values(gates), whole.values(gates))


def test_gates_at_zero_put_the_reference_there():
    model, (clean, patch) = tiny_target(), batches()
    bound = features(model, places(SITES[1:]), clean, patch)
    torch.testing.assert_close(bound.values(bound.full(0.0)), model.values(patch))
    dictionary = bound.dictionaries["blocks.1"].dictionary
    other = model.model.blocks[1](model.model.blocks[0](model.model.embed(patch.inputs)))
    codes = dictionary.encode(other)

    def patched(seen):  # the features of the patch run beside the clean error
        return seen.value + (codes - dictionary.encode(seen.value)) @ dictionary.W_dec

    torch.testing.assert_close(
        bound.values({"blocks.1": 0 * bound.ones(["blocks.1"])["blocks.1"]}),
        model.values(clean, {"blocks.1": patched}),
    )
    rebuilt = features(model, places(SITES[1:]), clean, reference="zero")
    off = {"blocks.1 error": torch.zeros(4, 2)}
    torch.testing.assert_close(
        rebuilt.values(off),
        model.values(clean, {"blocks.1": lambda seen: dictionary(seen.value)}),
    )


def test_a_detached_error_changes_gradients_upstream_and_no_value():
    model, (clean, patch) = tiny_target(), batches()
    plain = features(model, places(), clean, patch)
    spliced = features(model, places(), clean, patch, convention="detached_error")
    assert torch.equal(spliced.values(spliced.ones()), plain.values())
    first, second = attribute(plain), attribute(spliced)
    assert second.convention == "detached_error"
    for name in ("blocks.1", "blocks.1 error"):  # nothing is spliced behind the last site
        torch.testing.assert_close(second.values[name], first.values[name])
    x = model.model.blocks[0](model.model.embed(clean.inputs)).detach().requires_grad_()
    after = model.model.blocks[1](x)
    dictionary = places()["blocks.1"].dictionary.double()
    rebuilt = dictionary(after)
    out = model.model.head(model.model.blocks[2](rebuilt + (after - rebuilt).detach())).mean(1)
    (gradient,) = torch.autograd.grad((out[:, 0] - 0.3 * out[:, 1] ** 2).sum(), x)
    parts = dict(plain.clean_parts())["blocks.0"]
    for name, values in parts.items():
        torch.testing.assert_close(second.values[name], values.dot(gradient))
        assert not torch.allclose(second.values[name], first.values[name])
    exact = attribute(plain, Exact()), attribute(spliced, Exact())
    for name, values in exact[0].values.items():
        torch.testing.assert_close(values, exact[1].values[name])


def test_node_paths_reach_exact_effects_and_site_paths_do_not():
    bound = cases.CASES["features"]()
    exact, single = attribute(bound, Exact()), attribute(bound, NodePath(32))
    site = attribute(bound, IntegratedGradients("site", tolerance=1e-4, max_nodes=257))
    for name, values in exact.values.items():
        torch.testing.assert_close(single.values[name], values, rtol=0, atol=1e-4)
    assert single.estimand == "single removal"
    assert site.estimand == "share of joint removal"
    here = ["blocks.0", "blocks.0 error"]
    total = sum(site.values[name].flatten(1).sum(1) for name in here)
    joint = bound.values() - bound.values({**bound.ones(), **bound.full(0.0, here)})
    torch.testing.assert_close(total, joint.double(), rtol=2e-3, atol=1e-3)
    apart = max(float((site.values[n] - exact.values[n]).abs().max()) for n in here)
    assert apart > 0.1


@pytest.mark.parametrize("case", ["features, language", "nodes"])
def test_slopes_by_the_suffix_are_the_general_ones(case):
    bound = cases.CASES[case]()
    assert bound.patching.startswith("suffix")
    for name in bound.groups:
        index = every(bound, name)[::3]
        fast, general = (node_path(bound, name, index, points=2, general=g) for g in (False, True))
        assert fast.abs().max() > 0
        torch.testing.assert_close(fast, general)


def test_padding_and_a_constant_first_position_are_left_out():
    clean, patch = node_models.batches()
    model = Target(node_models.build("gpt2"), logit_difference)
    site = "blocks.1.hook_mlp_out"
    placed = {site: Placed(random_dictionary(16, 6), site, (site,))}
    for reference in ("counterfactual", "mean", "zero"):
        bound = features(model, placed, clean, patch, reference)
        norms = bound.norms()
        for name in bound.groups:
            assert not norms[name][:, 0].any()  # the same token in all prompts
            assert not norms[name][node_models.mask() == 0].any()
            assert norms[name][:, -1][node_models.mask()[:, -1] == 1].any()


class Counted(Mapping[str, Placed]):
    """Dictionaries that are made when they are asked for, and kept by nobody."""

    def __getitem__(self, name: str) -> Placed:
        return places()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(SITES)

    def __len__(self) -> int:
        return len(SITES)


def test_dictionaries_may_be_read_when_they_are_needed():
    model, (clean, patch) = tiny_target(), batches()
    held, lazy = (features(model, entry, clean, patch) for entry in (places(), Counted()))
    for name, values in attribute(held).values.items():
        torch.testing.assert_close(attribute(lazy).values[name], values)


def test_names_say_what_a_part_is():
    bound = cases.CASES["features, transcoders"]()
    names = list(bound.groups)
    assert [name for name in names if name.endswith(" error")] == [
        "blocks.0.down error",
        "blocks.1.down error",
    ]
    assert sum(name.endswith(" rest") for name in names) == 2
    assert bound.describe(names[0], (1, 3)) == f"{names[0]}[pos 1, feature 3]"
    assert bound.describe("blocks.0.down error", (1,)) == "blocks.0.down error[pos 1]"
    assert bound.groups[names[0]].source == "read at blocks.0.up:input"


def test_it_is_a_public_name_and_audits():
    bound = assay.features(tiny_target(), places(), *batches())
    found = assay.attribute(bound).audit(exact=6)
    assert found.table["group"].str.ends_with(" error").any()


BROKEN = ReLU(4, 3).requires_grad_(False)
BROKEN.W_dec[0, 1], BROKEN.W_dec[1, 1] = torch.nan, torch.inf

BAD = {
    "no dictionaries": ({}, "at least one"),
    "another width": ({"a": Placed(Identity(3), "blocks.0", ("blocks.0",))}, "width 3"),
    "no such site": ({"a": Placed(Identity(4), "blocks.7", ("blocks.7",))}, "did you mean"),
    "one site twice": (
        {name: Placed(Identity(4), "blocks.0", ("blocks.0",)) for name in "ab"},
        "both rebuild",
    ),
    "read where another writes": (
        {
            "a": Placed(Identity(4), "blocks.0", ("blocks.0",)),
            "b": Placed(Identity(4), "blocks.0", ("blocks.1",)),
        },
        "would not reach",
    ),
    "a parameter": (
        {"a": Placed(Identity(4), "embed.weight", ("embed.weight",))},
        "is a parameter",
    ),
    "NaN": (
        {"a": Placed(BROKEN, "blocks.0", ("blocks.0",))},
        r"W_dec of the dictionary 'a' holds 2 NaN or infinite values of 12",
    ),
    "a name of an error": (
        {"a error": Placed(Identity(4), "blocks.0", ("blocks.0",))},
        "names that end in",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_dictionaries_are_refused(case):
    dictionaries, words = BAD[case]
    with pytest.raises(InputError, match=words):
        features(tiny_target(), dictionaries, *batches())


def test_bad_references_and_conventions_are_refused():
    with pytest.raises(InputError, match="needs a patch batch"):
        features(tiny_target(), places(), batches()[0])
    with pytest.raises(InputError, match="did you mean detached_error"):
        features(tiny_target(), places(), *batches(), convention="detached_errors")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="points must be at least 1"):
        attribute(cases.CASES["features"](), NodePath(0))
