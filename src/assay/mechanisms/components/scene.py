"""One batch as every term of the objective sees it: rows, the clean run, importances, and the
divergence under masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from assay.errors import InputError
from assay.mechanisms.components.decomposition import Decomposition, Reading, read_clean
from assay.mechanisms.components.masks import Mask, make_mask, run_masked
from assay.mechanisms.components.minimality import Reduce
from assay.mechanisms.components.objective import Divergence, Routing
from assay.mechanisms.components.sources import Fresh, Monitor, Sampling

Routes = Mapping[str, Tensor | None]


@dataclass(frozen=True)
class Part:
    """Which examples of a batch one of several processes has: `examples` from `first` of `whole`,
    of which `positions` count in all processes together."""

    first: int
    examples: int
    whole: int
    positions: int | None = None


@dataclass(frozen=True)
class Rows:
    """A batch: the model's inputs, and how many positions of the batch each row stands for (one, if
    None; none at padding, say; `count` in all)."""

    inputs: Any
    weights: Float[Tensor, "*positions"] | None = None
    count: int | None = None
    part: Part | None = field(default=None, kw_only=True)

    def positions(self, output: Tensor) -> int:
        """Return the number of positions of an output (*positions, outputs)."""
        if self.part is not None and self.part.positions is not None:
            return self.part.positions
        whole = output[..., 0].numel() if self.count is None else self.count
        return whole if self.part is None else whole // self.part.examples * self.part.whole

    def kept(self, values: Tensor) -> Bool[Tensor, "*positions"]:
        """Return which positions of values (*positions, width) count for anything."""
        if self.weights is None:
            return torch.ones(values.shape[:-1], dtype=torch.bool, device=values.device)
        return self.weights > 0

    def share(self, rank: int, world: int) -> Rows:
        """Return the examples that one of `world` processes takes of a batch that all have drawn.

        Raises InputError for fewer examples than processes."""
        whole = len(tree_leaves(self.inputs)[0])
        if whole < world:
            raise InputError(
                f"a batch of {whole} examples cannot be split over {world} processes; start fewer,"
                " or take a larger batch"
            )
        bounds = [whole * place // world for place in range(world + 1)]
        own = slice(bounds[rank], bounds[rank + 1])
        inputs = tree_map(lambda entry: entry[own], self.inputs)
        part = Part(own.start, own.stop - own.start, whole, self.count)
        weights = None if self.weights is None else self.weights[own]
        return Rows(inputs, weights, part=part)


def skip_zeros(x: Float[Tensor, "rows features"]) -> Rows:
    """Return the rows that are not all zero, and one zero row that stands for all others.

    Exact where a zero row reaches every site as zero: no mask changes it there, and all of them
    have the same importances. `zeros_are_inert` says whether that is so."""
    active = (x != 0).any(-1)
    kept = x[active]
    if len(kept) == len(x):
        return Rows(x)
    weights = torch.ones(len(kept) + 1, dtype=x.dtype, device=x.device)
    weights[-1] = len(x) - len(kept)
    return Rows(torch.cat([kept, x.new_zeros(1, x.shape[1])]), weights, len(x))


def zeros_are_inert(model: nn.Module, found: Decomposition, features: int) -> bool:
    """Return whether an all-zero input reaches every site as zero, so that no mask can change what
    the network does with it.
    """
    weight = next(model.parameters())
    zero = torch.zeros(1, features, dtype=weight.dtype, device=weight.device)
    reading = read_clean(model, zero, found.sites)
    return all(
        not site.lookup and not bool(reading.inputs[site.name].any()) for site in found.sites
    )


def widened(values: Tensor) -> Tensor:
    """Return values in float32 or wider: sums over positions leave the range of float16."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def diverge(
    output: Float[Tensor, "*positions outputs"],
    clean: Float[Tensor, "*positions outputs"],
    kind: Divergence,
) -> Float[Tensor, "*positions"]:
    """Return every position's divergence in float32 or wider: the squared error, its mean over
    outputs, or KL(clean || output).
    """
    output, clean = widened(output), widened(clean)
    if kind == "mse":
        return (output - clean).square().mean(-1)
    expected = clean.log_softmax(-1)
    return (expected.exp() * (expected - output.log_softmax(-1))).sum(-1)


@dataclass(frozen=True)
class Scene:
    """What the terms of one step share."""

    model: nn.Module
    found: Decomposition
    rows: Rows
    reading: Reading
    importance: Mapping[str, Float[Tensor, "*positions components"]]
    divergence: Divergence
    generator: torch.Generator

    def detached(self) -> Scene:
        """Return the scene with importances that take no gradient: what an ascent sees."""
        return replace(
            self, importance={name: entry.detach() for name, entry in self.importance.items()}
        )

    def loss(self, sources: Mapping[str, Tensor], routes: Routes) -> Float[Tensor, ""]:
        """Return the mean divergence under sources (..., C + 1; the last for the delta part) of the
        routed sites.
        """
        masks = {
            name: make_mask(
                self.importance[name], sources[name][..., :-1], sources[name][..., -1], routed
            )
            for name, routed in routes.items()
        }
        return self.under(masks)

    def under(self, masks: Mapping[str, Mask]) -> Float[Tensor, ""]:
        """Return the mean divergence under masks."""
        output = run_masked(self.model, self.rows.inputs, self.found, masks)
        each = diverge(output, self.reading.output, self.divergence)
        weights = self.rows.weights
        total = each.sum() if weights is None else (each * weights).sum()
        return total / self.rows.positions(output)

    def watched(self, monitor: Monitor) -> dict[str, Mask]:
        """Return the fixed masks of a monitor."""
        masks = {}
        for name, g in self.importance.items():
            values = {
                "ci": g,
                "rounded": (g > 0.5).to(g.dtype),
                "unmasked": torch.ones_like(g),
                "zero": torch.zeros_like(g),
            }[monitor.masks]
            masks[name] = Mask(values, g.new_zeros(()))
        return masks

    def drawn(self, sampling: Sampling = "uniform") -> dict[str, Tensor]:
        """Draw sources uniform on [0, 1], or 0 or 1, for every position and site."""
        sources = {
            name: self._draw((*g.shape[:-1], g.shape[-1] + 1), g)
            for name, g in self.importance.items()
        }
        if sampling == "binary":
            return {name: entry.round_() for name, entry in sources.items()}
        return sources

    def shared(self) -> dict[str, Tensor]:
        """Draw sources uniform on [0, 1], one per component for the whole batch."""
        return {
            name: self._draw((g.shape[-1] + 1,), g, by_example=False)
            for name, g in self.importance.items()
        }

    def chosen(self, share: float) -> dict[str, Tensor]:
        """Draw which examples are chosen, each with probability `share`, shaped for the sources of
        every site.
        """
        first = next(iter(self.importance.values()))
        drawn = self._draw((len(first),), first) < share
        return {name: drawn.reshape(-1, *[1] * (g.ndim - 1)) for name, g in self.importance.items()}

    def routes(self, routing: Routing) -> Iterator[Routes]:
        """Return the routing of every forward pass of a term."""
        names = list(self.importance)
        if routing == "all":
            yield dict.fromkeys(names)
        elif routing == "layerwise":
            yield from ({name: None} for name in names)
        else:
            first = self.importance[names[0]]
            shape = first.shape[:-1]
            shapes = {tuple(g.shape[:-1]) for g in self.importance.values()}
            if len(shapes) > 1:
                raise InputError(
                    "a subset of sites at every position needs sites that all see the same"
                    f" positions, got {sorted(shapes)}; choose other sites or another routing"
                )
            order = self._draw((*shape, len(names)), first).argsort(-1).argsort(-1)
            many = 1 + (self._draw(tuple(shape), first) * len(names)).floor()
            routed = order < many.unsqueeze(-1)
            yield {name: routed[..., index] for index, name in enumerate(names)}

    def attacked(
        self, source: Fresh, routes: Routes, reduce: Reduce | None = None
    ) -> dict[str, Tensor]:
        """Return the sources that projected gradient ascent finds from a uniform start, one per
        component shared over the batch; `reduce` sums gradients over processes.
        """
        scene = self.detached()
        sources = {name: entry for name, entry in self.shared().items() if name in routes}
        for _ in range(source.steps):
            for entry in sources.values():
                entry.requires_grad_()
            with torch.enable_grad():
                gradients = torch.autograd.grad(scene.loss(sources, routes), list(sources.values()))
            if reduce is not None:
                gradients = tuple(reduce(gradient) for gradient in gradients)
            sources = {
                name: (entry.detach() + source.rate * gradient.sign()).clamp_(0, 1)
                for (name, entry), gradient in zip(sources.items(), gradients, strict=True)
            }
        return sources

    def _draw(self, shape: tuple[int, ...], like: Tensor, *, by_example: bool = True) -> Tensor:
        # All processes draw for the whole batch, so that their number changes nothing.
        part = self.rows.part if by_example else None
        device = self.generator.device
        if part is not None:
            shape = (part.whole, *shape[1:])
        drawn = torch.rand(shape, generator=self.generator, dtype=like.dtype, device=device)
        own = drawn if part is None else drawn[part.first : part.first + part.examples]
        return own.to(like.device)
