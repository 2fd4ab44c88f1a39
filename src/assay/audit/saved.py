"""Calibrated bars as plain JSON, so that a later command can put them on new inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from assay.audit.audit import Audit
from assay.audit.bars import Bars, Tail
from assay.audit.scale import Scale
from assay.audit.selections import Selections
from assay.errors import InputError


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
    """Return the bars that `bars_to_json` wrote; InputError when something is missing."""
    try:
        scale, kept = saved["scale"], saved["selections"]
        return Bars(
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
                bool(kept["merged"]),
            ),
            {name: _from_tail(entry) for name, entry in saved["tails"].items()},
            {name: _from_tail(entry) for name, entry in saved["together"].items()},
            {name: int(cap) for name, cap in saved["caps"].items()},
            int(saved["distinct"]),
            int(saved["tuned"]),
            bool(saved["shared"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"the saved bars cannot be read: {error!r}") from error


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
