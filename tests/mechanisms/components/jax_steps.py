"""Run in an environment with JAX: compare the JAX step with the fixture that torch wrote, compiled,
on one, two and four simulated devices. Prints one JSON object."""

from __future__ import annotations

import json
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"

import component_steps as reference
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from assay.errors import InputError
from assay.learn.loop import cosine
from assay.mechanisms.components import jax as ours

FIXTURE = load_file(sys.argv[1])
SITES = ("embed", "up", "out")


def network():
    matrices = {site: jnp.asarray(FIXTURE[f"matrix/{site}"]) for site in SITES}
    up, out = jnp.asarray(FIXTURE["bias/up"]), jnp.asarray(FIXTURE["bias/out"])

    def run(product, tokens):
        x = product("embed", tokens)
        return product("out", jnp.tanh(product("up", x) + up)) + out

    return ours.Network(run, matrices, ("embed",))


def tree(prefix):
    def of(role):
        return {site: jnp.asarray(FIXTURE[f"{prefix}/{role}/{site}"]) for site in SITES}

    nets = {role: of(role) for role in ("w1", "b1", "w2", "b2")}
    importance = {site: {role: nets[role][site] for role in nets} for site in SITES}
    return {"V": of("V"), "U": of("U"), "importance": importance}


def largest(found, expected):
    """The largest difference over the largest entry of each leaf."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max() / max(np.abs(np.asarray(b)).max(), 1e-6))
        for a, b in pairs
    )


def ulps(a, b):
    a, b = np.float32(a), np.float32(b)
    return abs(int(a.view(np.int32)) - int(b.view(np.int32)))


def batch(step):
    sources = {site: jnp.asarray(FIXTURE[f"{step}/drawn/{site}"]) for site in SITES}
    routes = {site: jnp.asarray(FIXTURE[f"{step}/route/{site}"]) for site in SITES}
    return ours.Batch(
        jnp.asarray(FIXTURE["tokens"].astype(np.int32)),
        {"stochastic_subset": sources},
        {"stochastic_subset": routes},
    )


def train(form, devices):
    mesh = ours.make_mesh(devices)
    training = reference.TRAINING
    step = ours.Step(
        network(),
        reference.objective(form),
        training.rate,
        training.importance_rate,
        reference.STEPS,
    )
    compiled = jax.jit(step)
    sources = {site: jnp.asarray(FIXTURE[f"source/{site}"]) for site in SITES}
    state = ours.replicate(ours.begin(tree("begin"), {"persistent_all": sources}), mesh)
    logged = []
    for place in range(reference.STEPS):
        own = ours.split_batch(batch(place), mesh)
        assert len(own.inputs.sharding.device_set) == devices
        factor = jnp.float32(cosine(place / reference.STEPS, floor=0.1))
        state, terms = compiled(state, own, factor)
        logged.append({key: float(term) for key, term in terms.items()})
    return state, logged


def refused(call):
    try:
        call()
    except InputError as error:
        return str(error)
    return ""


answer = {"devices": jax.device_count(), "terms": {}, "parameters": {}, "shards": {}, "ulps": {}}
for label, form in (("lp", reference.LP), ("smooth", reference.SMOOTH)):
    state, logged = train(form, 1)
    for step, terms in enumerate(logged):
        for key, value in terms.items():
            expected = float(FIXTURE[f"{label}/{step}/{key}"])
            error = abs(value - expected) / max(abs(expected), 1e-6)
            answer["terms"][key] = max(answer["terms"].get(key, 0.0), error)
    expected = tree(f"{label}/end")
    answer["parameters"][label] = largest(state.parameters, expected)
    sources = {site: FIXTURE[f"{label}/end/source/{site}"] for site in SITES}
    held = state.sources["persistent_all"]["source"]
    answer["parameters"][f"{label} sources"] = largest(held, sources)
    for devices in (2, 4):
        other, again = train(form, devices)
        answer["shards"][f"{label} {devices}"] = largest(other.parameters, state.parameters)
        answer["shards"][f"{label} {devices} terms"] = largest(again, logged)
    above = {"site": jnp.asarray(FIXTURE["above"])}
    for done in (0.0, 0.5, 1.0):
        value = ours.minimality(form, above, 64, jnp.float32(done))
        answer["ulps"][f"{label} at {done}"] = ulps(value, FIXTURE[f"{label}/minimality at {done}"])
answer["too many devices"] = refused(lambda: ours.make_mesh(5))
answer["odd batch"] = refused(lambda: ours.split_batch(jnp.zeros((6, 2)), ours.make_mesh(4)))
print(json.dumps(answer))
