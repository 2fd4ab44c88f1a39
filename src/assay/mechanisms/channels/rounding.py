"""How far the rounding of float64 can take computed attributions and effects from the real ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from assay.mechanisms.channels.clean import Clean, last_gradient
from assay.mechanisms.channels.norms import SLACK, Sizes, norm_length


class Rounding:
    """Forward bounds of rounding, to first order in the unit roundoff, with a safety factor of 4.

    Every block rounds its state by at most `unit (|x| + loud |x|^2)`, where `loud = ||D||_F min(
    ||L||_{2,inf} ||R||_F, ||R||_{2,inf} ||L||_F)` bounds the block with all its entries made
    positive; later blocks stretch that by at most the norm of their Jacobian at the ablated state,
    `alpha + 2 beta eps`. What is bounded are the values of the functional, twice (an effect is a
    difference), the attribution, and the terms of second order."""

    def __init__(self, clean: Clean, sizes: Sizes):
        weights = clean.weights
        self.clean, self.sizes = clean, sizes
        self.unit = 4 * (2 * weights.width + weights.hidden + 32) * 2.0**-53
        self.loud = [_loud(layer.left, layer.right, layer.down) for layer in weights.layers]
        self.length = [x.norm(dim=-1, keepdim=True) for x in clean.before]
        self.states = self._states()
        self.gradients = self._gradients()

    def slack(self, block: int, steps: list[Tensor], first: Tensor) -> Tensor:
        """Return the rounding to allow for each channel of a block, (examples, hidden).

        `steps[i]` bounds the change of the state that block `block + 1 + i` reads (the last one:
        that the head reads) when a channel is ablated, and `first` is the first-order bound."""
        clean, last = self.clean, len(self.clean.weights.layers)
        state, bent = self._behind(block, self.states[block], 0.0), torch.zeros_like(steps[0])
        for m, step in zip(range(block + 1, last), steps, strict=False):
            state = self._behind(m, state, step)
            bent = bent + self.loud[m] * self.gradients[m] * step.square()
        value = self._value(state, steps[-1])
        total = 2 * value + clean.pool(self._attribution(block) + bent) + SLACK * first
        return torch.nan_to_num(total, nan=math.inf, posinf=math.inf)

    def _behind(self, m: int, state: Tensor, step: Tensor | float) -> Tensor:
        """Return the rounding of the state behind block m, given that of the state it reads."""
        length = self.length[m] + step
        local = self.unit * length * (1 + self.loud[m] * length)
        stretch = self.sizes.state.get(m, 1 + 2 * self.loud[m] * self.length[m])
        stretch = stretch + 2 * self.loud[m] * step
        rounded = stretch * state + local
        if m not in self.sizes.norm:
            return rounded
        if self.clean.frozen:
            largest = self.sizes.norm[m]
            return largest * rounded + self.unit * largest * (self._after(m) + stretch * step)
        size, reach = norm_length(self.clean, m)
        layer = self.clean.weights.layers[m]
        least = math.sqrt(self.clean.weights.width * layer.epsilon)
        shortest = (size - stretch * step).clamp(min=max(least, 1e-300))
        return reach / shortest * rounded + self.unit * reach

    def _after(self, m: int) -> Tensor:
        return self.clean.sums[m].norm(dim=-1, keepdim=True)

    def _states(self) -> list[Tensor]:
        found = [self.unit * self.length[0]]
        for m in range(len(self.length)):
            found.append(self._behind(m, found[-1], 0.0))
        return found

    def _gradients(self) -> list[Tensor]:
        clean, unit = self.clean, self.unit
        error = unit * last_gradient(clean).norm(dim=-1, keepdim=True)
        if clean.functional == "cross_entropy":
            head = clean.weights.head
            error = error + head.norm() * (unit + 2 * head.norm(dim=1).max() * self.states[-1])
        found: list[Tensor] = []
        for m in reversed(range(len(self.length))):
            if m in self.sizes.norm:
                behind = self.sizes.behind(clean, m)
                size, _ = norm_length(clean, m)
                error = self.sizes.norm[m] * (error + behind * (unit + 4 * self.states[m] / size))
            found.append(error)
            stretch = self.sizes.state.get(m, 1 + 2 * self.loud[m] * self.length[m])
            local = unit * (1 + 2 * self.loud[m] * self.length[m])
            local = local + 2 * self.loud[m] * self.states[m]
            error = stretch * error + clean.gradients[m].norm(dim=-1, keepdim=True) * local
        return found[::-1]

    def _attribution(self, block: int) -> Tensor:
        clean, layer = self.clean, self.clean.weights.layers[block]
        columns = layer.down.norm(dim=0)
        rows = layer.left.norm(dim=1) * layer.right.norm(dim=1)
        size = self.length[block]
        hidden = rows * size * (self.unit * size + 2 * self.states[block])
        gradient = clean.gradients[block].norm(dim=-1, keepdim=True)
        error = self.gradients[block] + self.unit * gradient
        return 2 * columns * (error * clean.hidden[block].abs() + gradient * hidden)

    def _value(self, state: Tensor, step: Tensor) -> Tensor:
        clean, weights = self.clean, self.clean.weights
        last = self._after(len(self.length) - 1)
        if weights.normed:
            last = last.clamp(min=norm_length(clean, len(self.length) - 1)[1])
        moved = clean.pool(state + self.unit * (last + step)) / clean.positions
        if clean.functional == "logit":
            return weights.head[clean.labels].norm(dim=-1, keepdim=True) * moved
        row = weights.head.norm(dim=1).max()
        size = clean.logits.abs().amax(-1, keepdim=True) + row * clean.pool(step) / clean.positions
        return 2 * row * moved + self.unit * (1 + 2 * size)


def _loud(left: Tensor, right: Tensor, down: Tensor) -> Tensor:
    rows = torch.minimum(
        left.norm(dim=1).max() * right.norm(), right.norm(dim=1).max() * left.norm()
    )
    return down.norm() * rows * (1 + SLACK)
