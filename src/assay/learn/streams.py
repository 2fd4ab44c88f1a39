"""Streams of activations: what a frozen network computes at several sites on the tokens of a text,
in shuffled batches, read in one pass over the data.

A batch is a function of the seed and the number of the step, so that a stream has no state to save:
a training that goes on from its checkpoint asks for the next step."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from assay.core.sites import Edit, Seen, run_edited
from assay.errors import InputError
from assay.memory import available
from assay.targets.names import SiteRef, resolve

TOKENS_PER_RUN = 4096
"""About how many tokens one forward pass of a stream takes."""
_MOST_BYTES = 2 << 30


@dataclass(frozen=True)
class Rows:
    """Token ids (windows, length) and which of them are tokens and no padding; `constant` is the
    number of first tokens of a window that are left out, as their activations hardly vary.

    Raises InputError for shapes that differ, and where no token is left."""

    ids: Int[Tensor, "windows length"]
    mask: Bool[Tensor, "windows length"]
    constant: int = 0

    def __post_init__(self) -> None:
        if self.ids.shape != self.mask.shape or self.ids.ndim != 2:
            raise InputError(
                "ids and mask must both be (windows, length), got"
                f" {tuple(self.ids.shape)} and {tuple(self.mask.shape)}"
            )
        if self.constant < 0:
            raise InputError(f"constant must be at least 0 positions, got {self.constant}")
        if not bool(self.kept.any()):
            raise InputError(
                f"no position is left of {len(self)} windows of {self.ids.shape[1]} tokens without"
                f" padding and the first {self.constant}"
            )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def kept(self) -> Bool[Tensor, "windows length"]:
        """The positions that are read: neither padding nor among the constant first ones."""
        return self.mask & (self.mask.long().cumsum(1) > self.constant)

    def take(self, index: Tensor | slice) -> Rows:
        """Return some of the windows."""
        return Rows(self.ids[index], self.mask[index], self.constant)

    def inputs(self, device: torch.device | None = None) -> dict[str, Tensor]:
        """Return the arguments of a language model."""
        return {
            "input_ids": self.ids.to(device),
            "attention_mask": self.mask.long().to(device),
        }


def rows_of(
    ids: Int[Tensor, "windows length"], mask: Tensor | None = None, *, constant: int = 0
) -> Rows:
    """Return windows of tokens, by default without padding."""
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    return Rows(ids, kept, constant)


def value_at(ref: SiteRef, value: Tensor) -> Float[Tensor, "batch positions width"]:
    """Return what a name means of a site's value, heads side by side."""
    return value if ref.heads is None else ref.split(value).flatten(-2)


def with_value(ref: SiteRef, value: Tensor, new: Tensor) -> Tensor:
    """Return the site's value with what a name means of it replaced: the inverse of `value_at`."""
    if ref.heads is None:
        return new
    return ref.merge(value, new.unflatten(-1, (ref.heads, -1)))


class Reader:
    """Reads named sites of a network in one forward pass, which ends at the last of them."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        if not names:
            raise InputError("at least one site is needed")
        self.model = model
        self.refs = {name: resolve(model, name) for name in names}
        self._last: str | None = None  # known after the first pass

    @property
    def device(self) -> torch.device:
        return next((entry.device for entry in self.model.parameters()), torch.device("cpu"))

    @torch.no_grad()
    def __call__(self, rows: Rows) -> dict[str, Float[Tensor, "kept width"]]:
        """Return the values at the positions that are read, window by window, in float32.

        Raises InputError where a site is not reached, or has no value per position."""
        kept = rows.kept.to(self.device)
        found: dict[str, Tensor] = {}
        order: list[str] = []

        def keep(site: str) -> Edit:
            def edit(seen: Seen) -> Tensor:
                order.append(site)
                for name, ref in self.refs.items():
                    if ref.site == site:
                        value = value_at(ref, seen.value)
                        require_positions(name, value, kept.shape)
                        # Chosen at once: the model may write into the value later.
                        found[name] = value[kept].float()
                if site == self._last:
                    raise _ReadAll
                return seen.written

            return edit

        sites = dict.fromkeys(ref.site for ref in self.refs.values())
        with suppress(_ReadAll):
            run_edited(self.model, rows.inputs(self.device), {site: keep(site) for site in sites})
        missing = [name for name in self.refs if name not in found]
        if missing:
            raise InputError(f"site {missing[0]!r} was not reached in the forward pass")
        if self._last is None:
            self._last = order[-1]
        return {name: found[name] for name in self.refs}


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
        first = self.read(rows.take(_with_kept(rows)))
        self.widths = {name: value.shape[1] for name, value in first.items()}
        self.counts = rows.kept.sum(1)
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
        return read_all(self.read, self.rows.take(self._of_epoch(0)[0][:windows]))

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


def read_all(reader: Reader, rows: Rows) -> dict[str, Float[Tensor, "kept width"]]:
    """Return the values of many windows, read some at a time."""
    parts = [reader(rows.take(some)) for some in chunks(rows)]
    return {name: torch.cat([part[name] for part in parts]) for name in reader.refs}


def chunks(rows: Rows, tokens: int = TOKENS_PER_RUN) -> list[Tensor]:
    """Return the indices of windows in runs of about `tokens` tokens, without those windows of
    which nothing is read.
    """
    windows = rows.kept.any(1).nonzero()[:, 0]
    return list(windows.split(max(1, tokens // rows.ids.shape[1])))


def require_positions(name: str, value: Tensor, shape: Sequence[int]) -> None:
    """Raise InputError where a site's value is not one vector per token."""
    if value.ndim != 3 or tuple(value.shape[:2]) != tuple(shape):
        raise InputError(
            f"site {name!r} has values of shape {tuple(value.shape)} for inputs of shape"
            f" {tuple(shape)}; one vector per token is needed"
        )


def positions_per_window(rows: Rows) -> float:
    """Return the mean number of positions that are read of a window."""
    return float(rows.kept.sum(1).double().mean())


def widths_of(reader: Reader, rows: Rows) -> Mapping[str, int]:
    """Return the width of the value at every site."""
    return {name: value.shape[1] for name, value in reader(rows.take(_with_kept(rows))).items()}


def _with_kept(rows: Rows) -> Tensor:
    """Return the first window of which anything is read."""
    return rows.kept.any(1).nonzero()[:1, 0]


class _ReadAll(Exception):  # noqa: N818
    """Ends a forward pass in which nothing more is read."""
