"""Where components start: at directions that recur in what the network reads, or in what its
outputs ask of it."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from assay.core.sites import Edit, Seen, run_edited
from assay.core.target import evaluating
from assay.errors import InputError
from assay.mechanisms.components.decomposition import Decomposition, plain_output, read_clean
from assay.mechanisms.components.sites import WeightSite

JITTER = 0.05
POOL = 2048
NEAR = 0.95
SAME = 0.9999


def start_at_data(
    model: nn.Module, found: Decomposition, inputs: Any, generator: torch.Generator
) -> None:
    """Set every component to what its matrix does with one direction that occurs in the data, in
    place.

    A site has two sides: the vectors x that it reads, and the pull-backs `g = J^T y` of the
    network's output y to what the site writes. Components start on the side whose second moments
    have the larger participation ratio `(tr S)^2 / tr S^2`, where mechanisms overlap less: at
    `V_c = x / |x|, U_c = V_c^T W`, or at `U_c = g / |g|, V_c = W U_c`. Directions that recur come
    first, each once; the others are drawn. A component is made smaller by the share of its length
    that is outside of its predecessors' span, so that no two share a mechanism, and a random
    twentieth is added. One factor then brings V U as near W as it can be; faithfulness warm-up
    does the rest. Random starts, by contrast, often end with one component for two mechanisms. The
    importance function is then fitted to the inner activations (`Importance.spread`).

    Raises InputError when a site reads nothing but zeros, or the output does not depend on it."""
    reads, asks = _sides(model, found, inputs)
    with torch.no_grad():
        for site, v, u in zip(found.sites, found.V, found.U, strict=True):
            matrix = site.matrix(model).detach().to(v)
            rows, pulls = reads[site.name].to(v), asks[site.name].to(v)
            if participation(rows) >= participation(pulls):
                first = choose_directions(rows, site.components, generator)
                second = first @ matrix
            else:
                second = choose_directions(pulls, site.components, generator)
                first = second @ matrix.T
            product = first.T @ second
            scale = ((matrix * product).sum() / product.square().sum()).clamp(min=0).sqrt()
            v.copy_(scale * first.T)
            u.copy_(scale * second)
    _spread(model, found, inputs, generator)


def start_at_singular(
    model: nn.Module, found: Decomposition, inputs: Any, generator: torch.Generator
) -> None:
    """Set the components to the largest singular parts of their matrices, in place, and fit the
    importance function to the inputs.

    Singular parts are orthogonal, so that none takes back what others write. Raises InputError for
    a site of more components than its matrix has singular parts."""
    copy_singular(model, found)
    _spread(model, found, inputs, generator)


@torch.no_grad()
def copy_singular(model: nn.Module, found: Decomposition) -> None:
    """Set V and U to the largest singular parts, `V = A sqrt(s)` and `U = sqrt(s) B` of
    `W = A s B`; InputError for a site of more components than there are.
    """
    for site, v, u in zip(found.sites, found.V, found.U, strict=True):
        rank = min(site.inputs, site.outputs)
        if site.components > rank:
            raise InputError(
                f"{site.name!r} has {site.components} components and its matrix {rank} singular"
                f" parts; give at most {rank}, or start at the data"
            )
        matrix = site.matrix(model).detach()
        wide = torch.promote_types(matrix.dtype, v.dtype)
        left, sizes, right = torch.linalg.svd(matrix.to(wide), full_matrices=False)
        roots = sizes[: site.components].sqrt()
        v.copy_(left[:, : site.components] * roots)
        u.copy_(roots.unsqueeze(1) * right[: site.components])


@torch.no_grad()
def _spread(
    model: nn.Module, found: Decomposition, inputs: Any, generator: torch.Generator
) -> None:
    if found.importance.reads_inner:
        reading = read_clean(model, inputs, found.sites)
        inner = {name: h.to(found.V[0]) for name, h in found.inner(reading).items()}
        shares = found.shares(inner) if found.importance.reads_shares else None
        found.importance.spread(inner, generator, shares)


def participation(rows: Float[Tensor, "rows width"]) -> float:
    """Return `(tr S)^2 / tr S^2` of the second moments S: how many directions the rows fill."""
    short = rows if len(rows) < rows.shape[1] else rows.T
    gram = (short @ short.T).double()
    return float(gram.trace().square() / gram.square().sum())


def choose_directions(
    rows: Float[Tensor, "rows width"], count: int, generator: torch.Generator
) -> Float[Tensor, "count width"]:
    """Return directions of rows: first those near which most other rows lie (squared cosine above
    `NEAR`), each the one of its neighbourhood that recurs most closely (above `SAME`) and with its
    neighbours taken out, then drawn ones. Their length is the square root of the part of a unit
    vector outside of its predecessors' span, with a random twentieth.
    """
    units = rows / rows.norm(dim=1, keepdim=True)
    squares = (units @ units.T).square()
    near, same = squares > NEAR, squares > SAME
    chosen: list[int] = []
    left = torch.ones(len(units), dtype=torch.bool)
    while len(chosen) < count and bool(left.any()):
        counts = (near & left).sum(1) * left
        best = int(counts.argmax())
        if int(counts[best]) < 2:
            break
        around = near[best] & left
        chosen.append(int(((same & around).sum(1) * around).argmax()))
        left &= ~around
    drawn = torch.randint(len(units), (count - len(chosen),), generator=generator)
    picked = units[torch.cat([torch.tensor(chosen, dtype=torch.long), drawn])]
    new = torch.zeros(count, dtype=units.dtype)
    diagonal = torch.linalg.qr(picked.T, mode="r").R.diagonal().abs()
    new[: len(diagonal)] = diagonal
    jitter = JITTER * torch.rand(count, generator=generator, dtype=units.dtype)
    return picked * (new + jitter).sqrt().unsqueeze(1)


def _sides(
    model: nn.Module, found: Decomposition, inputs: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    reads: dict[str, Tensor] = {}
    written: dict[str, Tensor] = {}

    def keep(site: WeightSite) -> Edit:
        def edit(seen: Seen) -> Tensor:
            reads[site.name] = seen.input
            written[site.name] = seen.written.detach().requires_grad_()
            # Sites behind this one see the same values, and every site its own gradient.
            return seen.written + (written[site.name] - written[site.name].detach())

        return edit

    with torch.enable_grad(), evaluating(model):
        output = plain_output(
            run_edited(model, inputs, {site.name: keep(site) for site in found.sites})
        )
        pulls = torch.autograd.grad(
            (output * output.detach()).sum(), list(written.values()), allow_unused=True
        )
    asks = dict(zip(written, pulls, strict=True))
    for site in found.sites:
        if site.name not in reads:
            raise InputError(f"site {site.name!r} was not reached in the forward pass")
        if site.lookup:
            seen = torch.unique(reads[site.name])
            reads[site.name] = nn.functional.one_hot(seen[:POOL], site.inputs).float()
        else:
            reads[site.name] = _pool(reads[site.name].detach())
        pull = asks[site.name]
        asks[site.name] = _pool(torch.zeros(1, 1) if pull is None else pull)
        if not len(reads[site.name]):
            raise InputError(f"{site.name!r} reads nothing but zeros on the inputs given")
        if not len(asks[site.name]):
            raise InputError(f"the output does not depend on what {site.name!r} writes")
    return reads, asks


def _pool(rows: Tensor) -> Tensor:
    flat = rows.flatten(0, -2)
    flat = flat[flat.abs().amax(1) > 0]
    return flat[:: max(1, -(-len(flat) // POOL))]
