"""What drives attribution patching: the size of a part, the gradient there, and the angle between
them.

Sheet: features, "The error-node study"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import polars as pl
import torch
from torch import Tensor

from assay.attribution.gradient import site_gradients
from assay.attribution.scores import Scores
from assay.core.mechanisms import Mechanisms
from assay.core.parts import Parts
from assay.errors import InputError

FACTORS = ("norm", "gradient_norm", "cosine")


def measure_drivers(
    mechanisms: Mechanisms,
    names: Iterable[str] | None = None,
    only: Mapping[str, pl.DataFrame] | None = None,
) -> pl.DataFrame:
    """Return one row for every part that is not zero, in every example: example, group, position,
    index, norm, gradient_norm, atp, cosine.

    For a part p at a value with gradient g: norm = ||p||, gradient_norm = ||g|| at its position,
    atp = -<g, p>, the first-order indirect effect of putting the reference there (the difference
    that a patch makes is -p), and atp = norm * gradient_norm * cosine. One forward and backward
    pass for everything. `only` gives the rows (example, index) of a group that are wanted.

    Raises InputError for groups whose parts are not vectors of a whole position (heads, say), or
    that act at several sites."""
    chosen = list(mechanisms.groups if names is None else names)
    for name in chosen:
        if len(mechanisms.group(name).sites) > 1:
            raise InputError(f"the parts of {name!r} act at several sites and have no one gradient")
    frames = []
    _, turns = site_gradients(mechanisms, names=chosen)
    with torch.no_grad():
        for site, seen, gradient in turns:
            for name, parts in mechanisms.parts(site, seen).items():
                if name in chosen:
                    _require_whole(name, parts, seen.value)
                    given = torch.zeros_like(seen.value) if gradient is None else gradient
                    norms = parts.norm()
                    if only is not None and name in only:
                        index = _places(only[name], norms.ndim)
                    elif norms.is_sparse:
                        index = norms.coalesce().indices().T
                    else:
                        index = norms.nonzero()
                    frames.append(_rows(name, index, norms, parts.dot(given), given))
    return pl.concat(frames)


def _require_whole(name: str, parts: Parts, value: Tensor) -> None:
    """Raise InputError unless every part is a vector of a whole position."""
    own = parts.shape[:-1] if hasattr(parts, "atoms") else parts.shape
    if tuple(own) != tuple(value.shape[:-1]):
        raise InputError(
            f"the parts of {name!r} have gates {tuple(parts.shape)} at a value of shape"
            f" {tuple(value.shape)}; norms of gradients are those of whole positions"
        )


def _rows(
    name: str, index: Tensor, norms: Tensor, products: Tensor, gradient: Tensor
) -> pl.DataFrame:
    places = gradient.shape[:-1]
    size = _entries(norms, index)
    slope = gradient.double().norm(dim=-1)[tuple(index[:, : len(places)].T)]
    atp = -_entries(products, index)
    product = size * slope
    cosine = torch.where(product > 0, atp / product.clamp_min(torch.finfo(product.dtype).tiny), 0)
    return pl.DataFrame(
        {
            "example": index[:, 0].tolist(),
            "group": [name] * len(index),
            "position": index[:, 1].tolist() if index.shape[1] > 1 else [0] * len(index),
            "index": index[:, 1:].tolist(),
            "norm": size.tolist(),
            "gradient_norm": slope.tolist(),
            "atp": atp.tolist(),
            "cosine": cosine.clamp(-1, 1).tolist(),
        },
        schema={
            "example": pl.Int64,
            "group": pl.String,
            "position": pl.Int64,
            "index": pl.List(pl.Int64),
            "norm": pl.Float64,
            "gradient_norm": pl.Float64,
            "atp": pl.Float64,
            "cosine": pl.Float64,
        },
    )


def _places(rows: pl.DataFrame, axes: int) -> Tensor:
    """Return the index (rows, axes) of rows with an example and the index of a part."""
    inner = torch.tensor(rows["index"].to_list(), dtype=torch.long).reshape(len(rows), axes - 1)
    example = torch.tensor(rows["example"].to_list(), dtype=torch.long)
    return torch.cat([example[:, None], inner], dim=1)


def _entries(values: Tensor, index: Tensor) -> Tensor:
    """Return the entries of values (examples, *axes) at rows (rows, 1 + axes), in float64."""
    if not values.is_sparse:
        return values[tuple(index.T)].double()
    flat = values.coalesce()
    keys = _keys(flat.indices().T, values.shape)
    wanted = _keys(index, values.shape)
    place = torch.searchsorted(keys, wanted).clamp_max(max(len(keys) - 1, 0))
    found = flat.values()[place].double()
    return torch.where(keys[place] == wanted, found, 0)


def _keys(index: Tensor, shape: Sequence[int]) -> Tensor:
    key = torch.zeros(len(index), dtype=torch.long, device=index.device)
    for axis, size in enumerate(shape):
        key = key * size + index[:, axis]
    return key


def with_effects(table: pl.DataFrame, scores: Scores, column: str) -> pl.DataFrame:
    """Return the table with the indirect effects by some scores, -score, as a further column."""
    parts = []
    for (group,), rows in table.group_by(["group"], maintain_order=True):
        values = scores.values[str(group)].cpu()
        found = -_entries(values, _places(rows, values.ndim))
        parts.append(rows.with_columns(pl.Series(column, found.tolist(), dtype=pl.Float64)))
    return pl.concat(parts)


def by_node(table: pl.DataFrame) -> pl.DataFrame:
    """Return one row for every node, over its examples: means of the norms and of atp, and two
    cosines.

    `cosine` is the mean over examples of the cosine; `cosine_of_means` = mean atp / (mean norm *
    mean gradient norm), as earlier work took it, weighs examples by their sizes."""
    others = [name for name in table.columns if name in ("kind", "layer", "part")]
    wanted = (*FACTORS, "atp", "exact", "node_path", "site_path")
    means = [name for name in wanted if name in table.columns]
    return (
        table.group_by("group", "index", maintain_order=True)
        .agg(
            pl.col("position").first(),
            *(pl.col(name).first() for name in others),
            *(pl.col(name).mean() for name in means),
            pl.col("atp").abs().mean().alias("size"),
            pl.len().alias("n"),
        )
        .with_columns(
            (pl.col("atp") / (pl.col("norm") * pl.col("gradient_norm"))).alias("cosine_of_means")
        )
    )
