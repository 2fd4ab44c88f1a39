"""Norms of plain operations have the values of the fused ones, and second derivatives that are
right under nested forward mode.
"""

from __future__ import annotations

import node_models
import pytest
import torch
from torch import nn
from torch.func import jvp
from torch.nn import functional

from assay.attribution.second import curvature
from assay.core.mechanisms import differentiable
from assay.core.norms import PlainNorms
from assay.core.target import Target
from assay.mechanisms.nodes import nodes
from assay.targets.metrics import logit_difference

NORMS = {
    "layer": nn.LayerNorm(6, eps=1e-3),
    "layer without weights": nn.LayerNorm((2, 6), elementwise_affine=False),
    "rms": nn.RMSNorm(6, eps=1e-3),
    "rms without eps": nn.RMSNorm(6),
    "group": nn.GroupNorm(2, 4),
    "function": lambda x: functional.layer_norm(x, (6,), None, None, 0.1),
}


@pytest.mark.parametrize("name", list(NORMS))
def test_values_and_second_derivatives(name):
    norm = NORMS[name]
    generator = torch.Generator().manual_seed(0)
    if isinstance(norm, nn.Module):
        norm.double()
        for parameter in norm.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.data = drawn.double()
    x, v = torch.randn(2, 3, 4, 2, 6, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        with PlainNorms():
            plain = norm(x)
        torch.testing.assert_close(plain, norm(x))

    def along(step):
        return norm(x + step * v).square().mul(v).sum()

    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)

    def twice():
        return jvp(lambda step: jvp(along, (step,), (one,))[1], (zero,), (one,))[1]

    step = zero.clone().requires_grad_()
    (slope,) = torch.autograd.grad(along(step), step, create_graph=True)
    (expected,) = torch.autograd.grad(slope, step)
    assert expected.abs() > 1e-3
    torch.testing.assert_close(differentiable(twice), expected)


def test_curvature_of_a_language_model_is_that_of_reverse_mode():
    clean, patch = node_models.batches()
    target = Target(node_models.build("gpt2"), logit_difference)
    name = "blocks.0.hook_mlp_out"
    bound = nodes(target, clean, patch, [name])
    found = curvature(bound, name, torch.tensor([[4], [5]]))
    for row, place in enumerate((4, 5)):
        step = torch.zeros((), dtype=torch.float64, requires_grad=True)
        gates = bound.ones([name])[name].clone()
        shift = torch.zeros_like(gates)
        shift[:, place] = 1
        values = bound.values({name: gates + step * shift})
        for example, value in enumerate(values):
            (slope,) = torch.autograd.grad(value, step, create_graph=True)
            (expected,) = torch.autograd.grad(slope, step, retain_graph=True)
            assert float(found[row, example]) == pytest.approx(float(expected), rel=1e-5, abs=1e-9)
    assert found.abs().max() > 1e-4
