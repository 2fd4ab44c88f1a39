"""Why a head looks where it looks: the score of a query and a key as a sum over pairs of parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from assay.attribution.scores import require_scores
from assay.attribution.transformer.relp import modified_backward
from assay.core.mechanisms import Mechanisms
from assay.core.sites import Edit, Seen
from assay.edges.cut import Node
from assay.errors import InputError
from assay.targets import blocks, families

REST = "rest"


@dataclass(frozen=True)
class QueryKey:
    """The attention score of one head, from one query position to one key position, by pairs of
    parts: `values` (examples, parts + 1, parts + 1), the part at the query first, in float64.

    The last row and column are what the other parts leave: biases, position embeddings, and all
    that is no part. Everything together is `scores`, the score before a softcap and the mask."""

    mechanisms: Mechanisms
    layer: int
    head: int
    query: int
    key: int
    parts: tuple[Node, ...]
    values: Float[Tensor, "examples query_parts key_parts"]
    scores: Float[Tensor, " examples"]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of rows and columns."""
        return (*(self.mechanisms.describe(*node) for node in self.parts), REST)

    def removals(self) -> Float[Tensor, "examples parts"]:
        """Return what the score loses without each part, at query and key together, norms held
        fixed: its row and its column, less the pair with itself that is in both.
        """
        own = self.values.diagonal(dim1=1, dim2=2)
        return (self.values.sum(2) + self.values.sum(1) - own)[:, :-1]

    def table(self) -> pl.DataFrame:
        """Return one row for every pair with a score other than zero: query, key, mean score,
        standard deviation over examples, n; the largest first.
        """
        mean = self.values.mean(0)
        rows, columns = (mean != 0).nonzero(as_tuple=True)
        found = self.values[:, rows, columns]
        return pl.DataFrame(
            {
                "query": [self.names[row] for row in rows.tolist()],
                "key": [self.names[column] for column in columns.tolist()],
                "score": found.mean(0).tolist(),
                "sd": found.std(0, correction=1 if len(found) > 1 else 0).tolist(),
                "n": [len(found)] * len(rows),
            },
            schema_overrides={"query": pl.String, "key": pl.String},
        ).sort(pl.col("score").abs(), descending=True)

    to_polars = table

    def top(self, count: int = 20) -> pl.DataFrame:
        """Return the pairs with the largest |mean score|."""
        return self.table().head(count)


class _Cut:
    """The values at the sites of the parts as leaves of the graph, and what is seen there."""

    def __init__(self, mechanisms: Mechanisms):
        self.mechanisms = mechanisms
        self.leaves: dict[str, Tensor] = {}
        self.seen: dict[str, Seen] = {}

    def cut(self, site: str, seen: Seen) -> Tensor:
        self.seen[site] = seen.detach()
        for read, earlier in seen.earlier.items():
            self.seen.setdefault(read, earlier.detach())
        leaf = seen.value.detach().clone().requires_grad_()
        self.leaves[site] = leaf
        if seen.written is seen.value:
            return leaf
        # At a sum of two values only one is written: the other must not carry on beside the leaf.
        return seen.written + (leaf - seen.value)

    def parts_in(
        self, vector: Float[Tensor, "examples size"], parts: Sequence[Node]
    ) -> Float[Tensor, "examples parts size"]:
        """Return what every part brings to a vector, J part, in float64."""
        examples, size = vector.shape
        found = torch.zeros(examples, len(parts), size, dtype=torch.float64, device=vector.device)
        if not vector.requires_grad:
            return found
        rows = torch.eye(size, dtype=vector.dtype, device=vector.device)
        cotangents = rows[:, None].expand(size, examples, size)
        gradients = torch.autograd.grad(
            vector,
            list(self.leaves.values()),
            cotangents,
            is_grads_batched=True,
            allow_unused=True,
            retain_graph=True,
        )
        by_site = dict(zip(self.leaves, gradients, strict=True))
        for site, names in self.mechanisms.sites.items():
            gradient = by_site.get(site)
            wanted = [place for place, (name, _) in enumerate(parts) if name in names]
            if gradient is None or not wanted:
                continue
            with torch.no_grad():
                seen = replace(self.seen[site], earlier=self.seen)
                held = self.mechanisms.parts(site, seen)
                for place in wanted:
                    name, index = parts[place]
                    where = torch.tensor(index, dtype=torch.long, device=vector.device)
                    one = held[name].one(where.expand(examples, -1)).to(gradient.dtype)
                    products = (gradient * one).flatten(2).sum(2, dtype=torch.float64)
                    found[:, place] += products.T
        return found


def query_key(
    mechanisms: Mechanisms, parts: Sequence[Node], layer: int, head: int, query: int, key: int
) -> QueryKey:
    """Return the score of a head between two positions as a sum over pairs of parts.

        score = c <q, k> = sum_ij c <q_i, k_j>,   q_i = J_q part_i,   k_j = J_k part_j

    with J the way from the parts' sites to the head's query and key, rotation included, scale
    factors of norms and attention patterns before it held fixed, and what MLPs put out a constant
    unless a site stands there. Sites in between are stopped, so that each part takes its direct way
    alone. All of it is linear then, and the sum is exact (the QK attributions of Kamath et al.
    2025, Tracing attention computation through feature interactions, transformer-circuits.pub).

    Raises InputError for a family whose heads are not known, for a layer, head, position or part
    that is not there, and for a key behind its query."""
    model = mechanisms.target.model
    for name, index in parts:
        axes = mechanisms.group(name).axes
        fits = len(index) == len(axes)
        if not fits or any(not 0 <= i < n for i, n in zip(index, axes, strict=True)):
            raise InputError(f"there is no part {list(index)} of {name!r}, whose axes are {axes}")
        if not mechanisms.group(name).per_example:
            raise InputError(
                f"query and key are of an example; the gates of {name!r} are shared over the batch"
            )
    family = families.find_family(model)
    built = blocks.build(model)
    if built is None or family is None:
        raise InputError(
            f"the heads of a {families.model_type(model)!r} model are not known (they are for"
            f" {', '.join(families.FAMILIES)})"
        )
    _require_within("layer", layer, len(built))
    block, path = built[layer], f"{family.blocks}.{layer}"
    _require_within("head", head, block.slices[0].heads or 0)
    run = _Cut(mechanisms)
    edits = mechanisms.edits_of(mechanisms.groups, run.cut)
    for place in range(len(built)):
        outer, inner = (
            f"{family.blocks}.{place}.{name}" for name in (family.mlp, family.mlp_module)
        )
        if not any(site == outer or site.startswith(inner) for site in edits):
            edits[outer] = lambda seen: seen.written.detach()
    called: dict[str, Seen] = {}

    def keep(site: str, before: Edit | None) -> Edit:
        def act(seen: Seen) -> Tensor:
            written = seen.written if before is None else before(seen)
            called[site] = Seen(written, written, seen.inputs, seen.kwargs)
            return written

        return act

    for site in dict.fromkeys([f"{path}:input", *block.projections]):
        edits[site] = keep(site, edits.get(site))
    with modified_backward(model, "frozen"), torch.enable_grad():
        mechanisms.target.values(mechanisms.batch, edits)
        given = blocks.call(model.get_submodule(path), called[f"{path}:input"])
        raw = {site: called[site].value for site in block.projections}
        heads = block.heads(raw, given.rotation)
    positions = heads[0].shape[2]
    _require_within("query", query, positions)
    _require_within("key", key, positions)
    if key > query:
        raise InputError(f"the key position {key} lies behind the query position {query}")
    attention: Any = block.attention
    shared = heads[0].shape[1] // heads[1].shape[1]
    asks, answers = heads[0][:, head, query], heads[1][:, head // shared, key]
    sides = []
    for vector in (asks, answers):
        known = run.parts_in(vector, parts)
        whole = vector.detach().double()
        sides.append(torch.cat([known, (whole - known.sum(1))[:, None]], 1))
    values = float(attention.scaling) * torch.einsum("eis,ejs->eij", *sides)
    require_scores({"query and key": values})
    return QueryKey(
        mechanisms, layer, head, query, key, tuple(parts), values.cpu(), values.sum((1, 2)).cpu()
    )


def _require_within(name: str, value: int, count: int) -> None:
    if not 0 <= value < count:
        raise InputError(f"{name} {value} does not exist: there are {count}, 0 to {count - 1}")
