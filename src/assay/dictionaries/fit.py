"""Whether a dictionary fits the values at its site, and where it does not, what most likely went
wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.dictionaries.base import DictionarySet, Placed
from assay.dictionaries.load import name_of
from assay.dictionaries.readings import explained_variance, likely_cause
from assay.errors import InputError
from assay.io.files import require_finite

_DOUBTFUL = 0.5
"""Below this explained variance other readings are tried."""
_CONVINCING = 0.3
"""The explained variance from which on a reading is named."""


@dataclass(frozen=True)
class Fit:
    """How a dictionary fits a batch of values.

    `explained_variance` is `1 - sum ||y - yhat||^2 / sum ||y - mean||^2` over the `positions`,
    `active` the mean number of active features per position, `silent` the share of features that
    are active at none. `warning` says what would explain more, None where nothing was found."""

    name: str
    positions: int
    explained_variance: float
    active: float
    silent: float
    warning: str | None = None


def check_fit(
    dictionaries: Placed | DictionarySet, values: Tensor | Mapping[str, Tensor]
) -> dict[str, Fit]:
    """Check dictionaries on values at their sites, (*positions, width) by site, or the value itself
    where one autoencoder is checked; return a fit per dictionary.

    What dictionaries that write at several sites rebuild at a site is summed first, so that the
    layers of a cross-layer transcoder are checked together; each has the worst of its sites.
    Where features explain less than half, other readings of the file are tried: another scale, a
    bias that is subtracted or not, a transposed encoder, normalised or centred values, and the
    first position left out. Raises InputError, with the reading that explains most, when the
    explained variance is below 0 or no feature is active, and for values of another width."""
    if isinstance(dictionaries, Placed):
        dictionaries = {name_of(dictionaries.reads, dictionaries.writes): dictionaries}
    if isinstance(values, Tensor):
        sites = {site for placed in dictionaries.values() for site in _sites(placed)}
        if len(sites) > 1:
            raise InputError(f"values must be given by site, for {', '.join(sorted(sites))}")
        values = dict.fromkeys(sites, values)
    # A set may read its files each time: no pass over it holds more than one dictionary.
    writes: dict[str, tuple[str, ...]] = {}
    for name, placed in dictionaries.items():
        _require_values(name, placed, values)
        writes[name] = () if placed.reads in placed.writes else placed.writes
    crossed = {site for several in writes.values() if len(several) > 1 for site in several}
    shares: dict[str, Tensor] = {}
    for name in (name for name, several in writes.items() if crossed.intersection(several)):
        _add_shares(shares, dictionaries[name], values)
    return {
        name: _check(name, placed, values, shares if crossed.intersection(writes[name]) else {})
        for name, placed in dictionaries.items()
    }


def _sites(placed: Placed) -> tuple[str, ...]:
    return (placed.reads, *placed.writes)


def _require_values(name: str, placed: Placed, values: Mapping[str, Tensor]) -> None:
    for site, width, does in (
        (placed.reads, placed.dictionary.d_in, "reads"),
        *((site, placed.width, "writes") for site in placed.writes),
    ):
        if site not in values:
            raise InputError(f"values at {site!r} are needed to check the dictionary {name!r}")
        value = values[site]
        if value.ndim < 2 or not value.numel():
            raise InputError(f"values at {site!r} must be (positions, width), got none")
        if value.shape[-1] != width:
            raise InputError(
                f"the dictionary {name!r} {does} values of width {width}, and those at {site!r}"
                f" have width {value.shape[-1]}: it was trained on another model or site"
            )
        require_finite(value, f"the values at {site!r}")


@torch.no_grad()
def _add_shares(shares: dict[str, Tensor], placed: Placed, values: Mapping[str, Tensor]) -> None:
    """Add what a dictionary rebuilds at each site to what others rebuild there."""
    rebuilt = placed.dictionary(_read(placed, values))
    for site, share in zip(placed.writes, rebuilt.split(placed.width, -1), strict=True):
        shares[site] = shares[site] + share if site in shares else share


def _read(placed: Placed, values: Mapping[str, Tensor]) -> Tensor:
    return values[placed.reads].to(placed.dictionary.W_dec)


@torch.no_grad()
def _check(
    name: str, placed: Placed, values: Mapping[str, Tensor], shares: Mapping[str, Tensor]
) -> Fit:
    x = _read(placed, values)
    active = placed.dictionary.encode(x) != 0
    if shares:
        explained = min(explained_variance(values[site], shares[site]) for site in placed.writes)
    else:
        explained = explained_variance(values[placed.writes[0]], placed.dictionary(x))
    dead = not bool(active.any())
    cause, best = None, explained
    if (explained < _DOUBTFUL or dead) and not shares:
        cause, best = likely_cause(placed, x, values[placed.writes[0]])
    told = cause is not None and best > max(_CONVINCING, explained + 0.1)
    reading = f"{cause} (explained variance {best:.3f})" if told else None
    if explained < 0 or dead:
        failing = (
            f"no feature is active at {active[..., 0].numel()} positions"
            if dead
            else f"the explained variance is {explained:.3g}"
        )
        raise InputError(
            f"the dictionary {name!r} does not fit the values at its site: {failing}."
            f" {reading or 'Most likely it was trained at another hook point or on another model'}"
        )
    flat = active.reshape(-1, active.shape[-1])
    return Fit(
        name,
        len(flat),
        explained,
        float(flat.sum(-1).double().mean()),
        float((~flat.any(0)).double().mean()),
        reading,
    )
