"""The two squashings: values, slopes by the definition, and the functional transforms."""

from __future__ import annotations

import pytest
import torch

from assay.mechanisms.components import lower, upper

Z = torch.tensor([-2.0, -1e-3, 0.0, 0.3, 1.0, 1.4], dtype=torch.float64)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_lower_passes_the_gradient_as_defined(sign):
    z = Z.clone().requires_grad_()
    out = lower(z)
    assert torch.equal(out, Z.clamp(0, 1))
    out.backward(torch.full_like(Z, sign))
    dead = 0.01 * sign if sign < 0 else 0.0
    assert z.grad.tolist() == [dead, dead, dead, sign, sign, 0.0]


def test_upper_keeps_a_slope_above_one():
    z = Z.clone().requires_grad_()
    out = upper(z)
    torch.testing.assert_close(out, torch.tensor([0, 0, 0, 0.3, 1, 1.004], dtype=torch.float64))
    out.sum().backward()
    slopes = z.grad[[0, 1, 3, 5]]
    torch.testing.assert_close(slopes, torch.tensor([0, 0, 1, 0.01], dtype=torch.float64))


def test_functional_transforms_pass_through():
    def total(z):
        return (lower(z) * upper(z)).sum()

    rows = torch.stack([Z, Z.flip(0), Z + 0.1])
    batched = torch.vmap(torch.func.grad(total))(rows)
    for row, found in zip(rows, batched, strict=True):
        torch.testing.assert_close(found, torch.func.grad(total)(row))
    _, moved = torch.func.jvp(lower, (Z,), (torch.ones_like(Z),))
    assert moved.tolist() == [0.01, 0.01, 0.01, 1, 1, 0]
    torch.func.jvp(torch.func.grad(total), (Z,), (torch.ones_like(Z),))
