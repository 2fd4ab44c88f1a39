"""Components bound to a batch: gates against masked passes, boxes, routing, tied uses, refusals."""

from __future__ import annotations

import pytest
import torch
from component_networks import TOKENS, mixed, tied
from torch import Tensor, nn

import assay
from assay.audit import worst_case
from assay.core.kind import Reference
from assay.core.target import Batch, target
from assay.errors import InputError
from assay.mechanisms import kind
from assay.mechanisms.components import Decomposition, components, decomposition
from assay.mechanisms.components.masks import Mask, run_masked


def first_logit(output: Tensor, batch: Batch) -> Tensor:
    return output[:, -1, 0]


def bound(model: nn.Module, found: Decomposition, **options):
    return components(target(model, first_logit), Batch(TOKENS), found, **options)


@pytest.mark.parametrize("network", [mixed, tied])
def test_gates_are_masks(network):
    model, found = network()
    mechanisms = bound(model, found)
    generator = torch.Generator().manual_seed(0)
    gates = {
        name: torch.rand(gate.shape, generator=generator, dtype=torch.float64)
        for name, gate in mechanisms.ones().items()
    }
    masks = {site.name: Mask(gates[site.name], gates[f"{site.name}.delta"]) for site in found.sites}
    expected = run_masked(model, TOKENS, found, masks)[:, -1, 0]
    torch.testing.assert_close(mechanisms.values(gates), expected)


def test_there_is_a_gate_for_every_position_and_component_and_one_for_the_delta():
    model, found = mixed()
    shapes = {name: group.shape for name, group in bound(model, found).groups.items()}
    assert shapes["up"] == (2, 3, 3)
    assert shapes["up.delta"] == (2, 3)
    assert list(shapes) == ["embed", "embed.delta", "up", "up.delta", "out", "out.delta"]


def test_boxes_run_from_the_importance_to_one_and_for_the_delta_from_zero():
    model, found = mixed()
    routed = torch.tensor([[True, False, True], [True, True, False]])
    mechanisms = bound(model, found, routed=routed)
    g = found.importances(model, TOKENS)
    low, high = mechanisms.box("up")
    assert torch.equal(low[routed], g["up"][routed])
    assert (low[~routed] == 1).all()
    assert (high == 1).all()
    low, high = mechanisms.box("up.delta")
    assert not low[routed].any()
    assert (low[~routed] == 1).all()


def test_the_worst_case_is_within_the_boxes_and_beats_importance_masks():
    model, found = mixed()
    mechanisms = bound(model, found)
    worst = worst_case(mechanisms, {}, steps=6)
    for name, gate in worst.gates.items():
        low, high = mechanisms.box(name)
        assert ((gate >= low - 1e-9) & (gate <= high + 1e-9)).all()
    lowest = {name: mechanisms.box(name)[0] for name in mechanisms.groups}
    plain = mechanisms.target.damage(mechanisms.values(), mechanisms.values(lowest))
    assert (worst.damage >= plain - 1e-9).all()


def test_positions_that_are_not_routed_have_no_parts():
    model, found = mixed()
    routed = torch.tensor([[True, False, True], [True, True, False]])
    mechanisms = bound(model, found, routed=routed)
    gates = {name: gate.clone() for name, gate in mechanisms.full(0.0).items()}
    moved = {name: torch.where(_over(routed, gate), gate, 0.3) for name, gate in gates.items()}
    assert torch.equal(mechanisms.values(gates), mechanisms.values(moved))
    norms = mechanisms.norms()
    assert not norms["up"][~routed].any()
    assert (norms["up.delta"][routed] > 0).all()


def _over(routed: Tensor, gate: Tensor) -> Tensor:
    return routed.reshape(*routed.shape, *[1] * (gate.ndim - 2))


def test_the_unbound_kind_is_found_by_name_and_refuses_a_reference():
    model, found = mixed()
    assert kind("components") is Decomposition
    mechanisms = found.bind(target(model, first_logit), Batch(TOKENS))
    assert mechanisms.kind == "components"
    with pytest.raises(InputError, match="take no reference"):
        found.bind(target(model, first_logit), Batch(TOKENS), Reference("zero"))
    assert assay.components is components
    assert assay.decomposition is decomposition


def test_tied_matrices_are_stated():
    model, found = tied()
    assert bound(model, found).tied == {"embed": ("head",)}


def test_parts_have_names():
    model, found = mixed()
    mechanisms = bound(model, found)
    assert mechanisms.describe("up", (2, 1)) == "up[pos 2, component 1]"
    assert mechanisms.describe("up.delta", (2,)) == "up.delta[pos 2]"


def test_padding_is_not_routed():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mixed()[0]

        def forward(self, input_ids, attention_mask):
            return self.inner(input_ids)

    model = Padded()
    found = decomposition(model, "inner.up", 2).double()
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    batch = Batch({"input_ids": TOKENS, "attention_mask": mask})
    mechanisms = components(target(model, first_logit), batch, found)
    assert torch.equal(mechanisms.routed, mask.bool())
    assert mechanisms.take(torch.tensor([1])).routed.tolist() == [[True, True, False]]
    whole = components(
        target(model, first_logit),
        Batch({"input_ids": TOKENS, "attention_mask": torch.ones_like(mask)}),
        found,
    )
    assert whole.routed is None


def test_what_does_not_fit_is_refused():
    model, found = mixed()
    wider = nn.Sequential()
    wider.up = nn.Linear(2, 2)
    with pytest.raises(InputError, match="no layer 'embed'"):
        bound(wider, found)
    other = mixed()[0]
    other.up = nn.Linear(3, 5).double()
    with pytest.raises(InputError, match=r"'up' is \(3, 5\) in the model and \(4, 5\)"):
        bound(other, found)
    with pytest.raises(InputError, match=r"routed has shape \(2, 2\)"):
        bound(model, found, routed=torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(InputError, match="no site 'upp'"):
        found.site("upp")
