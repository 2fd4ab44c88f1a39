"""The derivatives of features and errors in what their dictionaries read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from assay.core.sites import Seen
from assay.dictionaries import Dictionary

if TYPE_CHECKING:
    from assay.mechanisms.features.bound import FeatureParts


def slopes_in_read(
    bound: FeatureParts,
    name: str,
    index: Tensor,
    gradients: Mapping[str, Tensor],
    clean: Mapping[str, Seen],
    switches: str,
) -> Mapping[str, Tensor] | None:
    """Return the derivatives of <g, part> in the values that are read, (rows, examples, width) by
    site; see `Mechanisms.slope_in_read`.

        feature i: (g . W_dec[i]) h_i W_enc[:, i]        h_i the slope behind the linear encoder
        error: g - J_enc^T (W_dec g) - J_rest^T g        rest: J_rest^T g

    h is one where a feature is active, if a random pull-back agrees, else it is measured by
    forward-mode derivatives and compared with another one; a dictionary whose features are no
    function of one linear map each is pulled back through itself. None at values
    that are not (examples, positions, width)."""
    touched = bound.touched([name])
    if any(clean[site].value.ndim != 3 for site in touched):
        return None
    if name in bound.spots:
        return _of_features(bound, name, index, gradients, clean, switches)
    places = index[:, 0]
    if name in bound.errors.values():
        (site,) = bound.group(name).sites
        own = _cotangents(gradients[site], bound.bases[site].active, places)
        found = {site: own}
        for other, spot in bound.spots.items():
            if site in spot.writes:
                columns = spot.columns(site)
                dictionary = bound.dictionaries[other].dictionary
                read = bound.bases[spot.reads].active
                back = _pull_back(
                    lambda x: dictionary(x)[..., columns],
                    clean[spot.reads].value,
                    own * read[:, places].T.unsqueeze(-1),
                    places,
                )
                found[spot.reads] = found[spot.reads] - back if spot.reads in found else -back
        return found
    other = name.removesuffix(" rest")
    spot, dictionary = bound.spots[other], bound.dictionaries[other].dictionary
    read = bound.bases[spot.reads].active
    total: Tensor = torch.zeros(())
    for site in spot.writes:
        columns = spot.columns(site)
        total = total + _pull_back(
            lambda x: dictionary.rest(x).expand(*x.shape[:-1], -1)[..., columns],
            clean[spot.reads].value,
            _cotangents(gradients[site], read, places),
            places,
        )
    return {spot.reads: total}


def _of_features(
    bound: FeatureParts,
    name: str,
    index: Tensor,
    gradients: Mapping[str, Tensor],
    clean: Mapping[str, Seen],
    switches: str,
) -> Mapping[str, Tensor]:
    spot, dictionary = bound.spots[name], bound.dictionaries[name].dictionary
    base, value = bound.bases[spot.reads], clean[spot.reads].value.to(dictionary.W_dec.dtype)
    places, which = index[:, 0], index[:, 1]
    weight = torch.zeros(len(index), len(value), dtype=value.dtype, device=value.device)
    for site in spot.writes:
        atoms = dictionary.W_dec[which, spot.columns(site)].to(value.dtype)
        cotangents = _cotangents(gradients[site].to(value.dtype), base.active, places)
        weight += torch.einsum("rew,rw->re", cotangents, atoms)
    other = None if base.value is None else base.value.to(value.dtype).expand_as(value)
    scale, directions = _slopes(dictionary, value, places, which)
    if switches == "secant" and other is not None and name not in bound.means:
        scale = _secants(dictionary, value, other, places, which, scale, directions)
    return {spot.reads: (weight * scale).unsqueeze(-1) * directions}


def _slopes(
    dictionary: Dictionary, x: Tensor, places: Tensor, which: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the derivatives of features (rows) at their positions in x (examples, positions,
    width) as scale (rows, examples) times directions (rows, 1 or examples, width).
    """
    at_rows, column = places.unique(return_inverse=True)
    some = x[:, at_rows]
    encoder = getattr(dictionary, "W_enc", None)
    if isinstance(encoder, Tensor) and encoder.shape == (dictionary.d_in, dictionary.size):
        scale = _measured(dictionary, some, encoder, column, which)
        if scale is not None:
            return scale, encoder[:, which].T.unsqueeze(1)
    rows = []
    with torch.enable_grad():
        leaf = some.detach().clone().requires_grad_()
        codes = dictionary.encode(leaf)
        for place, feature in zip(column.tolist(), which.tolist(), strict=True):
            total = codes[:, place, feature].sum()
            rows.append(torch.autograd.grad(total, leaf, retain_graph=True)[0][:, place])
    return torch.ones((), dtype=x.dtype, device=x.device), torch.stack(rows)


def _measured(
    dictionary: Dictionary, x: Tensor, encoder: Tensor, column: Tensor, which: Tensor
) -> Tensor | None:
    """Return h (rows, examples) where the derivatives of features are h_k W_enc[:, k]; None where
    they are not, and where an operation has no forward derivative.

    One pull-back of random cotangents tells whether h is one where a feature is active."""
    generator = torch.Generator().manual_seed(0)

    def drawn(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(x)

    def near(*sides: Tensor) -> float:
        return 256 * torch.finfo(x.dtype).eps * sum(float(side.abs().amax()) for side in sides)

    def along() -> tuple[Tensor, Tensor]:
        tangent = drawn(x.shape)
        moved = torch.func.jvp(dictionary.encode, (x,), (tangent,))[1]
        straight = torch.einsum("erw,wr->re", tangent[:, column], encoder[:, which])
        return moved[:, column, which].T, straight

    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        codes = dictionary.encode(leaf)[:, column, which].T
    active = (codes.detach() != 0).to(x.dtype)
    cotangent = drawn(codes.shape)
    (found,) = torch.autograd.grad(codes, leaf, cotangent)
    each = torch.einsum("re,wr->erw", cotangent * active, encoder[:, which])
    expected = torch.zeros_like(found).index_add_(1, column, each)
    if bool(((found - expected).abs() <= near(found, expected)).all()):
        return active
    try:
        (moved, straight), (again, other), (last, third) = (along() for _ in range(3))
    except (NotImplementedError, RuntimeError):
        return None
    squares = (straight.square() + other.square()).clamp_min(torch.finfo(x.dtype).tiny)
    scale = (moved * straight + again * other) / squares
    return scale if bool(((last - scale * third).abs() <= near(last, third)).all()) else None


def _secants(
    dictionary: Dictionary,
    now: Tensor,
    other: Tensor,
    places: Tensor,
    which: Tensor,
    scale: Tensor,
    directions: Tensor,
) -> Tensor:
    """Return the scales with (f - f') / <x - x', direction> where a feature is active on one side
    only.
    """
    at_rows, column = places.unique(return_inverse=True)
    now, other = now[:, at_rows], other[:, at_rows]
    codes, before = (dictionary.encode(x)[:, column, which].T for x in (now, other))
    steps = torch.einsum(
        "rew,erw->re", directions.expand(-1, len(now), -1), (now - other)[:, column]
    )
    quotient = (codes - before) / torch.where(steps == 0, torch.ones_like(steps), steps)
    switched = ((codes == 0) != (before == 0)) & (steps != 0)
    return torch.where(switched, quotient, scale.expand_as(quotient))


def _cotangents(gradient: Tensor, active: Tensor, places: Tensor) -> Tensor:
    """Return the gradients at the rows' positions, (rows, examples, width), zero where a position
    takes no part.
    """
    chosen = gradient[:, places] * active[:, places].unsqueeze(-1)
    return chosen.transpose(0, 1)


def _pull_back(
    function: Callable[[Tensor], Tensor], value: Tensor, cotangents: Tensor, places: Tensor
) -> Tensor:
    """Return J^T c of a function of single positions, for cotangents (rows, examples, width)."""
    with torch.enable_grad():
        leaf = value[:, places].transpose(0, 1).detach().clone().requires_grad_()
        leaf = leaf.to(torch.promote_types(leaf.dtype, torch.float32)).detach().requires_grad_()
        out = function(leaf)
        if not out.requires_grad:
            return torch.zeros_like(leaf)
        return torch.autograd.grad(out, leaf, cotangents.to(out.dtype))[0]
