"""Reading of activations: what a frozen network computes at several sites on windows of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from assay.core.sites import Edit, Seen, run_edited
from assay.core.target import evaluating
from assay.errors import InputError
from assay.progress import progress
from assay.targets.names import SiteRef, resolve

TOKENS_PER_RUN = 4096
"""About how many tokens one forward pass of a stream takes."""

WINDOWS_AT_ONCE = 1 << 12
"""Windows whose positions are counted at once."""


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
        if not any(bool(part.any()) for part in self._parts()):
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

    @property
    def counts(self) -> Int[Tensor, " windows"]:
        """How many positions of every window are read."""
        return torch.cat([part.sum(1) for part in self._parts()])

    def _parts(self) -> Iterator[Bool[Tensor, "some length"]]:
        """Return `kept`, some windows at a time."""
        for mask in self.mask.split(WINDOWS_AT_ONCE):
            yield mask & (mask.long().cumsum(1) > self.constant)

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
    whole = torch.ones((), dtype=torch.bool, device=ids.device).expand(ids.shape)
    kept = whole if mask is None else mask.bool()
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

        Raises InputError where a site is not reached, or has no value per position, and for tokens
        that the network does not have."""
        require_vocabulary(self.model, rows.ids)
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
        with suppress(_ReadAll), evaluating(self.model):
            run_edited(self.model, rows.inputs(self.device), {site: keep(site) for site in sites})
        missing = [name for name in self.refs if name not in found]
        if missing:
            raise InputError(f"site {missing[0]!r} was not reached in the forward pass")
        if self._last is None:
            self._last = order[-1]
        return {name: found[name] for name in self.refs}


def read_all(reader: Reader, rows: Rows) -> dict[str, Float[Tensor, "kept width"]]:
    """Return the values of many windows, read some at a time."""
    parts = [reader(rows.take(some)) for some in progress(chunks(rows), "activations")]
    return {name: torch.cat([part[name] for part in parts]) for name in reader.refs}


def chunks(rows: Rows, tokens: int = TOKENS_PER_RUN) -> list[Tensor]:
    """Return the indices of windows in runs of about `tokens` tokens, without those windows of
    which nothing is read.
    """
    windows = rows.kept.any(1).nonzero()[:, 0]
    return list(windows.split(max(1, tokens // rows.ids.shape[1])))


def require_vocabulary(model: nn.Module, ids: Int[Tensor, "windows length"]) -> None:
    """Raise InputError for a token that a language model has no embedding of."""
    find = getattr(model, "get_input_embeddings", None)
    known = getattr(find() if callable(find) else None, "num_embeddings", None)
    if known is not None and int(ids.max()) >= known:
        raise InputError(
            f"token {int(ids.max())} is none of the network's {known} tokens: the text was"
            " tokenised for another model"
        )


def require_positions(name: str, value: Tensor, shape: Sequence[int]) -> None:
    """Raise InputError where a site's value is not one vector per token."""
    if value.ndim != 3 or tuple(value.shape[:2]) != tuple(shape):
        raise InputError(
            f"site {name!r} has values of shape {tuple(value.shape)} for inputs of shape"
            f" {tuple(shape)}; one vector per token is needed"
        )


def widths_of(reader: Reader, rows: Rows) -> Mapping[str, int]:
    """Return the width of the value at every site."""
    return {name: value.shape[1] for name, value in reader(rows.take(first_kept(rows))).items()}


def first_kept(rows: Rows) -> Tensor:
    """Return the first window of which anything is read."""
    return rows.counts.nonzero()[:1, 0]


class _ReadAll(Exception):  # noqa: N818
    """Ends a forward pass in which nothing more is read."""
