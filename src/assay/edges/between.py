"""Edges between parts of any kind: how much of a part's attribution comes from each part before
it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from assay.attribution.scores import require_scores
from assay.core.mechanisms import Mechanisms
from assay.edges.chains import Chain, find_chain, push_forward, rank_within
from assay.edges.cut import CutRun, Node, run_cut
from assay.edges.part_edges import PartEdges
from assay.edges.pulling import Pull, pull_back, pull_of
from assay.errors import InputError
from assay.memory import rows_within


def part_edges(
    mechanisms: Mechanisms,
    downstream: Sequence[Node],
    upstream: Sequence[Node] | None = None,
    *,
    switches: str = "local",
    general: bool = False,
    budget: int | None = None,
) -> PartEdges:
    """Score the edges u -> d between parts, and from every u straight to the metric.

        w(u -> d) = <d(dF/dgate_d) / dv_u, part_u>

    with v_u the value at the site of u, dF/dgate_d = <g, part_d> with g the gradient of the metric
    in the whole network held fixed, and every other site between the two stopped (arXiv
    2403.19647). Summed over everything upstream, w(u -> d) is to first order the attribution of d.
    Signs are those of scores: what is lost when u is removed.

    Where the way from u to what d reads is the identity, as from an MLP to the residual stream, the
    derivative is known in closed form; that it is one is checked by a random pull-back. Elsewhere
    many parts are pulled back side by side. `switches` "secant" takes the difference quotient
    between value and reference for parts that are active on one side only, whose derivative is
    zero, where the kind offers it. `general` pulls back one part at a time from the parts
    themselves, as a check. `budget` is in bytes.

    Raises InputError for a part that is not there, for gates shared over the batch, and for scores
    that are not finite. Sheet: features."""
    began = time.process_time()
    if switches not in ("local", "secant"):
        raise InputError(f"switches must be 'local' or 'secant', got {switches!r}")
    upstream = downstream if upstream is None else upstream
    for node in (*downstream, *upstream):
        _require_node(mechanisms, node)
    run = run_cut(mechanisms)
    sources = _Sources(run, upstream)
    values = torch.zeros(len(mechanisms.batch), len(upstream), len(downstream), dtype=torch.float64)
    for name, places in _by_group(downstream).items():
        index = [downstream[place][1] for place in places]
        found = None if general else _by_rule(run, sources, name, index, switches, budget)
        if found is None:
            found = _general(run, sources, name, index, one_by_one=general)
        values[:, :, torch.tensor(places)] = found.to(values.device)
    if run.metric.requires_grad:
        straight = sources.dot(pull_back(run.metric.sum(), run.leaves))
    else:
        straight = torch.zeros(len(mechanisms.batch), len(upstream), dtype=torch.float64)
    require_scores({"edges": values, "edges to the metric": straight})
    return PartEdges(
        mechanisms,
        tuple(upstream),
        tuple(downstream),
        values,
        straight.cpu(),
        run.baseline.cpu(),
        switches=switches,
        cpu_seconds=time.process_time() - began,
    )


class _Sources:
    """The upstream parts as vectors, each at its own position where it has one."""

    def __init__(self, run: CutRun, upstream: Sequence[Node]):
        self.count, self.examples = len(upstream), len(run.mechanisms.batch)
        self.sites: dict[str, list[tuple[list[int], Tensor, Tensor | None]]] = {}
        clean, mechanisms = run.clean, run.mechanisms
        self.dims = {site: leaf.ndim for site, leaf in run.leaves.items()}
        with torch.no_grad():
            for name, places in _by_group(upstream).items():
                for site in mechanisms.group(name).sites:
                    parts = mechanisms.parts(site, clean[site])[name]
                    value = clean[site].value
                    flat = _is_flat(value, mechanisms.group(name).axes)
                    vectors, positions = [], []
                    for place in places:
                        index = torch.tensor(upstream[place][1], device=value.device)
                        one = parts.one(index.expand(self.examples, -1))
                        positions.append(upstream[place][1][0] if flat else 0)
                        vectors.append(one[:, positions[-1]] if flat else one.flatten(1))
                    where = torch.tensor(positions, device=value.device) if flat else None
                    self.sites.setdefault(site, []).append((places, torch.stack(vectors, 1), where))

    def dot(self, gradients: Mapping[str, Tensor | None], rows: int | None = None) -> Tensor:
        """Return <gradient, part> of every source, (*rows, examples, sources), for gradients
        (*rows, examples, *value) by site; None has no rows.
        """
        parts: list[tuple[list[int], Tensor]] = []
        for site, gradient in gradients.items():
            if gradient is None:
                continue
            for places, vectors, positions in self.sites.get(site, ()):
                if positions is None:
                    lead = gradient.shape[: gradient.ndim - self.dims[site]]
                    flat = gradient.reshape(*lead, self.examples, -1)
                    found = torch.einsum("...ew,enw->...en", flat, vectors.to(flat.dtype))
                else:
                    chosen = gradient[..., positions, :]
                    found = torch.einsum("...enw,enw->...en", chosen, vectors.to(chosen.dtype))
                parts.append((places, found))
        ahead = () if rows is None else (rows,)
        total = torch.zeros(*ahead, self.examples, self.count, dtype=torch.float64)
        for places, found in parts:
            total[..., torch.tensor(places)] += found.double().cpu()
        return total

    def pushed(
        self, out: Tensor, leaves: Mapping[str, Tensor]
    ) -> list[tuple[list[int], Tensor, Tensor]]:
        """Return the sources at some leaves as changes of a later value, by derivatives."""
        found = []
        for site, leaf in leaves.items():
            for places, vectors, where in self.sites.get(site, ()):
                assert where is not None
                found.append((places, push_forward(out, leaf, vectors, where), where))
        return found

    def stand_at_positions(self, site: str) -> bool:
        """Whether every source at a site stands at one position."""
        return all(where is not None for _, _, where in self.sites[site])

    def local(self, site: str, rows: Tensor, positions: Tensor) -> Tensor:
        """Return <row, part> of every source at a site where it stands at the row's position, for
        rows (rows, examples, width): (rows, examples, sources).
        """
        total = torch.zeros(len(rows), self.examples, self.count, dtype=torch.float64)
        for places, vectors, where in self.sites.get(site, ()):
            assert where is not None
            for position in positions.unique().tolist():
                here = (positions == position).nonzero().flatten()
                there = (where == position).nonzero().flatten()
                if not len(there):
                    continue
                found = torch.einsum("rew,enw->ren", rows[here], vectors[:, there].to(rows.dtype))
                columns = torch.tensor(places)[there.cpu()]
                total[here.cpu()[:, None], :, columns] += found.double().cpu().transpose(1, 2)
        return total


def _by_rule(
    run: CutRun,
    sources: _Sources,
    name: str,
    index: Sequence[tuple[int, ...]],
    switches: str,
    budget: int | None,
) -> Tensor | None:
    """Return the edges into parts of a group whose kind knows their derivatives in what they read,
    (examples, sources, parts); None where it does not.
    """
    mechanisms = run.mechanisms
    places = torch.tensor(index, device=mechanisms.target.device).reshape(len(index), -1)
    with torch.no_grad():
        known = mechanisms.slope_in_read(name, places, run.gradients, run.clean, switches)
    if known is None:
        return None
    positions, total = places[:, 0], torch.zeros(0)
    for read, rows in known.items():
        pull = pull_of(run.seen[read].value, run.leaves, sources.sites)
        pull = pull.without(
            [site for site in sources.sites if not sources.stand_at_positions(site)]
        )
        found = _pulled(run, sources, pull, read, rows, positions, budget)
        total = total + found if len(total) else found
    return total.permute(1, 2, 0)


def _pulled(
    run: CutRun,
    sources: _Sources,
    pull: Pull,
    read: str,
    rows: Tensor,
    positions: Tensor,
    budget: int | None,
) -> Tensor:
    """Return the edges (rows, examples, sources) of derivatives in the value at one read site,
    (rows, examples, width), each at its position.
    """
    total = torch.zeros(len(rows), sources.examples, sources.count, dtype=torch.float64)
    for site in pull.identity:
        total += sources.local(site, rows, positions)
    value, leaves = run.seen[read].value, run.leaves
    if pull.local:
        here = {site: leaves[site] for site in pull.local}
        for site, own in _in_place(value, here, rows, positions, budget).items():
            total += sources.local(site, own, positions)
    through = {site: leaves[site] for site in pull.general}
    flat = {site: leaf for site, leaf in through.items() if sources.stand_at_positions(site)}
    chain = find_chain(value, run.kept, run.layers, flat) if flat else None
    if chain is not None:
        total += _through_heads(run, sources, chain, value, rows, positions, budget)
        through = {site: leaf for site, leaf in through.items() if site not in flat}
    for some, found in _everywhere(value, through, rows, positions, budget):
        total[some.cpu()] += sources.dot(found, len(some))
    return total


def _through_heads(
    run: CutRun,
    sources: _Sources,
    chain: Chain,
    value: Tensor,
    rows: Tensor,
    positions: Tensor,
    budget: int | None,
) -> Tensor:
    """Return the edges through an attention layer, met at queries, keys and values."""
    z = value if chain.z is None else chain.z
    at_z = rows
    if chain.z is not None:
        at_z = _in_place(value, {"z": z}, rows, positions, budget)["z"]
    pushed = {
        head: sources.pushed(tensor, {site: run.leaves[site] for site in chain.leaves})
        for head, tensor in chain.heads.items()
    }
    total = torch.zeros(len(rows), sources.examples, sources.count, dtype=torch.float64)
    for some, found in _everywhere(z, chain.heads, at_z, positions, budget):
        for head, gradient in found.items():
            for places, vectors, where in pushed[head]:
                chosen = gradient[:, :, where]
                dots = torch.einsum("renw,enw->ren", chosen, vectors.to(chosen.dtype))
                total[some.cpu()[:, None], :, torch.tensor(places)] += (
                    dots.double().cpu().transpose(1, 2)
                )
    return total


def _in_place(
    value: Tensor,
    inputs: Mapping[str, Tensor],
    rows: Tensor,
    positions: Tensor,
    budget: int | None,
) -> dict[str, Tensor]:
    """Pull rows back to inputs that a position reaches at itself alone, (rows, examples, width) by
    input: one pull-back serves a row at every position.
    """
    slots = rank_within(positions).to(rows.device)
    lines = int(slots.max()) + 1
    step = _step(value, inputs, lines, budget)
    found: dict[str, Tensor] = {}
    for begin in range(0, lines, step):
        here = ((slots >= begin) & (slots < begin + step)).nonzero().flatten()
        line = slots[here] - begin
        cotangent = value.new_zeros(min(step, lines - begin), *value.shape)
        cotangent[line, :, positions[here]] = rows[here].to(value.dtype)
        for name, gradient in _batched(value, inputs, cotangent).items():
            if name not in found:
                found[name] = rows.new_zeros(*rows.shape[:2], gradient.shape[-1])
            found[name][here] = gradient[line, :, positions[here]].to(rows.dtype)
    return found


def _everywhere(
    value: Tensor,
    inputs: Mapping[str, Tensor],
    rows: Tensor,
    positions: Tensor,
    budget: int | None,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield some rows at a time with what they are pulled back to, (rows, *input) by input."""
    if not inputs:
        return
    for some in torch.arange(len(rows), device=rows.device).split(
        _step(value, inputs, len(rows), budget)
    ):
        cotangent = value.new_zeros(len(some), *value.shape)
        cotangent[torch.arange(len(some)), :, positions[some]] = rows[some].to(value.dtype)
        yield some, _batched(value, inputs, cotangent)


def _step(value: Tensor, inputs: Mapping[str, Tensor], most: int, budget: int | None) -> int:
    size = sum(one.numel() * one.element_size() for one in (value, *inputs.values()))
    return rows_within(48 * size, budget, device=value.device, most=most)


def _batched(value: Tensor, leaves: Mapping[str, Tensor], cotangent: Tensor) -> dict[str, Tensor]:
    """Return the pull-backs of cotangents (rows, *value) to the leaves."""
    inputs = list(leaves.values())
    if len(cotangent) == 1:
        found = torch.autograd.grad(value, inputs, cotangent[0], retain_graph=True)
        return {site: grad[None] for site, grad in zip(leaves, found, strict=True)}
    found = torch.autograd.grad(value, inputs, cotangent, retain_graph=True, is_grads_batched=True)
    return dict(zip(leaves, found, strict=True))


def _general(
    run: CutRun,
    sources: _Sources,
    name: str,
    index: Sequence[tuple[int, ...]],
    *,
    one_by_one: bool,
) -> Tensor:
    """Return the edges into parts of a group by derivatives of their attributions, (examples,
    sources, parts).
    """
    with torch.enable_grad():
        rows = run.attributions(name, index).sum(1)
    nothing = torch.zeros(sources.examples, sources.count, dtype=torch.float64)
    if not rows.requires_grad:
        return torch.stack([nothing] * len(index), -1)
    used = {site: leaf for site, leaf in run.leaves.items() if site in sources.sites}
    if one_by_one:
        return torch.stack([sources.dot(pull_back(row, used)) for row in rows], -1)
    eye = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    found = torch.autograd.grad(
        rows, list(used.values()), eye, retain_graph=True, is_grads_batched=True, allow_unused=True
    )
    return sources.dot(dict(zip(used, found, strict=True)), len(rows)).permute(1, 2, 0)


def _by_group(nodes: Sequence[Node]) -> dict[str, list[int]]:
    """Return the places of nodes by their group."""
    found: dict[str, list[int]] = {}
    for place, (name, _) in enumerate(nodes):
        found.setdefault(name, []).append(place)
    return found


def _is_flat(value: Tensor, axes: tuple[int, ...]) -> bool:
    """Whether parts of a group stand at one position of a value (examples, positions, width)."""
    return value.ndim == 3 and len(axes) >= 1 and axes[0] == value.shape[1]


def _require_node(mechanisms: Mechanisms, node: Node) -> None:
    name, index = node
    axes = mechanisms.group(name).axes
    if len(index) != len(axes) or any(not 0 <= i < n for i, n in zip(index, axes, strict=True)):
        raise InputError(f"there is no part {list(index)} of {name!r}, whose axes are {axes}")
