"""One training step in JAX: the loss of a batch, its gradients, AdamW, and a persistent
adversary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from assay.errors import InputError
from assay.mechanisms.components.jax.terms import diverge, faithfulness, lower, minimality, upper
from assay.mechanisms.components.objective import Objective, Recon
from assay.mechanisms.components.sources import Persistent, Stochastic

Product = Callable[[str, Array], Array]
Tree = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Network:
    """A frozen network: `run(product, inputs)` returns its output (*positions, outputs) and calls
    `product(site, x)` for `x W` of every matrix in `matrices`, (in, out) each; x are indices at the
    sites in `lookup`, whose rows are looked up."""

    run: Callable[[Product, Array], Array]
    matrices: Mapping[str, Array]
    lookup: tuple[str, ...] = ()


class State(NamedTuple):
    """What a step carries to the next: `parameters` (V, U and the importance function's w1, b1, w2,
    b2 by site), their moments, every adversary's sources with theirs, and the number of steps."""

    parameters: Tree
    first: Tree
    second: Tree
    sources: Tree
    steps: Array


class Batch(NamedTuple):
    """The inputs (examples, ...) and, for every stochastic term, the sources (examples, ...,
    C + 1) of every site and the positions that are routed, by site (none: all)."""

    inputs: Array
    sources: Tree
    routes: Tree


def begin(parameters: Tree, sources: Tree) -> State:
    """Return the state before the first step; `sources` are those of every persistent term, by
    site, (C + 1,) each.
    """
    zeros = partial(jax.tree.map, jnp.zeros_like)
    nothing = jnp.zeros((), jnp.int32)
    held = {
        name: {"source": own, "first": zeros(own), "second": zeros(own), "steps": nothing}
        for name, own in sources.items()
    }
    return State(parameters, zeros(parameters), zeros(parameters), held, nothing)


@dataclass(frozen=True, eq=False)
class Step:
    """The step of an objective on a network; `Step(...)` is called under `jax.jit`.

    The importance function is the `shared` one: a net of one hidden layer per site. Raises
    InputError for terms other than stochastic ones (routing all or subset) and persistent
    adversaries, and for running means."""

    network: Network
    objective: Objective
    rate: float
    importance_rate: float
    total_steps: int

    def __post_init__(self) -> None:
        for name, term in self.terms.items():
            known = isinstance(term.source, Stochastic) and term.routing != "layerwise"
            alone = isinstance(term.source, Persistent) and term.routing == "all"
            if not known and not alone:
                raise InputError(
                    f"the JAX step has no term {name!r}; give stochastic terms of all sites or of"
                    " subsets, and persistent adversaries of all sites"
                )
        if self.objective.minimality.half_life is not None:
            raise InputError("the JAX step has no running means; leave out half_life")

    @property
    def terms(self) -> dict[str, Recon]:
        return dict(zip(self.objective.names, self.objective.recon, strict=True))

    def __call__(self, state: State, batch: Batch, factor: Array) -> tuple[State, Tree]:
        """Return the state after a step at `factor` times the rates, and the terms of its loss."""
        done = state.steps / self.total_steps
        state = self._warm(state, batch)
        leaves = {name: own["source"] for name, own in state.sources.items()}
        gradients, terms = jax.grad(self.loss, argnums=(0, 1), has_aux=True)(
            state.parameters, leaves, batch, done
        )
        state = self._descend(state, gradients[0], factor)
        return self._ascend(state, gradients[1]), terms

    def loss(self, parameters: Tree, leaves: Tree, batch: Batch, done: Array) -> tuple[Array, Tree]:
        """Return the loss of a batch, and its terms without their coefficients."""
        clean, logits = self._read(parameters, batch.inputs)
        g = {site: lower(z) for site, z in logits.items()}
        terms: Tree = {}
        total = jnp.zeros(())
        for name, term in self.terms.items():
            sources = leaves[name] if name in leaves else batch.sources[name]
            routes = batch.routes.get(name, {})
            terms[name] = self._divergence(parameters, batch.inputs, clean, g, sources, routes)
            total = total + term.coefficient * terms[name]
        above = {site: upper(z) for site, z in logits.items()}
        positions = clean[..., 0].size
        terms["minimality"] = minimality(self.objective.minimality, above, positions, done)  # type: ignore[arg-type]
        total = total + terms["minimality"]
        wanted = self.objective.faithfulness
        if wanted is not None:
            terms["faithfulness"] = faithfulness(
                self.network.matrices, parameters["V"], parameters["U"], wanted.form
            )
            total = total + wanted.coefficient * terms["faithfulness"]
        return total, {**terms, "total": total}

    def _read(self, parameters: Tree, inputs: Array) -> tuple[Array, Tree]:
        """Return the clean output and the importance function's logits of every site."""
        logits: Tree = {}

        def product(site: str, x: Array) -> Array:
            looked_up = site in self.network.lookup
            vector = parameters["V"][site][x] if looked_up else x
            own = parameters["importance"][site]
            hidden = jax.nn.gelu(vector @ own["w1"] + own["b1"], approximate=False)
            logits[site] = hidden @ own["w2"] + own["b2"]
            matrix = self.network.matrices[site]
            return matrix[x] if looked_up else x @ matrix

        return self.network.run(product, inputs), logits

    def _divergence(
        self, parameters: Tree, inputs: Array, clean: Array, g: Tree, sources: Tree, routes: Tree
    ) -> Array:
        """Return the mean divergence under `y = x W + (delta - 1) x W + ((x V) (m - delta)) U`."""

        def product(site: str, x: Array) -> Array:
            looked_up = site in self.network.lookup
            v, matrix = parameters["V"][site], self.network.matrices[site]
            whole, inner = (matrix[x], v[x]) if looked_up else (x @ matrix, x @ v)
            source, delta = sources[site][..., :-1], sources[site][..., -1:]
            rest, shrink = source + g[site] * (1 - source) - delta, delta - 1
            if site in routes:
                routed = routes[site][..., None]
                rest, shrink = rest * routed, shrink * routed
            return whole + shrink * whole + (inner * rest) @ parameters["U"][site]

        output = self.network.run(product, inputs)
        return diverge(output, clean, self.objective.divergence).mean()

    def _warm(self, state: State, batch: Batch) -> State:
        """Let every adversary take its ascents before the main backward pass."""
        for name, term in self.terms.items():
            if not isinstance(term.source, Persistent):
                continue
            clean, logits = self._read(state.parameters, batch.inputs)
            g = {site: lower(z) for site, z in logits.items()}
            for _ in range(term.source.warm):

                def climbed(sources: Tree, clean: Array = clean, g: Tree = g) -> Array:
                    return self._divergence(state.parameters, batch.inputs, clean, g, sources, {})

                gradient = jax.grad(climbed)(state.sources[name]["source"])
                state = self._ascend(state, {name: gradient})
        return state

    def _ascend(self, state: State, gradients: Tree) -> State:
        """Take one Adam step up the gradients of sources, and clip to [0, 1]."""
        if not gradients:
            return state
        held = dict(state.sources)
        for name, gradient in gradients.items():
            plan = self.terms[name].source
            assert isinstance(plan, Persistent)
            steps = state.sources[name]["steps"] + 1
            first, second, moved = _adam(
                state.sources[name]["first"],
                state.sources[name]["second"],
                gradient,
                steps,
                plan.betas,
            )
            source = jax.tree.map(
                lambda own, step: jnp.clip(own + plan.rate * step, 0, 1),
                state.sources[name]["source"],
                moved,
            )
            held[name] = {"source": source, "first": first, "second": second, "steps": steps}
        return state._replace(sources=held)

    def _descend(self, state: State, gradients: Tree, factor: Array) -> State:
        """Take one step of AdamW without weight decay down the gradients."""
        steps = state.steps + 1
        first, second, moved = _adam(state.first, state.second, gradients, steps, (0.9, 0.999))
        rates = {"V": self.rate, "U": self.rate, "importance": self.importance_rate}
        parameters = {
            key: jax.tree.map(
                lambda own, step, rate=rates[key]: own - rate * factor * step,
                state.parameters[key],
                moved[key],
            )
            for key in state.parameters
        }
        return state._replace(parameters=parameters, first=first, second=second, steps=steps)


def _adam(
    first: Tree, second: Tree, gradients: Tree, steps: Array, betas: tuple[float, float]
) -> tuple[Tree, Tree, Tree]:
    """Return the two moments after a gradient, and the step of length about one."""
    one, two = betas
    first = jax.tree.map(lambda m, g: m + (1 - one) * (g - m), first, gradients)
    second = jax.tree.map(lambda s, g: s + (1 - two) * (g * g - s), second, gradients)
    count = steps.astype(jnp.result_type(float))
    moved = jax.tree.map(
        lambda m, s: m / (1 - one**count) / (jnp.sqrt(s / (1 - two**count)) + 1e-8), first, second
    )
    return first, second, moved
