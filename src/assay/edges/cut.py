"""The network cut at every site of a graph, so that a derivative takes the direct way alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from assay.attribution.gradient import site_gradients
from assay.core.mechanisms import Mechanisms
from assay.core.sites import Edit, Seen
from assay.edges.chains import Stations, stations
from assay.errors import InputError

Node = tuple[str, tuple[int, ...]]
"""A part: the name of its group and its index there."""


@dataclass
class CutRun:
    """One forward pass in which the value at every site is a leaf of the autograd graph.

    What is seen at a site then depends on the leaves before it through everything between them but
    the other sites: these are stopped. `seen` holds what is seen at every site, in the graph,
    `leaves` the values that are carried on, `gradients` those of the metric in the whole network,
    and `metric` the metric (examples,), which depends on the leaves directly. `clean` is `seen`
    outside the graph. `kept` holds what attention layers pass on inside, in the graph."""

    mechanisms: Mechanisms
    gradients: Mapping[str, Tensor]
    seen: dict[str, Seen] = field(default_factory=dict)
    leaves: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    layers: list[Stations] = field(default_factory=list)
    metric: Tensor = field(default_factory=lambda: torch.empty(0))
    baseline: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def clean(self) -> dict[str, Seen]:
        plain = {site: seen.detach() for site, seen in self.seen.items()}
        return {site: replace(seen, earlier=plain) for site, seen in plain.items()}

    def attributions(self, name: str, index: Sequence[tuple[int, ...]]) -> Tensor:
        """Return dF/dgate of parts of one group in the graph, (parts, examples)."""
        mechanisms, rows = self.mechanisms, []
        parts = {}
        for site in mechanisms.group(name).sites:
            parts[site] = mechanisms.parts(site, self.seen[site])[name]
        examples = len(mechanisms.batch)
        for entry in index:
            place = torch.tensor(entry, dtype=torch.long, device=mechanisms.target.device)
            total = torch.zeros((), device=mechanisms.target.device)
            for site, here in parts.items():
                one = here.one(place.expand(examples, len(entry)))
                gradient = self.gradients[site].to(one.dtype)
                total = total + (one * gradient).flatten(1).sum(1)
            rows.append(total)
        return torch.stack(rows)


def run_cut(mechanisms: Mechanisms) -> CutRun:
    """Run the network once as it is, for the gradients at the sites, and once cut.

    Raises InputError for gates that are shared over the batch, and where gradients do not pass the
    sites as in the network."""
    for name, group in mechanisms.groups.items():
        if not group.per_example:
            raise InputError(
                f"edges are between values of an example; the gates of {name!r} are shared over the"
                " batch"
            )
    if mechanisms.convention != "pass_through":
        raise InputError(
            f"edges pass the sites as the network does; bind with convention='pass_through', not"
            f" {mechanisms.convention!r}"
        )
    values, turns = site_gradients(mechanisms)
    gradients = {
        site: torch.zeros_like(seen.written) if gradient is None else gradient
        for site, seen, gradient in turns
    }
    layers = stations(mechanisms.target.model)
    run = CutRun(mechanisms, gradients, baseline=values.double(), layers=layers)

    def cut(site: str, seen: Seen) -> Tensor:
        run.seen[site] = seen
        for read, earlier in seen.earlier.items():
            run.seen.setdefault(read, earlier)
        leaf = seen.value.detach().clone().requires_grad_()
        run.leaves[site] = leaf
        if seen.written is seen.value:
            return leaf
        # At a sum of two values only one is written: the other must not carry on beside the leaf.
        return seen.written + (leaf - seen.value)

    def keep(site: str) -> Edit:
        def edit(seen: Seen) -> Tensor:
            run.kept[site] = seen.written
            return seen.written

        return edit

    with torch.enable_grad():
        edits = mechanisms.edits_of(mechanisms.groups, cut)
        inner = [site for layer in run.layers for site in (layer.z, *layer.heads)]
        more = {site: keep(site) for site in inner if site not in edits}
        run.metric = mechanisms.target.values(mechanisms.batch, {**edits, **more})
    run.kept |= {site: run.seen[site].value for site in inner if site in run.seen}
    return run
