"""Channels through the core: the general operations agree with the closed forms."""

from __future__ import annotations

import pytest
import torch

from assay.attribution import Exact, SecondOrder, ablate, attribute, curvature, every
from assay.errors import InputError
from assay.mechanisms.channels import channels
from assay.targets.bilinear import BilinearNetwork


def bound(functional="logit", examples=4, **options):
    generator = torch.Generator().manual_seed(0)
    network = BilinearNetwork(
        16, 3, width=5, hidden=6, blocks=3, generator=generator, **options
    ).double()
    x = torch.randn(examples, 16, generator=generator, dtype=torch.float64)
    return channels(network, x, torch.arange(examples) % 3, functional)


OPTIONS = [{}, {"norm": True}, {"gate": "gelu"}, {"image": (4, 4), "patch": 2}]


@pytest.mark.parametrize("functional", ["logit", "cross_entropy"])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "norm", "gate", "patches"])
def test_closed_forms_equal_the_general_operations(functional, options):
    mechanisms = bound(functional, **options)
    first = attribute(mechanisms)
    closed = mechanisms.by_group(mechanisms.attributions())
    exact = attribute(mechanisms, Exact())
    second = attribute(mechanisms, SecondOrder())
    for name, group in mechanisms.groups.items():
        index = every(mechanisms, name)
        torch.testing.assert_close(first.values[name], closed[name], rtol=1e-10, atol=1e-12)
        general = ablate(mechanisms, name, index, general=True).T.reshape(group.shape)
        torch.testing.assert_close(exact.values[name], general, rtol=1e-9, atol=1e-10)
        bend = curvature(mechanisms, name, index).T.reshape(group.shape)
        torch.testing.assert_close(
            second.values[name], first.values[name] - bend / 2, rtol=1e-9, atol=1e-10
        )


def test_gates_of_one_and_zero():
    mechanisms = bound()
    assert torch.equal(
        mechanisms.values(mechanisms.ones()), mechanisms.target.values(mechanisms.batch)
    )
    network = mechanisms.target.model
    bare = network.head(network.embed(mechanisms.batch.inputs))
    expected = bare.gather(-1, mechanisms.batch.labels[:, None])[:, 0]
    torch.testing.assert_close(
        mechanisms.values(mechanisms.full(0.0)), expected, rtol=1e-12, atol=1e-12
    )


def test_bad_input():
    network = BilinearNetwork(16, 3, width=5, hidden=6, blocks=2)
    with pytest.raises(InputError, match="labels must be 4 integer classes"):
        channels(network, torch.zeros(4, 16), torch.zeros(3, dtype=torch.long))
    with pytest.raises(InputError, match=r"0\.\.2"):
        channels(network, torch.zeros(2, 16), torch.tensor([0, 3]))
    with pytest.raises(InputError, match=r"embed must be an nn\.Linear"):
        channels(torch.nn.Linear(2, 2), torch.zeros(2, 2), torch.tensor([0, 1]))
    with torch.no_grad():
        network.head.weight[0, 0] = float("inf")
    with pytest.raises(InputError, match=r"head\.weight"):
        channels(network, torch.zeros(2, 16), torch.tensor([0, 1]))
