"""The training step of components in JAX: compiled, and split over a mesh of devices.

The torch step is the reference; this one agrees with it term by term. JAX is the extra `[jax]`, and
nothing outside this package imports it."""

from assay.errors import InputError

try:
    import jax as _jax  # noqa: F401
except ImportError as error:
    raise InputError(
        "the JAX step needs JAX, which is not installed; add it with: pip install"
        " 'assay-interp[jax]'"
    ) from error

from assay.mechanisms.components.jax.mesh import make_mesh, replicate, split_batch
from assay.mechanisms.components.jax.step import Batch, Network, State, Step, begin
from assay.mechanisms.components.jax.terms import (
    diverge,
    faithfulness,
    lower,
    minimality,
    upper,
)

__all__ = [
    "Batch",
    "Network",
    "State",
    "Step",
    "begin",
    "diverge",
    "faithfulness",
    "lower",
    "make_mesh",
    "minimality",
    "replicate",
    "split_batch",
    "upper",
]
