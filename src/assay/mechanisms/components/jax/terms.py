"""The terms of the objective in JAX, with the formulas of `squash`, `minimality`, `scene` and
`objective` beside this package.

Arrays split over devices are whole arrays to JAX: a sum over positions is the sum over all of them,
so that nothing is summed again before the logarithm."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from assay.mechanisms.components.minimality import LpMinimality, SmoothL0
from assay.mechanisms.components.objective import Divergence, Form
from assay.mechanisms.components.squash import LEAK


@jax.custom_vjp
def lower(z: Array) -> Array:
    """Return clamp(z, 0, 1); backwards as `assay.mechanisms.components.lower`."""
    return jnp.clip(z, 0, 1)


def _lower_forward(z: Array) -> tuple[Array, Array]:
    return lower(z), z


def _lower_backward(z: Array, gradient: Array) -> tuple[Array]:
    inside = jnp.where(z <= 1, gradient, 0.0)
    return (jnp.where(z > 0, inside, LEAK * jnp.minimum(gradient, 0)),)


lower.defvjp(_lower_forward, _lower_backward)


def upper(z: Array) -> Array:
    """Return max(z, 0) up to one and 1 + 0.01 (z - 1) above it."""
    # Written with where: at a kink the gradient is that of the piece below it, as in torch.
    positive = jnp.where(z >= 0, z, 0.0)
    return positive - (1 - LEAK) * jnp.where(z > 1, z - 1, 0.0)


def minimality(
    form: LpMinimality | SmoothL0, above: Mapping[str, Array], count: float, done: Array
) -> Array:
    """Return the penalty of upper importances (*positions, components) of all sites over `count`
    positions, at a share `done` of training.
    """
    return sum(
        (_price(form, _values(form, a, done).reshape(-1, a.shape[-1]).sum(0), count).sum())
        for a in above.values()
    )


def _annealed(first: float, last: float, form: LpMinimality | SmoothL0, done: Array) -> Array:
    if form.end == form.begin:
        return jnp.where(done >= form.begin, last, first)
    share = jnp.clip((done - form.begin) / (form.end - form.begin), 0.0, 1.0)
    return first + (last - first) * share


def _values(form: LpMinimality | SmoothL0, a: Array, done: Array) -> Array:
    if isinstance(form, LpMinimality):
        start = form.p if form.p_start is None else form.p_start
        p = _annealed(start, form.p, form, done)
        return (a + form.eps) ** p.astype(a.dtype)
    gamma = _annealed(form.gamma_start, form.gamma, form, done).astype(a.dtype)
    squares = jnp.square(a)
    return squares / (squares + gamma**2)


def _price(form: LpMinimality | SmoothL0, total: Array, count: float) -> Array:
    mean = total / count
    if isinstance(form, LpMinimality):
        return form.coefficient * (
            mean * (1 + form.beta * jnp.log2(1 + total)) if form.beta else mean
        )
    frequent = mean * jnp.log2(1 + form.references * mean)
    return form.coefficient * mean + form.frequency * frequent


def diverge(output: Array, clean: Array, kind: Divergence) -> Array:
    """Return every position's divergence: the mean squared error, or KL(clean || output)."""
    if kind == "mse":
        return jnp.square(output - clean).mean(-1)
    expected = jax.nn.log_softmax(clean)
    return (jnp.exp(expected) * (expected - jax.nn.log_softmax(output))).sum(-1)


def faithfulness(
    matrices: Mapping[str, Array], v: Mapping[str, Array], u: Mapping[str, Array], form: Form
) -> Array:
    """Return what is left of the matrices W (in, out), as `Faithfulness` does."""
    squares = {name: jnp.square(w - v[name] @ u[name]).sum() for name, w in matrices.items()}
    if form == "sum":
        return sum(squares.values()) / sum(w.size for w in matrices.values())
    return sum(squares[name] / jnp.square(w).sum() for name, w in matrices.items())
