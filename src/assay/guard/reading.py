"""Which values of a network are a guard's features, read in the network's own forward pass."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from assay.core.sites import Edit, Seen, read_sites, run_edited
from assay.errors import InputError
from assay.guard.observed import Observed, digests


@dataclass(frozen=True)
class Reading:
    """Columns of the values at sites, at the last position of every input that has positions: the
    last one with attention mask 1, where there is a mask.

    `logits` says whether the network's output is read too, as the latent root. Raises InputError
    without a column, and for a column named twice."""

    sites: Mapping[str, tuple[int, ...]]
    logits: bool = True

    def __post_init__(self) -> None:
        if not any(self.sites.values()):
            raise InputError("a guard needs at least one feature; name a site with its columns")
        for site, columns in self.sites.items():
            if len(set(columns)) < len(columns) or any(column < 0 for column in columns):
                raise InputError(f"columns of {site!r} must be distinct and not negative")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the features, `site[column]`."""
        return tuple(
            f"{site}[{column}]" for site, columns in self.sites.items() for column in columns
        )

    @property
    def places(self) -> dict[str, tuple[str, int]]:
        """The site and the column of every feature."""
        return {
            f"{site}[{column}]": (site, column)
            for site, columns in self.sites.items()
            for column in columns
        }

    def to_json(self) -> dict[str, Any]:
        """Return what `reading_of` reads again."""
        return {
            "sites": {site: list(columns) for site, columns in self.sites.items()},
            "logits": self.logits,
        }

    @torch.no_grad()
    def run(
        self, model: nn.Module, inputs: Any, edits: Mapping[str, Edit] | None = None
    ) -> tuple[Observed, Any]:
        """Run the model once, with edits at sites, and return what it did and its output.

        Raises InputError for sites that the network does not have or does not reach, and for
        columns that the value there does not have."""
        found: dict[str, Tensor] = {}
        edits = dict(edits or {})

        def keep(site: str, inner: Edit | None) -> Edit:
            def edit(seen: Seen) -> Tensor:
                new = seen.written if inner is None else inner(seen)
                # A sum of sites is read as a whole, and written at its first summand.
                found[site] = (seen.value if inner is None else new).detach().clone()
                return new

            return edit

        # Edits are installed first: a value is read after them.
        wrapped = {site: keep(site, edit) for site, edit in edits.items()}
        wrapped |= {site: keep(site, None) for site in self.sites if site not in edits}
        output = run_edited(model, inputs, wrapped)
        last = last_positions(inputs)
        columns = []
        for site, chosen in self.sites.items():
            if site not in found:
                raise InputError(f"site {site!r} was not reached in the forward pass")
            value = _at(found[site], last)
            if chosen and max(chosen) >= value.shape[1]:
                raise InputError(
                    f"site {site!r} has {value.shape[1]} columns, and the guard reads column"
                    f" {max(chosen)}"
                )
            columns.append(value[:, list(chosen)].float().cpu())
        logits = _at(_logits(output), last).float().cpu() if self.logits else None
        return Observed(torch.cat(columns, 1), self.names, logits, input_keys(inputs)), output


def read(model: nn.Module, inputs: Any, reading: Reading) -> Observed:
    """Return what a model did on inputs."""
    return reading.run(model, inputs)[0]


def whole(model: nn.Module, inputs: Any, sites: Sequence[str], most: int | None = None) -> Reading:
    """Return a reading of all columns at sites, or of the `most` that vary most over the inputs,
    in units of their site's mean square.
    """
    found, last = read_sites(model, inputs, sites), last_positions(inputs)
    values = {site: _at(found[site].value, last).float() for site in sites}
    if most is None or most >= sum(value.shape[1] for value in values.values()):
        return Reading({site: tuple(range(value.shape[1])) for site, value in values.items()})
    spread = [
        (float(entry), site, column)
        for site, value in values.items()
        for column, entry in enumerate(value.var(0, correction=0) / value.square().mean())
    ]
    spread.sort(key=lambda entry: -entry[0])
    chosen = spread[:most]
    return Reading(
        {site: tuple(sorted(column for _, at, column in chosen if at == site)) for site in sites}
    )


def reading_of(entry: Any, where: str) -> Reading:
    """Return a reading from its JSON; InputError, with the place, when it is malformed."""
    sites = entry.get("sites") if isinstance(entry, dict) else None
    good = isinstance(sites, dict) and all(
        isinstance(columns, list) and all(type(column) is int for column in columns)
        for columns in sites.values()
    )
    if not good or type(entry.get("logits")) is not bool:
        raise InputError(f"{where}: a reading needs sites with lists of columns, and logits")
    assert sites is not None
    return Reading({site: tuple(columns) for site, columns in sites.items()}, entry["logits"])


def last_positions(inputs: Any) -> Tensor | None:
    """Return the last position of every input with attention mask 1; None without a mask."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    if not bool(mask.bool().any(1).all()):
        raise InputError("an input has no token: its attention mask is zero everywhere")
    return mask.shape[1] - 1 - mask.bool().long().flip(1).argmax(1)


def input_keys(inputs: Any) -> tuple[str, ...]:
    """Return the digest of every input: of its tokens without padding on the right where there are
    tokens and a mask alone, or of all that is given, with its names and shapes.
    """
    if isinstance(inputs, Mapping) and isinstance(inputs.get("input_ids"), Tensor):
        ids, mask = inputs["input_ids"].cpu().long(), inputs.get("attention_mask")
        kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu().bool()
        # Padding on the left or inside moves tokens to other positions: another input.
        right = kept.ndim == 2 and bool((kept[:, :-1] | ~kept[:, 1:]).all())
        if right and set(inputs) <= {"input_ids", "attention_mask"}:
            return tuple(
                hashlib.sha256(row[real].numpy().tobytes()).hexdigest()
                for row, real in zip(ids, kept, strict=True)
            )
    named = dict(sorted(inputs.items())) if isinstance(inputs, Mapping) else inputs
    every, structure = tree_flatten(named)
    leaves = [leaf for leaf in every if isinstance(leaf, Tensor) and leaf.ndim]
    rest = [leaf.tolist() if isinstance(leaf, Tensor) else leaf for leaf in every
            if not (isinstance(leaf, Tensor) and leaf.ndim)]  # fmt: skip
    rows = [leaf.flatten(1) if leaf.ndim > 1 else leaf[:, None] for leaf in leaves]
    found = digests(torch.cat([row.double() for row in rows], 1))
    if isinstance(inputs, Tensor) and inputs.ndim == 2:
        return found
    said = f"{structure} {[tuple(leaf.shape[1:]) for leaf in leaves]} {rest}"
    return tuple(hashlib.sha256((said + key).encode()).hexdigest() for key in found)


def _at(value: Tensor, last: Tensor | None) -> Tensor:
    """Return the values (inputs, columns) at the last position."""
    if value.ndim == 2:
        return value
    if value.ndim != 3:
        raise InputError(
            f"a feature's site must be (inputs, columns) or (inputs, positions, columns), got"
            f" {tuple(value.shape)}"
        )
    rows = torch.arange(len(value), device=value.device)
    return value[:, -1] if last is None else value[rows, last.to(value.device)]


def _logits(output: Any) -> Tensor:
    found = getattr(output, "logits", output)
    found = found[0] if isinstance(found, tuple) else found
    if not isinstance(found, Tensor):
        raise InputError(f"the model's output must be logits, got {type(found).__name__}")
    return found
