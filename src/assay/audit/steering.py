"""Steering: gates at any value, what they do to the metric beside what derivatives predict, and
what the model then says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from assay.audit.agreement import agreement
from assay.audit.bars import conformal_quantile
from assay.audit.population import distinct
from assay.audit.setting import Place, Setting, setting_of
from assay.audit.strata import least_sample
from assay.core.mechanisms import Mechanisms, differentiable
from assay.core.sites import Edit
from assay.core.target import Batch
from assay.errors import InputError
from assay.targets.continuation import continue_tokens


@dataclass(frozen=True)
class Activity:
    """The share of examples and positions at which features are active, and their mean activation
    there.
    """

    share: float
    mean: float


@dataclass(frozen=True)
class Steered:
    """The metric of every example with all gates at one and with some at other values, and the
    change that derivatives predict, in float64; `active` says how active the features that are
    steered are without it.

    `first` is sum_k (g_k - 1) dF/dg_k, or sum_k (v_k - f_k) dF/df_k for features that are set `to`
    activations v, `second` half the curvature along the same line; `predicted` is their sum. `bar`
    is the half-width around a prediction: the `inputs` distinct examples are split in two, and the
    residuals |measured - predicted| of one half give the other half its bars, infinite where there
    are too few (arXiv 1604.04173). Copies of an example are one observation."""

    mechanisms: Mechanisms
    gates: Mapping[Place, float]
    to: Mapping[Place, float]
    active: Mapping[Place, Activity]
    before: Float[Tensor, " examples"]
    after: Float[Tensor, " examples"]
    first: Float[Tensor, " examples"]
    second: Float[Tensor, " examples"]
    bar: Float[Tensor, " examples"]
    alpha: float
    inputs: int

    @property
    def measured(self) -> Tensor:
        return self.after - self.before

    @property
    def predicted(self) -> Tensor:
        return self.first + self.second

    def table(self) -> pl.DataFrame:
        """Return one row an example: before, after, measured, first_order, second_order, bar,
        inside.
        """
        error = (self.measured - self.predicted).abs()
        finite = self.bar.isfinite()
        return pl.DataFrame(
            {
                "example": range(len(self.before)),
                "before": self.before.tolist(),
                "after": self.after.tolist(),
                "measured": self.measured.tolist(),
                "first_order": self.first.tolist(),
                "second_order": self.predicted.tolist(),
                "bar": [
                    value if known else None
                    for value, known in zip(self.bar.tolist(), finite.tolist(), strict=True)
                ],
                "inside": [
                    bool(within) if known else None
                    for within, known in zip(error <= self.bar, finite.tolist(), strict=True)
                ],
            },
            schema_overrides={"bar": pl.Float64, "inside": pl.Boolean},
        )

    to_polars = table

    def summary(self) -> dict[str, Any]:
        """Return means and how far predictions agree with what was measured, as plain values."""
        measured = self.measured.numpy(force=True)
        found = agreement(self.predicted.numpy(force=True), measured)
        known = self.bar.isfinite()
        inside = ((self.measured - self.predicted).abs() <= self.bar)[known]
        return {
            **{
                key: {_name(self.mechanisms, place): value for place, value in given.items()}
                for key, given in (("gates", self.gates), ("set_to", self.to))
                if given
            },
            "activity": {
                _name(self.mechanisms, place): {"share": one.share, "mean": one.mean}
                for place, one in self.active.items()
            },
            "metric_before": float(self.before.mean()),
            "metric_after": float(self.after.mean()),
            "change_measured": float(self.measured.mean()),
            "change_first_order": float(self.first.mean()),
            "change_second_order": float(self.predicted.mean()),
            "pearson": found.pearson if math.isfinite(found.pearson) else None,
            "slope": found.slope if math.isfinite(found.slope) else None,
            "bar": float(self.bar[known].mean()) if known.any() else None,
            "bars_that_hold": f"{int(inside.sum())} of {int(known.sum())}",
            "promise": self.promise(),
        }

    def promise(self) -> str:
        least = least_sample(self.alpha)
        if self.inputs // 2 < least:
            return (
                f"no bar: {1 - self.alpha:.0%} needs at least {2 * least} distinct examples, and"
                f" there are {self.inputs}"
            )
        return (
            f"on average over new inputs drawn like these {self.inputs}, at least"
            f" {1 - self.alpha:.0%} of the bars around second_order contain the measured change"
        )


def steer(
    mechanisms: Mechanisms,
    gates: Mapping[Place, float] | None = None,
    *,
    to: Mapping[Place, float] | None = None,
    alpha: float = 0.1,
    seed: int = 0,
) -> Steered:
    """Set some gates to other values, in [0, 1] or not, and features to activations; measure the
    change of the metric beside its prediction to first and to second order.

    A gate g writes `g part` where `part` stood: 0 removes a part, 2 doubles it, -1 turns it around.
    A feature of activation f that is set `to` v adds `(v - f) W_dec`, also where it is not active.
    Both map (group, index) to values; a None in an index stands for every entry of that axis.
    Raises InputError for parts that are not there, values that are not finite, parts without an
    activation, gates of features that are active nowhere, settings under which the metric or its
    derivatives are not finite, and models without forward-mode
    derivatives."""
    if not 0 < alpha < 1:
        raise InputError(f"alpha must lie between 0 and 1, got {alpha}")
    gates, to = gates or {}, to or {}
    setting = setting_of(mechanisms, gates, to)
    active = _activity(setting, gates, to)
    record = mechanisms.record()

    def along(step: Tensor) -> Tensor:
        return setting.values(record, step)

    with torch.no_grad():
        before = mechanisms.values(record=record).double()
        after = setting.values(record).double()
    (some,) = mechanisms.full(1.0, [next(iter(mechanisms.groups))], broadcast=True).values()
    zero, one = some.new_zeros(()), some.new_ones(())

    def slope(step: Tensor) -> Tensor:
        return torch.func.jvp(along, (step,), (one,))[1]

    def both() -> Tensor:
        return torch.stack(torch.func.jvp(slope, (zero,), (one,)))

    first, curvature = differentiable(both).detach().double()
    second = curvature / 2
    if not bool(torch.stack([after, first, second]).isfinite().all()):
        raise InputError(
            "the metric or its derivatives are NaN or infinite under this setting; give gates and"
            " values nearer to what the parts are"
        )
    residual = (after - before - first - second).abs()
    unit = distinct(mechanisms.batch)
    bar = torch.from_numpy(_bars(residual.numpy(force=True), unit, alpha, seed)).to(residual)
    return Steered(
        mechanisms,
        dict(gates),
        dict(to),
        active,
        before,
        after,
        first,
        second,
        bar,
        alpha,
        int(unit.max(initial=-1)) + 1,
    )


def _bars(residual: np.ndarray, unit: np.ndarray, alpha: float, seed: int) -> np.ndarray:
    """Return a bar for every example, from the distinct inputs of the half that it is not in;
    infinite where either half has too few.
    """
    first = np.unique(unit, return_index=True)[1]
    order = np.random.default_rng(seed).permutation(len(first))
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    bar = np.full(len(residual), math.inf)
    if len(halves[0]) >= least_sample(alpha):
        for own, other in (halves, halves[::-1]):
            bar[np.isin(unit, own)] = conformal_quantile(residual[first[other]], alpha)
    return bar


def _activity(
    setting: Setting, gates: Mapping[Place, float], to: Mapping[Place, float]
) -> dict[Place, Activity]:
    """Return how active the features at some places are without steering.

    Raises InputError where all that is asked for are gates of parts that are zero everywhere."""
    mechanisms = setting.mechanisms
    places = [place for place in {**gates, **to} if place[0] in mechanisms.feature_groups]
    named: dict[str, dict[int, None]] = {}
    for name, index in places:
        every = range(mechanisms.group(name).axes[-1])
        named.setdefault(name, {}).update(
            dict.fromkeys(every if index[-1] is None else [index[-1]])
        )
    device = mechanisms.target.device
    which = {name: torch.tensor(list(some), device=device) for name, some in named.items()}
    read = setting.found(which) if which else {}
    found, still = {}, []
    for place in places:
        name, index = place
        column = None if index[-1] is None else list(named[name]).index(index[-1])
        at = tuple(slice(None) if entry is None else entry for entry in (None, *index[:-1], column))
        now, norms = (values[at].flatten() for values in read[name])
        if place in gates and not bool((norms != 0).any()):
            still.append(place)
        alive = now != 0
        mean = float(now[alive].double().mean()) if bool(alive.any()) else 0.0
        found[place] = Activity(float(alive.double().mean()), mean)
    if still and not to and len(still) == len(gates):
        raise InputError(
            f"{_name(mechanisms, still[0])} is not active in any of the {len(mechanisms.batch)}"
            " examples, so that a multiple of it changes nothing; set it to a value instead (`to`,"
            " --set)"
        )
    return found


@dataclass(frozen=True)
class Continuation:
    """What a model says after a prompt, without steering and with it."""

    prompt: str
    without: str
    steered: str


def continue_steered(
    mechanisms: Mechanisms,
    gates: Mapping[Place, float] | None = None,
    tokenizer: Any = None,
    *,
    to: Mapping[Place, float] | None = None,
    examples: Sequence[int] = (0,),
    count: int = 20,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Continuation]:
    """Continue the prompts of some examples by `count` tokens, without the gates and with them, and
    with features set `to` activations as in `steer`.

    The likeliest token is taken, or with a `temperature` one is drawn, by the same random numbers
    on both sides. Places with None for the position take in new tokens, others are there alone; at
    new tokens gates of kinds with another reference than zero bring in nothing. Without a tokenizer
    tokens stand by their numbers. Raises InputError for networks that do not take token ids, and
    for kinds that cannot follow a text as it grows."""
    setting_of(mechanisms, gates or {}, to or {})
    inputs = mechanisms.batch.inputs
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if not isinstance(ids, Tensor):
        raise InputError("only language models are continued: the batch has no input_ids")
    mask = inputs.get("attention_mask")
    found = []
    for example in examples:
        if not 0 <= example < len(ids):
            raise InputError(f"there is no example {example}; there are {len(ids)}")
        length = ids.shape[1] if mask is None else int(mask[example].sum())
        prompt = ids[example, :length].tolist()
        own = mechanisms.take(slice(example, example + 1))

        def edits(batch: Batch, own: Mechanisms = own) -> Mapping[str, Edit]:
            return setting_of(own.follow(batch), gates or {}, to or {}, shorter=True).edits()

        sides = [
            continue_tokens(
                mechanisms.target.model,
                prompt,
                count,
                edits=change,
                temperature=temperature,
                generator=torch.Generator().manual_seed(seed),
                device=mechanisms.target.device,
            )
            for change in (None, edits)
        ]
        found.append(Continuation(*(_text(tokenizer, tokens) for tokens in (prompt, *sides))))
    return found


def _text(tokenizer: Any, tokens: list[int]) -> str:
    return str(tokens) if tokenizer is None else str(tokenizer.decode(tokens))


def _name(mechanisms: Mechanisms, place: Place) -> str:
    group, index = place
    if None in index:
        return f"{group}[{', '.join('*' if entry is None else str(entry) for entry in index)}]"
    return mechanisms.describe(group, tuple(entry for entry in index if entry is not None))
