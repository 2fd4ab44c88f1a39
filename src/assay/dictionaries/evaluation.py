"""What dictionaries rebuild, and what the network computes from it: each beside principal
components of the same rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from assay.charts.tables import notebook_html, text_table
from assay.dictionaries.base import DictionarySet, Placed
from assay.dictionaries.identity import Identity
from assay.dictionaries.moments import Moments
from assay.dictionaries.recovered import Losses, Recovered, recovered
from assay.dictionaries.splicing import Rebuild, Splice, logits_of, predicted, splice
from assay.learn.reading import Reader, Rows, chunks


@dataclass(frozen=True)
class SiteEvaluation:
    """One dictionary, or all that write at the same sites, on some windows.

    `explained` is the share of variance explained at the positions that are read,
    `explained_everywhere` with the constant first ones; `l0` the mean number of active features
    there, `dead` the share of features that are active nowhere. `loss_recovered` is
    (zero - spliced) / (zero - clean), cross-entropies in nats per token of the network with zeros,
    with what is rebuilt, and as it is; None where zeros do not raise the loss for certain (see
    `recovered`). `pca_..` are the same numbers of the first `rank` principal components, rank the
    L0 rounded up, fitted to the evaluated positions themselves, which favours them."""

    name: str
    explained: float
    explained_everywhere: float
    l0: float
    dead: float
    loss_zero: float
    loss_spliced: float
    recovered: Recovered
    rank: int
    pca_explained: float
    pca_loss_recovered: float | None

    @property
    def loss_recovered(self) -> float | None:
        return self.recovered.share

    @property
    def interval(self) -> tuple[float | None, float | None]:
        """The 95 % interval of the loss recovered."""
        return self.recovered.low, self.recovered.high


@dataclass(frozen=True)
class Evaluation:
    """Dictionaries on `positions` positions: each alone, and all spliced at once."""

    sites: tuple[SiteEvaluation, ...]
    positions: int
    loss: float
    loss_zero: float
    loss_spliced: float
    recovered: Recovered
    pca_loss_recovered: float | None

    @property
    def loss_recovered(self) -> float | None:
        return self.recovered.share

    @property
    def worst(self) -> SiteEvaluation | None:
        """The site whose dictionary recovers least of the loss, of those where that can be told."""
        known = [site for site in self.sites if site.loss_recovered is not None]
        return min(known, key=lambda site: site.loss_recovered or 0.0, default=None)

    @property
    def reasons(self) -> dict[str, str]:
        """Why the loss recovered is absent, by site."""
        return {site.name: site.recovered.reason for site in self.sites if site.recovered.reason}

    def to_polars(self) -> pl.DataFrame:
        """Return one row per site, and a last one with all of them spliced at once."""
        rows = [
            {
                "site": site.name,
                "loss recovered": site.loss_recovered,
                **_interval(site.recovered),
                "of PCA": site.pca_loss_recovered,
                "variance explained": site.explained,
                "with constant positions": site.explained_everywhere,
                "of PCA ": site.pca_explained,
                "L0": site.l0,
                "rank": site.rank,
                "dead": site.dead,
            }
            for site in self.sites
        ]
        last: dict[str, object] = {
            "site": "all at once",
            "loss recovered": self.loss_recovered,
            **_interval(self.recovered),
            "of PCA": self.pca_loss_recovered,
        }
        names = ("loss recovered", "low", "high", "of PCA")
        numbers = dict.fromkeys(names, pl.Float64)
        return pl.DataFrame([*rows, last], schema_overrides={**numbers, "rank": pl.Int64})

    def _repr_html_(self) -> str:
        return notebook_html(self.to_polars(), title=self._words())

    def __repr__(self) -> str:
        return f"{self._words()}\n{text_table(self.to_polars())}"

    def _words(self) -> str:
        return f"dictionaries on {self.positions:,} positions; {self.loss:.3f} nats per token"


def evaluate(model: nn.Module, rows: Rows, placed: DictionarySet) -> Evaluation:
    """Measure dictionaries on windows that their training did not see.

    Raises InputError for sites that the network does not have."""
    joints = splice(model, placed)
    units = _units(placed)
    count = int(rows.kept.sum())
    found = _Measured(model, rows, placed)
    clean = _loss(model, rows, lambda some: model(**some.inputs(found.device)))
    ranks = {name: math.ceil(sum(found.l0[one] for one in unit)) for name, unit in units.items()}
    principal = _principal(placed, found, units, ranks)
    # What is rebuilt there comes from elsewhere; the dictionary only marks the place.
    whole = splice(model, {site: Placed(Identity(1), site, (site,)) for site in found.moments})

    def loss(names: list[str], what: str) -> Losses:
        chosen = {name: placed[name] for name in names}
        if what == "dictionaries":
            return _spliced(joints, rows, chosen, lambda name, x: placed[name].dictionary(x))
        sites = dict.fromkeys(site for one in chosen.values() for site in one.writes)
        others = {site: whole.placed[site] for site in sites}
        maps: dict[str, Rebuild] = {
            "zero": lambda name, x: torch.zeros_like(x),
            "pca": lambda name, x: principal[name](x),
        }
        return _spliced(whole, rows, others, maps[what])

    sites = []
    for name, unit in units.items():
        written = list(dict.fromkeys(site for one in unit for site in placed[one].writes))
        zero, spliced, pca = (loss(unit, what) for what in ("zero", "dictionaries", "pca"))
        spectrum = [found.moments[site].spectrum() for site in written]
        sites.append(
            SiteEvaluation(
                name,
                _explained([found.moments[site] for site in written]),
                _explained([found.everywhere[site] for site in written]),
                sum(found.l0[one] for one in unit),
                _dead([found.fired[one] for one in unit]),
                zero.mean,
                spliced.mean,
                recovered(zero, spliced, clean),
                ranks[name],
                _kept_share(spectrum, ranks[name]),
                recovered(zero, pca, clean).share,
            )
        )
    if len(units) > 1:  # one alone is all of them
        zero, spliced, pca = (loss(list(placed), w) for w in ("zero", "dictionaries", "pca"))
    return Evaluation(
        tuple(sites),
        count,
        clean.mean,
        zero.mean,
        spliced.mean,
        recovered(zero, spliced, clean),
        recovered(zero, pca, clean).share,
    )


class _Measured:
    """What one pass over the windows gives: moments of the values and of the errors, and which
    features were active how often.
    """

    def __init__(self, model: nn.Module, rows: Rows, placed: DictionarySet) -> None:
        names = list(dict.fromkeys(s for one in placed.values() for s in (one.reads, *one.writes)))
        written = dict.fromkeys(site for one in placed.values() for site in one.writes)
        reader = Reader(model, names)
        self.device = reader.device
        self.moments = {site: Moments() for site in written}
        self.everywhere = {site: Moments() for site in written}
        self.fired: dict[str, Tensor] = {}
        active: dict[str, float] = {}
        everywhere = Rows(rows.ids, rows.mask)
        for index in chunks(everywhere):
            some = everywhere.take(index)
            values = reader(some)
            kept = rows.take(index).kept[some.kept].to(self.device)
            rebuilt: dict[str, list[Tensor]] = {}
            for name, one in placed.items():
                x = values[one.reads]
                with torch.no_grad():
                    codes = one.dictionary.encode(x)
                    out = one.dictionary.decode(codes, x)
                for site, part in zip(one.writes, out.split(one.width, dim=-1), strict=True):
                    rebuilt.setdefault(site, []).append(part)
                fires = codes[kept] != 0
                active[name] = active.get(name, 0.0) + float(fires.sum())
                before = self.fired.get(name)
                now = fires.any(0)
                self.fired[name] = now if before is None else before | now
            for site, parts in rebuilt.items():
                error = values[site] - torch.stack(parts).sum(0)
                self.moments[site].add(values[site][kept], error[kept])
                self.everywhere[site].add(values[site], error)
        count = int(rows.kept.sum())
        self.l0 = {name: total / count for name, total in active.items()}


def _units(placed: DictionarySet) -> dict[str, list[str]]:
    """Group the dictionaries that write at a common site: they are spliced together."""
    units: list[tuple[set[str], list[str]]] = []
    for name, one in placed.items():
        sites, members = set(one.writes), [name]
        for other in [unit for unit in units if unit[0] & sites]:
            units.remove(other)
            sites, members = sites | other[0], [*other[1], *members]
        units.append((sites, members))
    return {" + ".join(members): members for _, members in units}


def _principal(
    placed: DictionarySet,
    found: _Measured,
    units: Mapping[str, list[str]],
    ranks: Mapping[str, int],
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return, for every written site, the projection to its principal components."""
    maps: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, unit in units.items():
        for one in unit:
            for site in placed[one].writes:
                mean, basis = found.moments[site].principal(ranks[name])
                maps[site] = _projection(mean.to(found.device), basis.to(found.device))
    return maps


def _projection(mean: Tensor, basis: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: mean + (x - mean) @ basis @ basis.T


@torch.no_grad()
def _spliced(joints: Splice, rows: Rows, chosen: Mapping[str, Placed], rebuild: Rebuild) -> Losses:
    return _loss(joints.model, rows, lambda some: joints.run(some, rebuild, chosen=chosen))


@torch.no_grad()
def _loss(model: nn.Module, rows: Rows, run: Callable[[Rows], object]) -> Losses:
    """Return the cross-entropies of the next tokens, by window."""
    sums, counts = [], []
    for some in _runs(rows):
        logits = logits_of(run(some))[:, :-1].float()
        known = predicted(some).to(logits.device)
        labels = some.ids[:, 1:].to(logits.device)
        losses = torch.zeros(known.shape, dtype=torch.float64, device=logits.device)
        losses[known] = cross_entropy(logits[known], labels[known], reduction="none").double()
        sums.append(losses.sum(1).cpu())
        counts.append(known.sum(1).double().cpu())
    return Losses(torch.cat(sums), torch.cat(counts))


def _runs(rows: Rows) -> Iterator[Rows]:
    for index in chunks(rows):
        yield rows.take(index)


def _interval(found: Recovered) -> dict[str, float | None]:
    return {
        "low": found.low,
        "high": found.high,
        "zeros add": found.rise,
        "standard error": found.rise_error,
    }


def _explained(moments: list[Moments]) -> float:
    varied = sum(one.variation for one in moments)
    return 1 - sum(one.error for one in moments) / varied if varied > 0 else math.nan


def _kept_share(spectra: list[Float[Tensor, " width"]], rank: int) -> float:
    total = sum(float(one.sum()) for one in spectra)
    kept = sum(float(one[:rank].sum()) for one in spectra)
    return kept / total if total > 0 else math.nan


def _dead(fired: list[Tensor]) -> float:
    return 1 - float(torch.cat(fired).double().mean())
