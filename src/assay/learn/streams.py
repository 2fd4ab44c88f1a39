"""Streams of activations: shuffled batches of what a frozen network computes at several sites on
the tokens of a text, read in one pass over the data.

A batch is a function of the seed and the number of the step, so that a stream has no state to save:
a training that goes on from its checkpoint asks for the next step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from assay.errors import InputError
from assay.learn.reading import Reader, Rows, first_kept, read_all
from assay.memory import available

_MOST_BYTES = 2 << 30


class Stream:
    """Shuffled batches of the activations at several sites.

    Windows are read in blocks, as many as fit `budget` bytes, and a block's positions are shuffled;
    a text that fits whole is read once. Each batch of `batch` positions is put together from
    `shares` parts, each from windows of its own: of `world` processes each reads and returns those
    of its own parts, and the parts of all are the batch of one process with as many shares.

    Raises InputError for numbers that do not divide one another, unknown sites, and fewer positions
    than one batch."""

    def __init__(
        self,
        model: nn.Module,
        rows: Rows,
        names: Sequence[str],
        *,
        batch: int,
        seed: int = 0,
        shares: int = 1,
        rank: int = 0,
        world: int = 1,
        budget: int | None = None,
    ) -> None:
        for what, count in (("batch", batch), ("shares", shares)):
            if count < 1:
                raise InputError(f"{what} must be at least 1, got {count}")
        if batch % shares or shares % world:
            raise InputError(
                f"the number of processes ({world}) must divide shares ({shares}), and shares the"
                f" batch ({batch})"
            )
        self.rows, self.batch, self.seed, self.shares = rows, batch, seed, shares
        self.own = [share for share in range(shares) if share % world == rank]
        self.read = Reader(model, names)
        self.part = batch // shares
        first = self.read(rows.take(first_kept(rows)))
        self.widths = {name: value.shape[1] for name, value in first.items()}
        self.counts = rows.counts
        per_window = 4 * sum(self.widths.values()) * max(rows.ids.shape[1], 1)
        room = min(available(self.read.device) // 4, _MOST_BYTES) if budget is None else budget
        wanted = -(-2 * batch // max(int(self.counts.float().mean()), 1))
        windows = min(max(room * world // per_window, wanted, shares), len(rows))
        self.blocks = -(-len(rows) // windows)
        self.windows = -(-len(rows) // self.blocks)
        self._starts = [0]  # of the epochs, in steps
        # What the next step most likely needs again, each with the key it was made for.
        self._held: tuple[Any, list[dict[str, Tensor]]] = (None, [])
        self._shuffled: tuple[Any, list[Tensor]] = (None, [])
        self._planned: tuple[int, tuple[Tensor, list[int]]] = (0, self._plan(0))
        if not sum(self._planned[1][1]):
            raise InputError(
                f"the data holds {int(self.counts.sum())} positions, fewer than one batch of"
                f" {batch} from {shares} shares; give more text or a smaller batch"
            )

    def __call__(self, step: int) -> dict[str, Float[Tensor, "positions width"]]:
        """Return this process's positions of the batch of a step."""
        epoch, block, place = self._find(step)
        held, orders = self._block(epoch, block)
        found: list[dict[str, Tensor]] = []
        for values, order in zip(held, orders, strict=True):
            chosen = order[place * self.part : (place + 1) * self.part]
            found.append({name: value[chosen.to(value.device)] for name, value in values.items()})
        return {name: torch.cat([part[name] for part in found]) for name in self.widths}

    def draw_windows(self, step: int, count: int) -> Rows:
        """Return this process's part of `count` windows, drawn anew for every step.

        Raises InputError unless the shares divide `count`."""
        if count < 1 or count % self.shares:
            raise InputError(f"windows must be a multiple of shares = {self.shares}, got {count}")
        own = []
        for share in self.own:
            generator = self._generator("windows", step, share)
            own.append(torch.randint(len(self.rows), (count // self.shares,), generator=generator))
        return self.rows.take(torch.cat(own))

    def sample(self, windows: int) -> dict[str, Float[Tensor, "positions width"]]:
        """Return the values of the first windows of the first epoch, the same in every process:
        what is measured before training.
        """
        chosen = self._of_epoch(0)[0][:windows]
        if self.blocks > 1 or self.shares > 1:
            return read_all(self.read, self.rows.take(chosen))
        (held,), _ = self._block(0, 0)  # the one block begins with them, and training needs it
        count = int(self.counts[chosen].sum())
        return {name: value[:count].clone() for name, value in held.items()}

    def _find(self, step: int) -> tuple[int, int, int]:
        """Return the epoch, the block in it, and the place in the block of a step's batch."""
        epoch = 0
        while True:
            if len(self._starts) == epoch + 1:
                self._starts.append(self._starts[-1] + sum(self._of_epoch(epoch)[1]))
            if step < self._starts[epoch + 1]:
                break
            epoch += 1
        rest = step - self._starts[epoch]
        for block, size in enumerate(self._of_epoch(epoch)[1]):
            if rest < size:
                return epoch, block, rest
            rest -= size
        raise AssertionError(step)

    def _of_epoch(self, epoch: int) -> tuple[Tensor, list[int]]:
        if self._planned[0] != epoch:
            self._planned = (epoch, self._plan(epoch))
        return self._planned[1]

    def _plan(self, epoch: int) -> tuple[Tensor, list[int]]:
        """Return the order of the windows, and how many whole batches every block gives."""
        # One block holds everything: its windows need no order of their own.
        order = self._order(len(self.rows), "windows", 0 if self.blocks == 1 else epoch)
        sizes = [
            min(
                int(self.counts[block[share :: self.shares]].sum()) // self.part
                for share in range(self.shares)
            )
            for block in order.split(self.windows)
        ]
        return order, sizes

    def _block(self, epoch: int, block: int) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
        """Return the values of a block for each of this process's shares, read once, and the
        order of their positions.
        """
        key = (0 if self.blocks == 1 else epoch, block)
        if self._held[0] != key:
            self._held = (None, [])  # free the last one before the next is read
            windows = self._of_epoch(epoch)[0].split(self.windows)[block]
            parts = [self._read(windows[share :: self.shares]) for share in self.own]
            self._held = (key, parts)
        held = self._held[1]
        if self._shuffled[0] != (epoch, block):
            counts = [len(next(iter(values.values()))) for values in held]
            orders = [
                self._order(count, "positions", epoch, block, share)
                for count, share in zip(counts, self.own, strict=True)
            ]
            self._shuffled = ((epoch, block), orders)
        return held, self._shuffled[1]

    def _read(self, windows: Tensor) -> dict[str, Tensor]:
        return read_all(self.read, self.rows.take(windows))

    def _order(self, count: int, *key: Any) -> Tensor:
        return torch.randperm(count, generator=self._generator(*key))

    def _generator(self, *key: Any) -> torch.Generator:
        words = "/".join(map(str, (self.seed, *key)))
        digest = hashlib.sha256(words.encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
