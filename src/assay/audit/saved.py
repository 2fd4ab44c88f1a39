"""Calibrated bars as plain JSON, so that a later command can put them on new inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from assay.audit.audit import Audit
from assay.audit.bars import LISTS, Bars, Tail
from assay.audit.scale import Scale
from assay.audit.selections import TOP_BY_SCORE, Selections
from assay.errors import InputError, shown


def bars_to_json(audit: Audit) -> dict[str, Any]:
    """Return what is needed to put the bars of an audit on other inputs, as plain JSON."""
    bars, kept = audit.bars, audit.selections
    return {
        "method": audit.scores.method,
        "unsigned": audit.scores.unsigned,
        "exact": audit.options.exact,
        "axes": {
            name: list(group.axes[1:]) for name, group in audit.parts.mechanisms.groups.items()
        },
        "alpha": bars.alpha,
        "caps": dict(bars.caps),
        "distinct": bars.distinct,
        "tuned": bars.tuned,
        "shared": bars.shared,
        "scale": {
            "name": bars.scale.name,
            "floor": bars.scale.floor,
            "factors": {
                name: {"places": places.tolist(), "factors": factors.tolist()}
                for name, (places, factors) in bars.scale.factors.items()
            },
        },
        "selections": {
            "count": kept.count,
            "listed": [list(entry) for entry in kept.listed],
            "level": _number(kept.level),
            "levels": dict(kept.levels),
            "merged": kept.merged,
        },
        "tails": {name: _tail(entry) for name, entry in bars.tails.items()},
        "together": {name: _tail(entry) for name, entry in bars.together.items()},
    }


def bars_from_json(saved: Mapping[str, Any]) -> Bars:
    """Return the bars that `bars_to_json` wrote; InputError when something is missing, of another
    type, or a number that no calibration gives.
    """
    try:
        scale, kept = saved["scale"], saved["selections"]
        bars = Bars(
            float(saved["alpha"]),
            Scale(
                str(scale["name"]),
                float(scale["floor"]),
                {
                    name: (
                        np.array(entry["places"], dtype=np.int64),
                        np.array(entry["factors"], dtype=float),
                    )
                    for name, entry in scale["factors"].items()
                },
            ),
            Selections(
                int(kept["count"]),
                tuple((str(group), int(place)) for group, place in kept["listed"]),
                _from_number(kept["level"]),
                {name: float(level) for name, level in kept["levels"].items()},
                _truth(kept["merged"]),
            ),
            {name: _from_tail(entry) for name, entry in saved["tails"].items()},
            {name: _from_tail(entry) for name, entry in saved["together"].items()},
            {name: int(cap) for name, cap in saved["caps"].items()},
            int(saved["distinct"]),
            int(saved["tuned"]),
            _truth(saved["shared"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(
            f"the saved bars cannot be read ({error!r}); were they made by another version? Run the"
            " study again"
        ) from error
    if wrong := [what for what, right in _conditions(bars) if not right]:
        raise InputError(f"the saved bars are of no calibration, where {'; '.join(wrong)}")
    return bars


def _conditions(bars: Bars) -> Iterator[tuple[str, bool]]:
    """Yield what every calibration gives, and whether the bars have it; NaN has nothing."""
    kept, scale = bars.selections, bars.scale
    yield "alpha lies between 0 and 1", 0 < bars.alpha < 1
    yield "at least one input calibrated", bars.distinct >= 1
    yield "counts are not negative", min(bars.tuned, kept.count, *bars.caps.values(), 0) >= 0
    yield (
        "every level is at least 0",
        all(entry >= 0 for entry in (kept.level, *kept.levels.values())),
    )
    yield (
        "a cap is kept for the largest by score",
        TOP_BY_SCORE not in bars.tails or TOP_BY_SCORE in bars.caps,
    )
    lists = {*LISTS} & bars.tails.keys()
    yield "bars that hold at once are of lists that have bars", bars.together.keys() <= lists
    yield "the floor is finite and at least 0", 0 <= scale.floor < math.inf
    for name, (places, factors) in scale.factors.items():
        yield (
            f"places of {name!r} ascend, with one positive finite factor each",
            places.shape == factors.shape
            and places.ndim == 1
            and bool((np.diff(places) > 0).all())
            and bool(((factors > 0) & (factors < math.inf)).all()),
        )
    for name, tail in (*bars.tails.items(), *bars.together.items()):
        yield (
            f"residuals of {name!r} descend to at least 0, with ascending weights above them",
            tail.residuals.shape == tail.above.shape
            and tail.residuals.ndim == 1
            and bool((tail.residuals >= 0).all())
            and bool((tail.residuals[1:] <= tail.residuals[:-1]).all())
            and bool((tail.above >= 0).all())
            and bool((np.diff(tail.above) >= 0).all()),
        )
        yield (
            f"weight and inputs of {name!r} are finite and at least 0",
            0 <= tail.weight < math.inf and tail.inputs >= 0,
        )


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"true or false expected, got {shown(value)}")
    return value


def _tail(tail: Tail) -> dict[str, Any]:
    return {
        "residuals": [_number(entry) for entry in tail.residuals.tolist()],
        "above": tail.above.tolist(),
        "weight": tail.weight,
        "inputs": tail.inputs,
    }


def _from_tail(saved: Mapping[str, Any]) -> Tail:
    return Tail(
        np.array([_from_number(entry) for entry in saved["residuals"]], dtype=float),
        np.array(saved["above"], dtype=float),
        float(saved["weight"]),
        int(saved["inputs"]),
    )


def _number(value: float) -> float | str:
    # Standard JSON has no infinity.
    return "infinite" if math.isinf(value) else value


def _from_number(value: float | str) -> float:
    return math.inf if value == "infinite" else float(value)
