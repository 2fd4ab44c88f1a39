"""Second order in a channel's gate, for every channel at once."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from assay.mechanisms.channels.attribution import attribute_channels
from assay.mechanisms.channels.clean import Clean, last_gradient
from assay.mechanisms.channels.forms import interaction_forms, jacobians, norm_form, norm_jacobian


def second_order_channels(clean: Clean) -> Float[Tensor, "examples blocks hidden"]:
    """Return `attr - q`, the second-order estimate of `F - F(channel k ablated)`."""
    return attribute_channels(clean) - half_curvatures(clean)


@torch.no_grad()
def half_curvatures(clean: Clean) -> Float[Tensor, "examples blocks hidden"]:
    """Return `q = 1/2 d^2F / dgate_k^2`, in closed form.

    The half Hessian of the functional at the state behind block l follows from the one behind l +
    1, `H_l = Q_{l+1} + J_{l+1}^T H_{l+1} J_{l+1}`, and then `q_k = h_k^2 D[:,k]^T H_l D[:,k]`,
    which equals `sum_m t_{m-1}^T Q_m t_{m-1}` with `t_m = J_m t_{m-1}`, `t_l = -D[:,k] h_k`. A live
    norm adds its own second derivative, and cross-entropy half the variance, under the predicted
    probabilities, of the linear change of the logits.

    Raises InputError when the network has a gate nonlinearity.
    """
    weights = clean.weights
    later = range(1, len(weights.layers))
    jacobian, forms = jacobians(clean, later), interaction_forms(clean, later)
    behind = last_gradient(clean)
    hessian = behind.new_zeros(len(behind), weights.width, weights.width)
    # Logits mix positions, so the curvature of the cross-entropy cannot join the Hessians: the
    # logits' Jacobian is carried too.
    to_logits = (weights.head / clean.positions).expand(len(behind), -1, -1)
    found = []
    for block in reversed(range(len(weights.layers))):
        layer, h = weights.layers[block], clean.hidden[block]
        norm = norm_jacobian(clean, block)
        if norm is not None:
            hessian, to_logits = norm.mT @ hessian @ norm, to_logits @ norm
        curved = norm_form(clean, block, behind)
        if curved is not None:
            hessian = hessian + curved
        q = clean.pool(h.square() * ((hessian @ layer.down) * layer.down).sum(-2))
        if clean.functional == "cross_entropy":
            q = q + 0.5 * _variance(
                clean.logits.softmax(-1), clean.pool((to_logits @ layer.down) * h.unsqueeze(1))
            )
        found.append(q)
        if block == 0:
            break
        to_logits = to_logits @ jacobian[block]
        hessian = forms[block] + jacobian[block].mT @ hessian @ jacobian[block]
        behind = (clean.gradients[block].unsqueeze(-2) @ jacobian[block]).squeeze(-2)
    return torch.stack(found[::-1], 1)


def _variance(p: Tensor, change: Tensor) -> Tensor:
    """Return the variance of `change` (examples, classes, channels) under the probabilities `p`
    (examples, classes).
    """
    p = p.to(change.dtype).unsqueeze(-1)
    return (p * (change - (p * change).sum(1, keepdim=True)).square()).sum(1)
