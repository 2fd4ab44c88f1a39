"""How much of a language model's residual states a crosscoder rebuilds, and what the model computes
from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from assay.core.sites import Edit, Seen, run_edited
from assay.dictionaries.splicing import predicted
from assay.errors import InputError
from assay.learn.reading import Reader, Rows, chunks
from assay.mechanisms.crosscoder.coder import Crosscoder

Replacement = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class LayerEvaluation:
    """One layer: the fraction of variance unexplained, and the loss (nats per token) with its
    states rebuilt, and with their mean; `recovered` is (mean - rebuilt) / (mean - clean).
    """

    site: str
    unexplained: float
    loss_mean: float
    loss_rebuilt: float
    recovered: float


@dataclass(frozen=True)
class CrosscoderEvaluation:
    """A crosscoder on `positions` positions; `l0` is the mean number of active features, `dead` the
    share of features that are active nowhere, `loss` that of the model as it is.
    """

    layers: tuple[LayerEvaluation, ...]
    positions: int
    l0: float
    dead: float
    loss: float

    def to_polars(self) -> pl.DataFrame:
        """Return one row per layer."""
        return pl.DataFrame([vars(layer) for layer in self.layers])


@torch.no_grad()
def evaluate(model: nn.Module, found: Crosscoder, rows: Rows) -> CrosscoderEvaluation:
    """Measure a crosscoder on windows; codes are read from the clean run, one layer is replaced at
    a time, at the positions that are read.

    Raises InputError for sites that the model does not have, and states of another width."""
    reader = Reader(model, found.sites)
    found.eval()
    sums = _Sums(found)
    for index in chunks(rows):
        states = stack_states(reader(rows.take(index)), found)
        codes = found.encode(states)
        sums.add(states, found.decode(codes), codes)
    means = sums.total / sums.count

    def loss(layer: int | None = None, what: str = "clean") -> float:
        total, tokens = 0.0, 0
        for index in chunks(rows):
            some = rows.take(index)
            edits = {}
            if layer is not None:
                new = means[layer]
                if what == "rebuilt":
                    new = found(stack_states(reader(some), found))[:, layer]
                edits = {reader.refs[found.sites[layer]].site: _put(some, new)}
            output = run_edited(model, some.inputs(reader.device), edits).logits
            nats, count = _cross_entropy(output, some)
            total, tokens = total + nats, tokens + count
        return total / tokens

    clean = loss()
    layers = []
    for layer, site in enumerate(found.sites):
        mean, rebuilt = loss(layer, "mean"), loss(layer, "rebuilt")
        recovered = (mean - rebuilt) / (mean - clean) if mean != clean else float("nan")
        layers.append(LayerEvaluation(site, sums.unexplained(layer), mean, rebuilt, recovered))
    dead = float((~sums.fired).float().mean())
    return CrosscoderEvaluation(tuple(layers), sums.count, sums.active / sums.count, dead, clean)


def stack_states(values: dict[str, Tensor], found: Crosscoder) -> Tensor:
    """Return what a reader saw at the sites as (positions, layers, width).

    Raises InputError for a width that is not the crosscoder's."""
    for site in found.sites:
        if values[site].shape[1] != found.width:
            raise InputError(
                f"the states at {site!r} have width {values[site].shape[1]}, the crosscoder reads"
                f" width {found.width}"
            )
    return torch.stack([values[site] for site in found.sites], 1)


class _Sums:
    def __init__(self, found: Crosscoder) -> None:
        shape = (len(found.sites), found.width)
        self.total, self.squares, self.errors = (
            torch.zeros(shape, dtype=torch.float64) for _ in range(3)
        )
        self.fired = torch.zeros(found.size, dtype=torch.bool)
        self.count, self.active = 0, 0.0

    def add(self, states: Tensor, rebuilt: Tensor, codes: Tensor) -> None:
        wide = states.double().cpu()
        self.total += wide.sum(0)
        self.squares += wide.square().sum(0)
        self.errors += (wide - rebuilt.double().cpu()).square().sum(0)
        self.fired |= (codes > 0).any(0).cpu()
        self.active += float((codes > 0).sum())
        self.count += len(states)

    def unexplained(self, layer: int) -> float:
        spread = self.squares[layer] - self.total[layer].square() / self.count
        return float(self.errors[layer].sum() / spread.sum())


def _put(rows: Rows, new: Tensor) -> Edit:
    def edit(seen: Seen) -> Tensor:
        value = seen.value.clone()
        value[rows.kept.to(value.device)] = new.to(value)
        return value

    return edit


def _cross_entropy(logits: Tensor, rows: Rows) -> tuple[float, int]:
    """Return the summed loss of the next tokens, and how many they are."""
    ids, follows = rows.ids.to(logits.device), predicted(rows).to(logits.device)
    nats = cross_entropy(logits[:, :-1][follows].double(), ids[:, 1:][follows], reduction="sum")
    return float(nats), int(follows.sum())


def first_layer_counts(found: Crosscoder, share: float) -> Sequence[int]:
    """Return how many features begin at every layer: where the decoder's norm first reaches
    `share` of its largest.
    """
    counts: list[int] = found.first_layers(share).bincount(minlength=len(found.sites)).tolist()
    return counts
