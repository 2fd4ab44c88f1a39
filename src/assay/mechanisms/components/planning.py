"""What a decomposition will take, before anything is loaded: parameters, memory, arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from assay.errors import unknown
from assay.mechanisms.components.importance import IMPORTANCES
from assay.mechanisms.components.sites import WeightSite

FLOAT = 4


@dataclass(frozen=True)
class Plan:
    """Estimates of one training run: trained `parameters` (`factors` of them in V and U), bytes of
    `state` (values, gradients and two moments, float32), of the frozen `model`, and of
    `activations` kept for the backward pass of one batch; `flops` of one step."""

    factors: int
    parameters: int
    state: int
    model: int
    activations: int
    flops: int

    @property
    def memory(self) -> int:
        """Return all bytes together."""
        return self.state + self.model + self.activations


def plan_training(
    sites: Sequence[WeightSite],
    *,
    positions: int,
    passes: int,
    model_parameters: int,
    model_activations: int,
    importance: str = "transformer",
    **options: int,
) -> Plan:
    """Return what one step over `positions` with `passes` masked runs of all sites takes.

    A masked run costs `2 P` operations per position forwards and `4 P` backwards for P entries of V
    and U, and `2 M + 2 M` for M frozen parameters, which take no gradient; the clean run adds `2 M`
    and the inner activations. The backward pass stops at the first site, which this leaves out.
    `model_activations` are the network's own numbers per position and run. Activations are counted
    as 4 numbers per component for the importances and 3 for each masked run, in float32."""
    factors = sum(site.components * (site.inputs + site.outputs) for site in sites)
    reading = ("scalar", "relative")
    read = [site for site in sites if importance in reading and not site.lookup]
    inner = sum(site.components * site.inputs for site in read)
    trained = count_importance(importance, sites, **options)
    components = sum(site.components for site in sites)
    ends = sum(site.inputs + site.outputs for site in sites)
    kept = (4 + 3 * passes) * components + (1 + passes) * (ends + model_activations)
    flops = passes * (6 * factors + 4 * model_parameters) + 6 * trained
    flops += 4 * inner
    flops += 2 * model_parameters
    return Plan(
        factors,
        factors + trained,
        4 * FLOAT * (factors + trained),
        FLOAT * model_parameters,
        FLOAT * positions * kept,
        positions * flops,
    )


def count_importance(name: str, sites: Sequence[WeightSite], **options: int) -> int:
    """Return the number of parameters of an importance function; InputError for an unknown name."""
    if name not in IMPORTANCES:
        raise unknown("importance function", name, IMPORTANCES)
    usual = {"shared": 128, "relative": 128, "transformer": 256}.get(name, 16)
    hidden = options.get("hidden", usual)
    widths = [site.components if site.lookup else site.inputs for site in sites]
    counts = [site.components for site in sites]
    if name == "scalar":
        return sum(c * (3 * hidden + 1) for c in counts)
    if name == "vector":
        return sum(c * (hidden * (w + 2) + 1) for c, w in zip(counts, widths, strict=True))
    if name in ("shared", "relative"):
        nets = sum(hidden * (w + 1) + c * (hidden + 1) for c, w in zip(counts, widths, strict=True))
        return nets + (sum(counts) if name == "relative" else 0)
    width, blocks = options.get("width", 128), options.get("blocks", 2)
    block = 4 * width * width + 2 * width * hidden + hidden + width
    ends = sum(w * width + c * (width + 1) for c, w in zip(counts, widths, strict=True))
    return ends + blocks * block
