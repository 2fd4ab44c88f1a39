"""What logits lose when a node of a prompt's graph is taken out of the network itself, with
attention, norms and MLPs computed again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from assay.core.sites import Edit, Seen, run_edited
from assay.edges.prompt.replacement import Replacement
from assay.errors import InputError
from assay.memory import rows_within
from assay.progress import progress
from assay.targets import families

Removal = list[tuple[str, int, Tensor]]
"""The vectors of one node: site, position, vector."""


def removals(
    nodes: Replacement, tokens: Tensor, embedding: str, columns: Sequence[int]
) -> list[Removal]:
    """Return what the nodes of some columns write, where they write it."""
    wanted = {column: place for place, column in enumerate(columns)}
    found: list[Removal] = [[] for _ in columns]
    for written in nodes.written:
        held = torch.isin(written.columns, written.columns.new_tensor(list(wanted)))
        for row in held.nonzero().flatten().tolist():
            place = wanted[int(written.columns[row])]
            found[place].append((written.site, int(written.positions[row]), written.vectors[row]))
    begin = len(nodes.features) + len(nodes.written) * len(tokens)
    for column, place in wanted.items():
        if column >= begin:
            found[place].append((embedding, column - begin, tokens[column - begin]))
    return found


@torch.no_grad()
def exact_effects(
    model: nn.Module,
    ids: Tensor,
    removed: Sequence[Removal],
    logits: Float[Tensor, "targets width"],
    budget: int | None = None,
) -> Float[Tensor, "nodes targets"]:
    """Return `<logit vector, final norm>` of the network less that without each node, in float64.

    Every batch carries an untouched row, which its rows are compared with."""
    family = families.find_family(model)
    assert family is not None
    output: list[Tensor] = []

    def read(seen: Seen) -> Tensor:
        output[:] = [seen.value[:, -1].double()]
        return seen.written

    vocabulary, width = model.get_output_embeddings().weight.shape  # type: ignore[operator]
    depth = len(model.get_submodule(family.blocks))  # type: ignore[arg-type]
    needed = 8 * ids.shape[1] * (2 * vocabulary + 40 * width + depth)
    step = rows_within(needed, budget, device=ids.device, most=len(removed))
    found = []
    for begin in progress(range(0, len(removed), step), "nodes taken out"):
        some = removed[begin : begin + step]
        sites = dict.fromkeys(site for one in some for site, _, _ in one)
        edits: dict[str, Edit] = {site: _without(site, some) for site in sites}
        given = {"input_ids": ids.expand(len(some) + 1, -1)}
        run_edited(model, given, {**edits, family.final_norm: read})
        values = output[0] @ logits.double().T
        found.append(values[-1] - values[:-1])
    effects = torch.cat(found) if found else torch.zeros(0, len(logits), dtype=torch.float64)
    if not bool(effects.isfinite().all()):
        raise InputError("a logit is NaN or infinite with a node taken out")
    return effects.cpu()


def _without(site: str, removed: Sequence[Removal]) -> Edit:
    def act(seen: Seen) -> Tensor:
        value = seen.written.clone()
        for row, vectors in enumerate(removed):
            for place, position, vector in vectors:
                if place == site:
                    value[row, position] -= vector.to(value.dtype)
        return value

    return act
