"""What a network's weights look for, in pixels."""

from __future__ import annotations

import polars as pl
import torch

from assay.mechanisms.channels import ChannelMechanisms
from assay.mechanisms.channels.interaction import interaction_matrix
from assay.targets.data import Data


def draw_eigenvectors(
    mechanisms: ChannelMechanisms, data: Data, classes: int = 4
) -> pl.DataFrame | None:
    """Return, for the first classes, what the first block looks for in pixels: its strongest
    eigenvector towards the class's logit.
    """
    weights = mechanisms.weights
    if (
        data.image is None
        or len(data.image) != 2
        or weights.positions > 1
        or weights.gate is not None
    ):
        return None
    height, across = data.image
    frames = []
    for index, name in list(enumerate(data.names))[:classes]:
        form = interaction_matrix(weights, 0, weights.head[index])
        seen = (form.vectors[:, 0] @ weights.embed).reshape(height, across)
        place = torch.cartesian_prod(torch.arange(height), torch.arange(across))
        columns = {
            "row": place[:, 0].tolist(),
            "column": place[:, 1].tolist(),
            "value": seen.flatten().tolist(),
        }
        frames.append(
            pl.DataFrame(columns).with_columns(
                pl.lit(name).alias("class"), pl.lit(float(form.values[0])).alias("eigenvalue")
            )
        )
    return pl.concat(frames)
