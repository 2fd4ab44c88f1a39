"""Supernodes: parts that are active together and do the same, suggested and named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from assay.core.mechanisms import Mechanisms
from assay.core.sites import read_sites
from assay.edges.cut import Node
from assay.edges.part_edges import PartEdges
from assay.errors import InputError
from assay.io.supernodes import Supernode


@dataclass(frozen=True)
class Likeness:
    """How alike the upstream parts of some edges are, in [-1, 1], both (parts, parts).

    `coactivation` is the correlation over examples of `part_activations`, zero for a part that does
    not vary; `effect` the cosine between the edges of two parts over examples
    and the receivers that both can reach, zero where they are fewer than asked for."""

    coactivation: Float[Tensor, "parts parts"]
    effect: Float[Tensor, "parts parts"]

    def pairs(self, coactivation: float, effect: float) -> Bool[Tensor, "parts parts"]:
        """Return which parts are alike by both thresholds."""
        return (self.coactivation >= coactivation) & (self.effect >= effect)


@torch.no_grad()
def measure_likeness(edges: PartEdges, *, least: int = 3) -> Likeness:
    """Measure how alike the upstream parts of edges are; at least `least` receivers that both
    reach, the metric among them, tell two effects apart.
    """
    active = part_activations(edges.mechanisms, edges.upstream)
    centred = active - active.mean(0)
    # What varies by rounding alone does not vary.
    varies = centred.abs().amax(0) > 1e-5 * active.abs().amax(0)
    together = _cosines(centred * varies)
    whole = torch.cat([edges.values, edges.metric.unsqueeze(-1)], -1)
    reached = (whole != 0).any(0)
    both = reached[:, None] & reached[None, :]
    flat = whole.permute(1, 2, 0)
    dots = torch.einsum("ute,vte->uvt", flat, flat)
    own = flat.square().sum(-1)
    ours, theirs = ((own[:, None] * both).sum(-1), (own[None, :] * both).sum(-1))
    product = (ours * theirs).sqrt()
    cosine = torch.where(product > 0, (dots * both).sum(-1) / product.clamp_min(1e-300), 0.0)
    return Likeness(together, torch.where(both.sum(-1) >= least, cosine, 0.0))


def suggest_supernodes(
    edges: PartEdges, *, coactivation: float = 0.7, effect: float = 0.7, least: int = 3
) -> list[Supernode]:
    """Group the upstream parts of edges that are active together and have the same effect.

    The most alike are joined first, and two groups only where all of their parts are alike by both
    thresholds, so that no chain joins what differs. `python benchmarks/supernodes.py` measures how
    often other parts than planted duplicates are merged. Raises InputError for thresholds outside
    (0, 1]."""
    for name, value in (("coactivation", coactivation), ("effect", effect)):
        if not 0 < value <= 1:
            raise InputError(f"{name} must lie above 0 and not above 1, got {value}")
    likeness = measure_likeness(edges, least=least)
    names = edges.names[0]
    return [
        Supernode(f"{names[some[0]]} and like", tuple(edges.upstream[place] for place in some))
        for some in join_alike(likeness, coactivation, effect)
    ]


def join_alike(likeness: Likeness, coactivation: float, effect: float) -> list[list[int]]:
    """Return the groups of at least two parts that are alike, by their places."""
    alike = likeness.pairs(coactivation, effect)
    size = torch.minimum(likeness.coactivation, likeness.effect)
    first, second = torch.triu_indices(len(alike), len(alike), 1)
    order = size[first, second].argsort(descending=True, stable=True)
    group = {place: [place] for place in range(len(alike))}
    for one, other in zip(first[order].tolist(), second[order].tolist(), strict=True):
        ours, theirs = group[one], group[other]
        if ours is not theirs and bool(alike[ours][:, theirs].all()):
            ours += theirs
            group |= dict.fromkeys(theirs, ours)
    found = {id(some): sorted(some) for some in group.values() if len(some) > 1}
    return sorted(found.values())


@torch.no_grad()
def part_activations(
    mechanisms: Mechanisms, nodes: Sequence[Node]
) -> Float[Tensor, "examples nodes"]:
    """Return how active every node is in every example, against its reference and up to a scale: a
    feature by its coefficient, any other part by its projection onto the direction in which it
    varies most, with a positive mean.
    """
    sites = mechanisms.touched(mechanisms.groups)
    clean = read_sites(mechanisms.target.model, mechanisms.batch.inputs, sites)
    seen = {site: replace(one, earlier=clean) for site, one in clean.items()}
    known, columns = {}, []
    for name, index in nodes:
        place = torch.tensor(index, device=mechanisms.target.device)
        place = place.expand(len(mechanisms.batch), -1)
        vectors, atoms = [], []
        for site in mechanisms.group(name).sites:
            if site not in known:
                known[site] = mechanisms.parts(site, seen[site])
            parts = known[site][name]
            vectors.append(parts.one(place).flatten(1).double())
            if isinstance(table := getattr(parts, "atoms", None), Tensor):
                atom = table[index[-1]].double()
                atoms.append(atom.repeat(vectors[-1].shape[1] // len(atom)))
        vector = torch.cat(vectors, 1)
        if atoms:
            columns.append(vector @ torch.cat(atoms))
            continue
        along = vector @ torch.linalg.svd(vector, full_matrices=False)[2][0]
        columns.append(along if float(along.mean()) >= 0 else -along)
    return torch.stack(columns, 1).cpu()


def _cosines(columns: Float[Tensor, "examples parts"]) -> Float[Tensor, "parts parts"]:
    unit = columns / columns.norm(dim=0).clamp_min(1e-300)
    return unit.T @ unit
