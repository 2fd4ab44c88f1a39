"""Edges into features and logits, pulled back through the frozen network: many rows at a time, one
target position after the other, over the positions that it can see.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.edges.prompt.frozen import FrozenNetwork
from assay.edges.prompt.replacement import Replacement, Skip
from assay.memory import rows_within

_PUSHED = 64  # positions up to which tokens are pushed forward through the first attention layer


@dataclass(frozen=True)
class PullBack:
    """The way back from everything that can be a target: features by their index, then logits.

    Columns are features, errors (layer * positions + position) and tokens."""

    frozen: FrozenNetwork
    nodes: Replacement
    tokens: Float[Tensor, "positions width"]
    logits: Float[Tensor, "targets width"]
    budget: int | None = None

    @property
    def positions(self) -> int:
        return len(self.tokens)

    @property
    def columns(self) -> int:
        depth = len(self.frozen.blocks)
        return len(self.nodes.features) + (depth + 1) * self.positions

    def rows(self, index: Int[Tensor, " rows"]) -> Float[Tensor, "rows columns"]:
        """Return the edges into targets, a row each: `<gradient at the source, what it writes>`,
        with the gradient of an active feature, or of a logit less the mean over the vocabulary.
        """
        out = self.tokens.new_zeros(len(index), self.columns)
        layers, places = self._where(index)
        for rows in self._chunks(layers, places):
            out[rows] = self._pull(index[rows], layers[rows].tolist(), int(places[rows[0]]))
        return out

    def _where(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer and the position of targets; logits stand behind the last layer."""
        features = self.nodes.features
        ends = features.new_tensor([[len(self.frozen.blocks), self.positions - 1, 0]])
        table = torch.cat([features, ends.expand(len(self.logits), -1)])
        return table[index, 0], table[index, 1]

    def _chunks(self, layers: Tensor, places: Tensor) -> Iterator[Tensor]:
        width, size = self.tokens.shape[1], self.tokens.element_size()
        for place in places.unique().tolist():
            here = (places == place).nonzero().flatten()
            # Those of late layers come first: a sweep from the last layer takes up more and more.
            here = here[layers[here].argsort(descending=True, stable=True)]
            needed = size * (8 * (place + 1) * width + self.columns)
            yield from here.split(rows_within(needed, self.budget, most=len(here)))

    def _pull(self, index: Tensor, layers: list[int], place: int) -> Tensor:
        """Return the rows of targets at one position, sorted by layer from the last on."""
        nodes, blocks = self.nodes, self.frozen.blocks
        stop, count = place + 1, len(index)
        out = self.tokens.new_zeros(count, self.columns)
        gradient = self.tokens.new_zeros(stop, count, self.tokens.shape[1])
        begun = layers.count(len(blocks))
        if begun:
            vectors = self.logits[index[:begun] - len(nodes.features)]
            gradient[place, :begun] = self.frozen.final.pull(vectors, place)
        for layer in reversed(range(len(blocks))):
            block, reading = blocks[layer], nodes.readings.get(layer)
            old = gradient[:, :begun]
            if begun:
                self._read_out(out[:begun], old, layer)
            skips = [
                (skip.reading.early, self._skipped(old, skip))
                for skip in nodes.skips.get(layer, ())
                if begun
            ]
            new = slice(begun, begun + layers[begun:].count(layer))
            late = begun
            if reading is not None and new.stop > begun:
                gradient[place, new] = reading.pull(nodes.encoders[index[new]], place)
                late = begun if reading.early else new.stop
            for early, more in skips:
                if not early:
                    old += more
            if layer == 0 and self._pushed is not None:
                out[:late, self._of_tokens(stop)] += self._through_first(gradient[:, :late])
                gradient[:, :late] = 0
            else:
                # What is new stands at its own position alone.
                own = gradient[place:stop, begun:late]
                fresh = block.pull(own, place) if late > begun else None
                if begun:
                    old += block.pull(old)
                if fresh is not None:
                    gradient[:, begun:late] += fresh
            for early, more in skips:
                if early:
                    old += more
            begun = new.stop
        out[:, self._of_tokens(stop)] += torch.einsum("qnw,qw->nq", gradient, self.tokens[:stop])
        return out

    def _of_tokens(self, stop: int) -> slice:
        begin = self.columns - self.positions
        return slice(begin, begin + stop)

    def _read_out(self, out: Tensor, gradient: Tensor, layer: int) -> None:
        """Add the products of gradients (positions, rows, width) with what a layer writes."""
        written = self.nodes.written[layer]
        stop = written.starts[len(gradient)]
        found = gradient.new_empty(len(out), stop)
        for place, one in enumerate(gradient):
            some = slice(written.starts[place], written.starts[place + 1])
            torch.mm(one, written.added[some].T, out=found[:, some])
        out.index_add_(1, written.columns[:stop], found)

    def _skipped(self, gradient: Tensor, skip: Skip) -> Tensor:
        """Return a gradient behind an MLP where its skip connection reads."""
        everywhere = slice(0, len(gradient))
        turned = gradient.transpose(0, 1)
        if skip.after is not None:
            turned = skip.after.pull(turned, everywhere)
        return skip.reading.pull(turned @ skip.weight.T, everywhere).transpose(0, 1)

    @cached_property
    def _pushed(self) -> Tensor | None:
        """What every token brings to every position behind the first attention layer, (queries,
        tokens, width); None for prompts so long that pulling back is cheaper.
        """
        if self.positions > _PUSHED:
            return None
        found = self.frozen.blocks[0].push(self.tokens[:, None])[:, :, 0]
        places = torch.arange(self.positions, device=found.device)
        found[places, places] += self.tokens
        return found

    def _through_first(self, gradient: Tensor) -> Tensor:
        assert self._pushed is not None
        stop = len(gradient)
        return torch.einsum("qnw,qkw->nk", gradient, self._pushed[:stop, :stop])
