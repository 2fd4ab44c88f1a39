"""Tables that studies of components share."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
from torch import Tensor

from assay.mechanisms.components.recovery import alive
from assay.mechanisms.components.scene import Scene


def spectrum(scene: Scene, probes: Mapping[str, Tensor]) -> pl.DataFrame:
    """Return the mean importance of every component on a scene's inputs, sorted within its site,
    and which components are alive by their importance (rows, components) on probes.
    """
    frames = []
    for name, importance in scene.importance.items():
        means = importance[scene.rows.kept(importance)].double().mean(0)
        order = means.argsort(descending=True)
        living = alive(probes[name])[order]
        frames.append(
            pl.DataFrame(
                {
                    "site": name,
                    "rank": range(1, len(order) + 1),
                    "component": order.tolist(),
                    "mean importance": means[order].tolist(),
                    "state": ["alive" if flag else "dead" for flag in living.tolist()],
                }
            )
        )
    return pl.concat(frames)
