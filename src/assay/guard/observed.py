"""What a network did on some inputs: the features that a guard reads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.core.mechanisms import Mechanisms
from assay.core.values import dense
from assay.errors import InputError


@dataclass(frozen=True)
class Observed:
    """Features of inputs (inputs, features) by name, the network's logits (inputs, classes) or
    None, and a digest of every input.

    The values may hold NaN: a guard rejects such inputs. Without `keys` an input is known by its
    feature values. Raises InputError for values of another shape, names that do not fit or repeat,
    and logits or keys of another number of inputs."""

    values: Float[Tensor, "inputs features"]
    names: tuple[str, ...]
    logits: Float[Tensor, "inputs classes"] | None = None
    keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or not self.values.shape[1]:
            raise InputError(
                "features must be (inputs, features) with at least one feature, got shape"
                f" {tuple(self.values.shape)}"
            )
        if len(self.names) != self.values.shape[1] or len(set(self.names)) < len(self.names):
            raise InputError(
                f"{len(self.names)} names, {len(set(self.names))} of them distinct, for"
                f" {self.values.shape[1]} features; one name per feature is needed"
            )
        if self.logits is not None and (
            self.logits.ndim != 2 or len(self.logits) != len(self.values)
        ):
            raise InputError(
                f"logits must be ({len(self.values)}, classes), got {tuple(self.logits.shape)}"
            )
        if not self.keys:
            object.__setattr__(self, "keys", digests(self.values))
        if len(self.keys) != len(self.values):
            raise InputError(f"{len(self.keys)} keys for {len(self.values)} inputs")

    def __len__(self) -> int:
        return len(self.values)

    @property
    def finite(self) -> Tensor:
        """Where all features and logits of an input are finite, (inputs,)."""
        found = torch.isfinite(self.values).all(1)
        return found if self.logits is None else found & torch.isfinite(self.logits).all(1)

    def take(self, index: Tensor | slice) -> Observed:
        """Return some of the inputs."""
        places = torch.arange(len(self))[index].tolist()
        return replace(
            self,
            values=self.values[index],
            logits=None if self.logits is None else self.logits[index],
            keys=tuple(self.keys[place] for place in places),
        )

    def columns(self, index: Sequence[int]) -> Observed:
        """Return some of the features."""
        names = tuple(self.names[place] for place in index)
        return replace(self, values=self.values[:, list(index)], names=names)


def digests(rows: Tensor) -> tuple[str, ...]:
    """Return the SHA-256 of every row's bytes, (inputs, ...), zeros of either sign alike."""
    plain = (rows.detach().flatten(1) + 0).contiguous().cpu()
    return tuple(hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in plain)


def concatenate(parts: Sequence[Observed]) -> Observed:
    """Return the inputs of several observations of the same features."""
    first = parts[0]
    logits = None
    if first.logits is not None:
        logits = torch.cat([part.logits for part in parts if part.logits is not None])
    keys = tuple(key for part in parts for key in part.keys)
    return Observed(torch.cat([part.values for part in parts]), first.names, logits, keys)


def split(data: Observed, shares: Sequence[float], seed: int = 0) -> list[Observed]:
    """Return disjoint random parts of the distinct inputs, in the given shares (they sum to at
    most one).

    Raises InputError when a part would be empty."""
    first: dict[str, int] = {}
    for place, key in enumerate(data.keys):
        first.setdefault(key, place)
    places = torch.tensor(list(first.values()))
    order = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))]
    ends = [round(sum(shares[: end + 1]) * len(order)) for end in range(len(shares))]
    parts = [order[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    for part, share in zip(parts, shares, strict=True):
        if not len(part):
            raise InputError(
                f"{len(order)} distinct inputs leave none for a share of {share:g}; give more"
            )
    return [data.take(part) for part in parts]


def of_mechanisms(
    mechanisms: Mechanisms,
    logits: Tensor | None = None,
    *,
    keys: Sequence[str] = (),
) -> Observed:
    """Return the norm of every part of bound mechanisms as a feature, whatever the kind; see
    `Mechanisms.norms`.
    """
    columns, names = [], []
    for group, values in mechanisms.norms().items():
        rows = dense(values)
        columns.append(rows.reshape(len(rows), -1).float())
        shape = rows.shape[1:]
        places = torch.cartesian_prod(*[torch.arange(size) for size in shape]) if shape else None
        index: list[tuple[int, ...]] = [()]
        if places is not None:
            index = [tuple(row) for row in places.reshape(-1, len(shape)).tolist()]
        names += [mechanisms.describe(group, place) for place in index]
    return Observed(torch.cat(columns, 1), tuple(names), logits, tuple(keys))


def classes_of(logits: Tensor, most: int = 64) -> Int[Tensor, " classes"]:
    """Return the predicted classes that occur, the most frequent `most` of them, as the values of a
    latent root.
    """
    found, counts = logits.argmax(1).unique(return_counts=True)
    return found[counts.argsort(descending=True, stable=True)[:most]].sort().values
