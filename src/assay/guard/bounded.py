"""What bounds prove about activations: intervals in which an edit changes no decision, and
activations that need no explanation because no value of theirs changes the decision."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from torch import Tensor, nn

from assay.bounds import Graph, Interval, bound, graph_of
from assay.bounds.rounding import Array
from assay.errors import AssayError, InputError

_STEPS = 16  # halvings of an interval's end


@dataclass(frozen=True)
class Site:
    """The activations at one place of a network: the rest of the network as a graph, and the range
    (width,) of every activation over all inputs of the network's domain.
    """

    suffix: Graph
    low: Array
    high: Array

    @property
    def width(self) -> int:
        return len(self.low)

    @property
    def inactive(self) -> Bool[Tensor, " width"]:
        """The activations that provably never rise above zero, nor fall below it."""
        return torch.from_numpy((self.low == 0) & (self.high == 0))


def site(model: nn.Sequential, split: int, domain: tuple[Tensor, Tensor]) -> Site:
    """Return the activations that the first `split` modules of a sequential network put out, for
    inputs in a box `domain` (low, high), (inputs,) each.

    Raises InputError for a split at either end, a domain that is no finite box, and modules that
    have no bound."""
    if not 0 < split < len(model):
        raise InputError(f"split must lie between 1 and {len(model) - 1}, got {split}")
    low, high = (end.detach().double().numpy() for end in domain)
    if low.shape != high.shape or low.ndim != 1 or not (low <= high).all():
        raise InputError("domain: two vectors low <= high of one length are needed")
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise InputError("domain: a finite box is needed; nothing is proved about all numbers")
    # A ReLU is exact in any arithmetic: its ends are those of what it reads, cut at zero.
    rectified = split > 1 and isinstance(model[split - 1], nn.ReLU)
    prefix, suffix = model[: split - rectified], model[split:]
    found = bound(graph_of(prefix, low.shape), Interval(low[None], high[None]), level="float32")
    below, above = found.lower[0], found.upper[0]
    if rectified:
        below, above = np.maximum(below, 0), np.maximum(above, 0)
    return Site(graph_of(suffix, (len(below),)), below, above)


def keeps_decision(
    place: Site, low: Array, high: Array, decision: Array, *, classes: int | None = None
) -> NDArray[np.bool_]:
    """Return whether the decision provably stays as it is for all activations in boxes (samples,
    width): every margin's lower bound is above zero, as float32 executes the network.
    """
    size = place.suffix.nodes[-1].shape[0] if classes is None else classes
    rows = np.zeros((len(decision), size - 1, size))
    for sample, best in enumerate(decision):
        others = [one for one in range(size) if one != best]
        rows[sample, np.arange(size - 1), others] = -1
        rows[sample, :, best] = 1
    try:
        found = bound(place.suffix, Interval(low, high), objective=rows, level="float32")
    except AssayError:  # an overflow proves nothing
        return np.zeros(len(decision), dtype=bool)
    return np.asarray((found.lower > 0).all(1))


def certified_interval(
    place: Site, point: Tensor, coordinate: int, decision: int
) -> tuple[float, float]:
    """Return an interval around one activation of a point (width,), within its range, in which the
    decision provably stays: each end is found by halving. It holds the activation alone where
    nothing can be proved. The ends are float32 numbers.
    """
    x = point.detach().double().numpy()[None]
    best = np.array([decision])
    ends = []
    for limit in (min(place.low[coordinate], x[0, coordinate]),
                  max(place.high[coordinate], x[0, coordinate])):  # fmt: skip
        here = x[0, coordinate]
        good, bad = here, limit
        for step in range(_STEPS):
            tried = float(np.float32(bad if step == 0 else (good + bad) / 2))
            low, high = x.copy(), x.copy()
            low[0, coordinate], high[0, coordinate] = min(here, tried), max(here, tried)
            if keeps_decision(place, low, high, best)[0]:
                good = tried
                if step == 0:
                    break
            else:
                bad = tried
        ends.append(float(good))
    return ends[0], ends[1]


@dataclass(frozen=True)
class Edit:
    """A memorised input of which one activation differs: the interval in which it may."""

    place: int
    memorised: int
    coordinate: int
    interval: tuple[float, float]


def single_edits(
    place: Site, memory: Tensor, decisions: Sequence[int], values: Tensor
) -> list[Edit]:
    """Return, for values (inputs, width) that differ from a memorised row (rows, width) in one
    activation and lie inside its certified interval, the edit; nothing for all others.
    """
    found = []
    for index, row in enumerate(values):
        if not bool(torch.isfinite(row).all()):
            continue
        differs = row != memory
        for near in (differs.sum(1) == 1).nonzero()[:, 0].tolist():
            coordinate = int(differs[near].nonzero()[0, 0])
            low, high = certified_interval(place, memory[near], coordinate, decisions[near])
            if low <= float(row[coordinate]) <= high:
                found.append(Edit(index, near, coordinate, (low, high)))
                break
    return found


def redundant(
    place: Site, values: Tensor, unexplained: Bool[Tensor, "inputs width"], decisions: Sequence[int]
) -> Bool[Tensor, " inputs"]:
    """Return where no values of the unexplained activations, each anywhere in its range and all
    others as they are, can change the decision: they need no explanation there.
    """
    finite = torch.isfinite(values).all(1).numpy()
    x = values.detach().double().nan_to_num(0.0, 0.0, 0.0).numpy()
    free = unexplained.numpy()
    low = np.where(free, np.minimum(place.low, x), x)
    high = np.where(free, np.maximum(place.high, x), x)
    if not len(x):
        return torch.zeros(0, dtype=torch.bool)
    kept = keeps_decision(place, low, high, np.asarray(decisions))
    return torch.from_numpy(kept & finite)


@dataclass(frozen=True)
class PrunedWeights:
    """A network without the weights that provably do nothing.

    `inactive` counts weights that read or write an activation that is zero on the whole domain,
    `redundant` those whose removal, all together, moves no logit by more than `moved` there;
    `weights` counts all."""

    model: nn.Sequential
    weights: int
    inactive: int
    redundant: int
    moved: float


def prune_weights(
    model: nn.Sequential, domain: tuple[Tensor, Tensor], tolerance: float = 0.0
) -> PrunedWeights:
    """Return a copy of a network of linear layers and ReLUs without weights that provably do
    nothing on a box of inputs, or, with a `tolerance`, together move no logit by more than it.

    A weight w_ji moves logit k by at most |w_ji| max|a_i| times the sum of |weights| over the paths
    from j to k; both factors only shrink when other weights go, so the bounds add up. Raises
    InputError for other modules and a negative tolerance."""
    if not all(type(module) in (nn.Linear, nn.ReLU) for module in model):
        raise InputError("weights are pruned of sequences of Linear and ReLU only")
    if not 0 <= tolerance < float("inf"):
        raise InputError(f"tolerance must be a finite number of at least 0, got {tolerance}")
    found = copy.deepcopy(model).requires_grad_(False)
    places = [place for place, module in enumerate(found) if isinstance(module, nn.Linear)]
    layers = [module for module in found if isinstance(module, nn.Linear)]
    total = sum(layer.weight.numel() for layer in layers)
    zeros = _zeros(layers)
    for index, (place, following) in enumerate(itertools.pairwise(places)):
        if following == place + 1:
            continue  # no ReLU between them: nothing is ever inactive
        dead = site(model, place + 2, domain).inactive
        layers[index].weight[dead] = 0
        if layers[index].bias is not None:
            layers[index].bias[dead] = 0
        layers[index + 1].weight[:, dead] = 0
    inactive = _zeros(layers) - zeros
    costs = [cost.reshape(len(cost), -1) for cost in _costs(layers, domain)]
    flat = np.concatenate(costs, 1)  # (logits, weights)
    order = np.argsort(flat.max(0), kind="stable")
    gone = np.concatenate([(layer.weight == 0).numpy().ravel() for layer in layers])
    order = order[~gone[order]]
    sums = np.cumsum(flat[:, order], 1).max(0) * (1 + 2.0**-40)
    count = int((sums <= tolerance).sum())
    chosen = torch.zeros(flat.shape[1], dtype=torch.bool)
    chosen[torch.from_numpy(order[:count].copy())] = True
    for layer, part in zip(
        layers, chosen.split([layer.weight.numel() for layer in layers]), strict=True
    ):
        layer.weight[part.reshape(layer.weight.shape)] = 0
    moved = float(sums[count - 1]) if count else 0.0
    return PrunedWeights(found, total, inactive, count, moved)


def _zeros(layers: Sequence[nn.Linear]) -> int:
    return sum(int((layer.weight == 0).sum()) for layer in layers)


def _costs(layers: Sequence[nn.Linear], domain: tuple[Tensor, Tensor]) -> list[Array]:
    """Return how far the removal of each weight moves each logit at most, (logits, *weight) by
    layer, rounded up.
    """
    up = 1 + 2.0**-40  # far above the rounding of sums of positive float64 numbers
    weights = [layer.weight.double().abs().numpy() for layer in layers]
    biases = [0.0 if layer.bias is None else layer.bias.double().abs().numpy() for layer in layers]
    sizes = [torch.maximum(domain[0].abs(), domain[1].abs()).double().numpy()]
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        sizes.append((weight @ sizes[-1] + bias) * up)
    paths = [np.eye(len(weights[-1]))]
    for weight in reversed(weights[1:]):
        paths.insert(0, paths[0] @ weight * up)
    return [
        path[:, :, None] * weight * size * up
        for path, weight, size in zip(paths, weights, sizes, strict=True)
    ]
