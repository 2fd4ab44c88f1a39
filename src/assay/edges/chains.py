"""Attention on the way of an edge, in three pieces of which only the middle one mixes positions.

A derivative at one position goes back through the output projection, which keeps it there, and then
through the attention pattern, which has no weights. The parts upstream come forward through norm
and projections, at their own positions, and the two meet at queries, keys and values: no part is
pulled back through the large matrices at every position."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from assay.edges.pulling import pull_back
from assay.targets import families, names

Rows = Callable[[Tensor, Mapping[str, Tensor], Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Stations:
    """Where an attention layer can be cut: the site of its heads' values, and those of its query,
    key and value projections.
    """

    z: str
    heads: tuple[str, ...]


def stations(model: nn.Module) -> list[Stations]:
    """Return the stations of every layer, none for a family whose heads are not known."""
    family = families.find_family(model)
    if family is None:
        return []
    depth = len(model.get_submodule(family.blocks))  # type: ignore[arg-type]
    found = []
    for layer in range(depth):
        z, *heads = (
            names.resolve(model, f"blocks.{layer}.attn.hook_{letter}").site for letter in "zqkv"
        )
        found.append(Stations(z, tuple(dict.fromkeys(heads))))
    return found


@dataclass(frozen=True)
class Chain:
    """A verified way from a read site to leaves by the stations of one layer: tensors of the graph
    by their sites; `z` is None where the heads' values are what is read.
    """

    z: Tensor | None
    heads: Mapping[str, Tensor]
    leaves: tuple[str, ...]


def find_chain(
    value: Tensor,
    kept: Mapping[str, Tensor],
    layers: Sequence[Stations],
    leaves: Mapping[str, Tensor],
) -> Chain | None:
    """Return the chain through which all of a read value's dependence on some leaves goes, None
    where no layer's stations carry all of it.
    """
    generator = torch.Generator().manual_seed(1)

    def random(like: Tensor) -> tuple[Tensor, Tensor]:
        drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
        last = torch.zeros_like(drawn)
        last[:, -1] = drawn[:, -1]
        return drawn, last

    for layer in layers:
        inner = [kept.get(site) for site in (layer.z, *layer.heads)]
        if any(tensor is None or not tensor.requires_grad for tensor in inner):
            continue
        z = kept[layer.z]
        heads = {site: kept[site] for site in layer.heads}
        direct = z is value
        cotangent, last = random(value)
        if not direct:
            at_z = pull_back(value, {layer.z: z}, cotangent)[layer.z]
            alone = pull_back(value, {layer.z: z}, last)[layer.z]
            if at_z is None or alone is None or alone[:, :-1].any() or not at_z.any():
                continue
        else:
            at_z = cotangent
        at_heads = pull_back(z, heads, at_z)
        if any(found is None for found in at_heads.values()):
            continue
        total: dict[str, Tensor] = {}
        local = True
        for name, head in heads.items():
            _, last = random(head)
            whole = pull_back(head, leaves, at_heads[name])
            single = pull_back(head, leaves, last)
            for site in leaves:
                back, alone = whole[site], single[site]
                if back is not None and alone is not None:
                    local = local and not alone[:, :-1].any()
                    total[site] = total[site] + back if site in total else back
        expected = pull_back(value, leaves, cotangent)
        if local and set(total) == set(leaves) and _agree(total, expected):
            return Chain(None if direct else z, heads, tuple(leaves))
    return None


def push_forward(out: Tensor, leaf: Tensor, tangents: Tensor, positions: Tensor) -> Tensor:
    """Return J v at the positions of tangents (examples, parts, width), for a value that depends
    on a leaf position by position: (examples, parts, width out).

    A second derivative of a linear function, <u, J v> in u, is J v."""
    line = rank_within(positions).to(positions.device)
    given = tangents.new_zeros(int(line.max()) + 1, *leaf.shape)
    given[line, :, positions] = tangents.transpose(0, 1)
    dummy = torch.zeros_like(out).requires_grad_()
    (back,) = torch.autograd.grad(out, leaf, dummy, create_graph=True, retain_graph=True)
    (moved,) = torch.autograd.grad(
        back, dummy, given.to(back.dtype), retain_graph=True, is_grads_batched=True
    )
    return moved[line, :, positions].transpose(0, 1)


def rank_within(positions: Tensor) -> Tensor:
    """Return how many earlier entries have the same value, for every entry."""
    seen: dict[int, int] = {}
    ranks = []
    for position in positions.tolist():
        ranks.append(seen.get(position, 0))
        seen[position] = ranks[-1] + 1
    return torch.tensor(ranks)


def _agree(found: Mapping[str, Tensor], expected: Mapping[str, Tensor | None]) -> bool:
    for site, back in found.items():
        whole = expected[site]
        if whole is None:
            return False
        # Many families compute the softmax in float32, whatever the dtype; another way is far off.
        near = max(1024 * torch.finfo(back.dtype).eps, 1e-5) * whole.abs().max()
        if bool((back - whole).abs().max() > near):
            return False
    return True
