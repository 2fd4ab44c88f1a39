"""A mesh of devices: batches are split over it, everything else is on every device."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from assay.errors import InputError

AXIS = "data"


def make_mesh(devices: int | None = None) -> Mesh:
    """Return a mesh of the first `devices` devices, of all by default.

    Raises InputError where JAX has no device, or fewer than asked for."""
    try:
        there = jax.devices()
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"JAX has no device to compute on ({_first_line(error)}); set JAX_PLATFORMS=cpu"
            " or install JAX for your accelerator"
        ) from error
    wanted = len(there) if devices is None else devices
    if not 1 <= wanted <= len(there):
        raise InputError(
            f"a mesh of {wanted} devices was asked for, and JAX sees {len(there)}; on a CPU set"
            f" XLA_FLAGS=--xla_force_host_platform_device_count={wanted}"
        )
    return Mesh(there[:wanted], (AXIS,))


def split_batch(tree: Any, mesh: Mesh) -> Any:
    """Return arrays whose first axis, the examples, is split over the mesh.

    Raises InputError where the devices do not divide the examples."""
    for leaf in jax.tree.leaves(tree):
        if leaf.shape[0] % mesh.size:
            raise InputError(
                f"a batch of {leaf.shape[0]} examples cannot be split over {mesh.size} devices;"
                " give a multiple"
            )
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(AXIS)))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Return arrays of which every device of the mesh has a copy."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "no platform")
