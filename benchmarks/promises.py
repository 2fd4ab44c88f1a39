"""Every statistical promise of the product, nominal beside measured, as Markdown tables.

Run with `python benchmarks/promises.py [--repetitions 200] [--inputs 200] [--only NAME]`; about six
CPU minutes for bars, lists, means, totals and recall. A population of 1,000 pairs is scored and
patched exactly, once for each target: agreement models of two and four layers, trained when absent,
on pairs that act at one position and at four. In each repetition 200 of the pairs are drawn at
random and audited with ablations of half of a pair's parts, 64 at most, and each promise is held
against the pairs that were not drawn, or against the whole population. A cell is the measured share
with its standard error over repetitions; a star marks one that falls short of nominal by more than
three. Of promises made for every site the one kept worst is shown.

With `--errors RUN`, a finished run of the recipe agreement-features, the promises are instead held
for the error nodes that its dictionaries leave in the residual stream, MLPs and attention, over 600
of its pairs.

Widths are beside those of single-scale bars, which promise coverage for each site alone and know no
factors by part. Selective risk is measured by `benchmarks/selective_risk.py` and the number of
directions by `benchmarks/number_of_directions.py`, which this script runs last (`--directions`: how
often, at six CPU seconds each; 0 leaves it out)."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import number_of_directions as counting
import numpy as np
import polars as pl
import selective_risk
import torch

from assay import Exact, IntegratedGradients, attribute, nodes
from assay.audit.bars import Bars
from assay.audit.calibration import Ablated, calibrate, folds, reaches
from assay.audit.held_out import BY_EXACT, held_out
from assay.audit.means import mean_effects
from assay.audit.population import Population, population
from assay.audit.sampling import design
from assay.audit.selections import select
from assay.audit.totals import top_recall, totals
from assay.core.target import Target
from assay.io.prompts import encode_pairs
from assay.io.runs import Run, opened
from assay.learn.language import AgreementTraining, train_agreement_model
from assay.studies.features.errors import KINDS
from assay.studies.features.inputs import (
    bind,
    find_dictionaries,
    kinds_of,
    load_model,
    make_batches,
    read_limited,
)
from assay.studies.runner import config_of
from assay.targets.agreement import agreement_pairs
from assay.targets.language import load_language_model
from assay.targets.metrics import logit_difference, pair_batch

ALPHA, MOST, TOP, RECALL = 0.1, 64, 20, 5
TARGETS = {
    "2 layers, 1 position": (2, "within_rc"),
    "2 layers, 4 positions": (2, "nounpp"),
    "4 layers, 1 position": (4, "within_rc"),
    "4 layers, 4 positions": (4, "nounpp"),
}
NOMINAL = f">= {1 - ALPHA:.2f}"
WORDS = {
    "largest": f"the {TOP} largest scores of an input",
    "listed": f"the {TOP} listed parts",
    BY_EXACT: f"{BY_EXACT} (no promise)",
}
SITES = ("attn.hook_z", "hook_mlp_out", "hook_resid_post")


@dataclass
class Tally:
    """Hits and trials of one promise, a pair per repetition; of bars also the widths of the finite
    ones, and the hits and widths of single-scale bars, summed over trials.
    """

    nominal: str
    hits: list[float] = field(default_factory=list)
    trials: list[float] = field(default_factory=list)
    width: float = 0.0
    infinite: int = 0
    old_hits: float = 0.0
    old_width: float = 0.0

    def add(self, hits: float, trials: float) -> None:
        self.hits.append(float(hits))
        self.trials.append(float(trials))

    @property
    def share(self) -> float:
        return sum(self.hits) / sum(self.trials)

    @property
    def short(self) -> float:
        """By how much the share falls short of nominal."""
        level = float(self.nominal.split()[-1])
        return self.share - level if self.nominal.startswith("<=") else level - self.share

    @property
    def cell(self) -> str:
        hits, trials = np.array(self.hits), np.array(self.trials)
        error = (hits - self.share * trials).std(ddof=1) * math.sqrt(len(hits)) / trials.sum()
        star = " *" if self.short > 3 * error + 1e-12 else ""
        return f"{self.share:.3f} ({error:.3f}){star}"

    @property
    def widths(self) -> str:
        count = sum(self.trials)
        old = f"{self.old_width / count:.3g}, {self.old_hits / count:.3f}"
        missing = f", {self.infinite / count:.2g} infinite" if self.infinite else ""
        return f"{self.width / (count - self.infinite):.3g}{missing} ({old})"


class Tallies(dict[tuple[str, str], Tally]):
    """The tallies of one target by promise and by the site it is made for."""

    def of(self, name: str, nominal: str = NOMINAL, site: str = "") -> Tally:
        return self.setdefault((name, site), Tally(nominal))

    def worst(self, name: str) -> Tally | None:
        """Return the tally of a promise, of the site where it is kept worst."""
        known = [tally for key, tally in self.items() if key[0] == name and sum(tally.trials)]
        return max(known, key=lambda tally: tally.short) if known else None


@dataclass(frozen=True)
class Whole:
    """All pairs of one target: their parts as one method scores them, with exact effects."""

    parts: Population
    exact: np.ndarray


def whole(folder: Path, layers: int, construction: str, pairs: int) -> Iterator[tuple[str, Whole]]:
    """Score and patch a population of pairs."""
    with Run(folder / f"agreement-{layers}") as run:
        train_agreement_model(run, AgreementTraining(layers=layers))
    model = load_language_model(run.path("model"))
    texts = agreement_pairs(construction, pairs, seed=77)  # type: ignore[arg-type]
    encoded = encode_pairs(texts, model.tokenizer, vocab_size=model.vocab_size)
    sites = [name for name in model.site_names() if name.split(".", 2)[-1] in SITES]
    target = Target(model.model, logit_difference)
    bound = nodes(target, pair_batch(encoded), pair_batch(encoded, "patch"), sites)
    first, integrated = attribute(bound), attribute(bound, IntegratedGradients())
    exact = attribute(bound, Exact())
    gap = {name: (integrated.values[name] - first.values[name]).abs() for name in first.values}
    for scores, scales in ((first, None), (integrated, {"disagreement": gap})):
        parts = population(scores, scales)
        yield scores.method, Whole(parts, parts.column(exact.values))


def errors(folder: Path, pairs: int) -> Iterator[tuple[str, str, Whole]]:
    """Score and patch the error nodes of every kind of site, of the dictionaries of a run."""
    with opened(folder) as run:
        config = config_of(run)
        config = config.model_copy(update={"data": config.data.model_copy(update={"limit": pairs})})
        model = load_model(config, run)
        target, clean, patch = make_batches(config, model, read_limited(config, run, model))
        dictionaries = find_dictionaries(config, run, model, target, clean)
    bound = bind(config, dictionaries, target, clean, patch)
    kinds = kinds_of(model, bound)
    for kind in KINDS:
        rows = kinds.filter((pl.col("part") == "error") & (pl.col("kind") == kind))
        some = bound.only(rows["group"].to_list())
        first, shares = attribute(some), attribute(some, IntegratedGradients("site"))
        gap = {name: (shares.values[name] - first.values[name]).abs() for name in first.values}
        parts = population(first, {"disagreement": gap})
        yield (
            first.method,
            f"errors, {kind}",
            Whole(parts, parts.column(attribute(some, Exact()).values)),
        )


def ablations(parts: Population) -> int:
    """Return how many parts of a pair are ablated: half of them, `MOST` at most."""
    return min(MOST, len(parts) // parts.examples // 2)


def some(parts: Population, chosen: np.ndarray) -> tuple[Population, np.ndarray]:
    """Return the parts of some examples, numbered anew, and their rows."""
    place = np.full(parts.examples, -1)
    place[chosen] = np.arange(len(chosen))
    rows = np.flatnonzero(place[parts.example] >= 0)
    cut = parts.take(rows)
    unit = np.unique(parts.unit[chosen], return_inverse=True)[1]
    return replace(cut, example=place[cut.example], unit=unit), rows


def repetition(every: Whole, inputs: int, seed: int, tallies: Tallies) -> None:
    """Draw inputs, audit them, and hold every promise against the others."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(every.parts.examples)
    parts, rows = some(every.parts, order[:inputs])
    new, new_rows = some(every.parts, order[inputs:])
    exact, fold = every.exact[rows], folds(parts, seed)
    chosen = select(parts, fold == 0, TOP)
    plan = design(parts, chosen, ablations(parts))
    drawn = plan.draw(parts, generator)
    ablated = Ablated(parts, plan, drawn, exact[drawn])
    bars = calibrate(ablated, fold, chosen, ALPHA)
    old = calibrate(ablated, fold, chosen, ALPHA, by_part=False, promises=())
    hold_bars(bars, old, new, every.exact[new_rows], tallies)
    measured = held_out(ablated, bars, fold == 2)[1]["all"]
    truth = tallies.of("bars: all parts")
    share = truth.hits[-1] / truth.trials[-1]
    if measured.low is not None and measured.high is not None:
        inside = measured.low <= share <= measured.high
        tallies.of("interval of the measured coverage", ">= 0.95").add(inside, 1)
    hold_means(every, parts, exact, ablated, fold == 0, tallies)
    hold_totals(every, ablated, tallies)


def hold_bars(bars: Bars, old: Bars, new: Population, exact: np.ndarray, tallies: Tallies) -> None:
    """Count the bars of new inputs that hold, by selection."""
    plan, error = design(new, bars.selections, ablations(new)), np.abs(exact - new.score)
    half, single = (
        entry.half_widths(new, reaches(new, plan, entry.masks(new))) for entry in (bars, old)
    )
    large = np.abs(exact) >= np.quantile(np.abs(exact), 0.95)
    masks = {"all parts": np.ones(len(new), dtype=bool), **bars.masks(new), BY_EXACT: large}
    for name, mask in masks.items():
        site = name if name.startswith(("site ", "top of ")) else ""
        said = (
            ("each site" if name.startswith("site ") else "largest tenth of a site")
            if site
            else name
        )
        tally = tallies.of(
            f"bars: {WORDS.get(said, said)}", ">= 0.85" if mask is large else NOMINAL, site
        )
        tally.add((error <= half)[mask].sum(), mask.sum())
        finite = mask & np.isfinite(half)
        tally.width += 2 * half[finite].sum()
        tally.infinite += int(mask.sum() - finite.sum())
        tally.old_hits += (error <= single)[mask].sum()
        tally.old_width += 2 * single[mask].sum()
    for name in bars.together:
        inside = bars.selections.masks(new)[name]
        broken = inside & (error > bars.together_half_widths(new, name))
        lists, lost = (len(np.unique(new.example[rows])) for rows in (inside, broken))
        tallies.of(f"bars that hold at once: {WORDS[name]}").add(lists - lost, lists)


def hold_means(
    every: Whole,
    parts: Population,
    exact: np.ndarray,
    ablated: Ablated,
    choosing: np.ndarray,
    tallies: Tallies,
) -> None:
    """Count the intervals of means of listed parts, exact and prediction-powered, that hold."""
    known = SimpleNamespace(of=lambda _, rows: exact[rows])
    sample = (ablated.rows, ablated.exact, ablated.inclusion)
    truth = {name: values.mean(0) for name, values in every.parts.values(every.exact).items()}
    for name, options in (
        (f"mean effects of {2 * TOP} listed parts, patched everywhere", {}),
        (
            f"mean effects of {2 * TOP} listed parts, from the sample",
            {"exact": False, "sampled": sample},
        ),
    ):
        table = mean_effects(parts, 2 * TOP, known, choosing, ALPHA, **options)  # type: ignore[arg-type]
        hits = 0
        table = table.drop_nulls(["low", "high"])  # what has no support has no interval
        for row in table.iter_rows(named=True):
            hits += row["low"] <= float(truth[row["group"]][tuple(row["index"])]) <= row["high"]
        tallies.of(name).add(hits, table.height)


def hold_totals(every: Whole, ablated: Ablated, tallies: Tallies) -> None:
    """Count the intervals of totals and of recall that hold."""
    audit = SimpleNamespace(parts=ablated.parts, ablated=ablated)
    parts, size = every.parts, np.abs(every.parts.score)
    for name, found in totals(audit, ALPHA).items():  # type: ignore[arg-type]
        own = slice(None) if name == "all" else parts.rows_of(name)
        if found.estimate is None:
            continue
        title, site = ("total of all parts", "") if name == "all" else ("total of each site", name)
        tallies.of(title, site=site).add(found.covers(every.exact[own].sum() / parts.examples), 1)
    if np.bincount(parts.example).min() < RECALL:
        return  # an input has no list of that many
    level = np.zeros(parts.examples)
    rows = parts.rank == RECALL - 1
    level[parts.example[rows]] = size[rows] * (1 - 1e-9)
    large = np.abs(every.exact) >= level[parts.example]
    truth = (large & (parts.rank < RECALL)).sum() / large.sum()
    recall = top_recall(audit, RECALL, ALPHA)  # type: ignore[arg-type]
    if recall.estimate is not None:
        tallies.of(f"recall of the {RECALL} largest").add(recall.covers(truth), 1)


def directions(repetitions: int) -> Iterator[str]:
    """Run the benchmark of the number of directions and return its lines."""
    cells: dict[tuple[str, str, int], counting.Cell] = {}
    for seed in range(repetitions):
        counting.run(seed, cells)
    yield "| number of directions: the interval reaches the truth | nominal | measured |"
    yield "|---|---|---|"
    for (name, kind, k), cell in cells.items():
        tally = Tally(">= 0.95" if not cell.truth else ">= 0.90")
        tally.hits = [1.0] * cell.reached + [0.0] * (repetitions - cell.reached)
        tally.trials = [1.0] * repetitions
        yield f"| {name}, {kind}, k = {k} | {tally.nominal} | {tally.cell} |"


def tables(found: dict[str, Tallies]) -> Iterator[str]:
    """Return the promises of one method over targets, and the widths of the bars."""
    names = list(dict.fromkeys(name for tallies in found.values() for name, _ in tallies))
    rows = {name: [tallies.worst(name) for tallies in found.values()] for name in names}
    yield f"| promise | nominal | {' | '.join(found)} |"
    yield "|" + "---|" * (len(found) + 2)
    for name, row in rows.items():
        nominal = next((tally.nominal for tally in row if tally is not None), "")
        yield f"| {name} | {nominal} | {' | '.join(t.cell if t else '-' for t in row)} |"
    yield ""
    yield f"| mean width (single-scale bars: width, coverage) | {' | '.join(found)} |"
    yield "|" + "---|" * (len(found) + 1)
    for name, row in rows.items():
        if name.startswith("bars: "):
            cells = " | ".join(t.widths if t else "-" for t in row)
            yield f"| {name.removeprefix('bars: ')} | {cells} |"


def populations(words: argparse.Namespace) -> Iterator[tuple[str, str, Whole]]:
    """Return every population with the method that scored it and its title."""
    if words.errors is not None:
        yield from errors(words.errors, min(words.pairs, 600))
        return
    for title, (layers, construction) in TARGETS.items():
        if words.only in title:
            for method, every in whole(Path(words.models), layers, construction, words.pairs):
                yield method, title, every


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--inputs", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--directions", type=int, default=200)
    parser.add_argument("--only", default="", help="words of a target")
    parser.add_argument("--models", default="runs/agreement-models")
    parser.add_argument("--errors", type=Path, help="a run of agreement-features")
    words = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, Tallies]] = {}
    for method, title, every in populations(words):
        tallies = found.setdefault(method, {}).setdefault(title, Tallies())
        for seed in range(words.repetitions):
            repetition(every, words.inputs, seed, tallies)
    for method, targets in found.items():
        print(f"\n{method}, {words.repetitions} repetitions of {words.inputs} inputs\n")
        print("\n".join(tables(targets)), flush=True)
    if not words.only and words.errors is None:
        print()
        for line in selective_risk.lines(words.repetitions):
            print(line, flush=True)
    if words.directions and words.errors is None:
        print()
        for line in directions(words.directions):
            print(line, flush=True)
    print(f"\n{time.process_time():.0f} CPU s")


if __name__ == "__main__":
    main()
