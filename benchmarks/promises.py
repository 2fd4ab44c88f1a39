"""Every statistical promise of the product, nominal beside measured.

Run with `python benchmarks/promises.py [--repetitions 200] [--inputs 200] [--only NAME]`. A
population of 1,500 pairs is scored and patched exactly, once for each target: agreement models of
two and four layers, trained when absent, on pairs that act at one position and at four. In each
repetition some of the pairs are drawn at random and audited, 64 ablations a pair, and each promise
is held against the pairs that were not drawn, or against the whole population. A measured value
that falls short of nominal by more than three standard errors is marked with a star; a promise of
"at least" may be exceeded. The number of directions is measured by
`benchmarks/number_of_directions.py`, which this script runs last (six CPU seconds a repetition)."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import torch

from assay import Exact, IntegratedGradients, attribute, nodes
from assay.audit.bars import Bars
from assay.audit.calibration import Ablated, calibrate, folds, reaches
from assay.audit.held_out import BY_EXACT, held_out
from assay.audit.means import mean_effects
from assay.audit.population import Population, population
from assay.audit.risk import calibrate_risk
from assay.audit.sampling import design
from assay.audit.selections import select
from assay.audit.totals import top_recall, totals
from assay.core.target import Target
from assay.io.prompts import encode_pairs
from assay.io.runs import Run
from assay.learn.language import AgreementTraining, train_agreement_model
from assay.targets.agreement import agreement_pairs
from assay.targets.language import load_language_model
from assay.targets.metrics import logit_difference, pair_batch

ALPHA, EXACT, TOP = 0.1, 64, 20
TARGETS = {
    "2 layers, 1 position": (2, "within_rc"),
    "2 layers, 4 positions": (2, "nounpp"),
    "4 layers, 1 position": (4, "within_rc"),
    "4 layers, 4 positions": (4, "nounpp"),
}
SITES = ("attn.hook_z", "hook_mlp_out", "hook_resid_post")


@dataclass
class Tally:
    """Hits and trials of one promise, a pair per repetition."""

    nominal: float
    most: bool = False
    hits: list[float] = field(default_factory=list)
    trials: list[float] = field(default_factory=list)

    def add(self, hits: float, trials: float) -> None:
        self.hits.append(hits)
        self.trials.append(trials)

    def line(self) -> str:
        hits, trials = np.array(self.hits), np.array(self.trials)
        share = hits.sum() / trials.sum()
        surplus = hits - share * trials
        error = surplus.std(ddof=1) * math.sqrt(len(hits)) / trials.sum()
        short = share - self.nominal if self.most else self.nominal - share
        sign = "<=" if self.most else ">="
        star = "*" if short > 3 * error + 1e-12 else ""
        return f"{sign} {self.nominal:.2f}   {share:.3f} +- {3 * error:.3f}{star}"


@dataclass(frozen=True)
class Whole:
    """All pairs of one target: their parts as one method scores them, with exact effects."""

    parts: Population
    exact: np.ndarray


def whole(folder: Path, layers: int, construction: str, pairs: int) -> dict[str, Whole]:
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
    found = {}
    for name, scores in (("gradient", first), ("ig", integrated)):
        parts = population(scores, {"disagreement": gap} if name == "ig" else None)
        found[name] = Whole(parts, parts.column(exact.values))
    return found


def some(parts: Population, chosen: np.ndarray) -> tuple[Population, np.ndarray]:
    """Return the parts of some examples, numbered anew, and their rows."""
    place = np.full(parts.examples, -1)
    place[chosen] = np.arange(len(chosen))
    rows = np.flatnonzero(place[parts.example] >= 0)
    cut = parts.take(rows)
    unit = np.unique(parts.unit[chosen], return_inverse=True)[1]
    return replace(cut, example=place[cut.example], unit=unit), rows


def repetition(every: Whole, inputs: int, seed: int, tallies: Callable[..., Tally]) -> None:
    """Draw inputs, audit them, and hold every promise against the others."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(every.parts.examples)
    parts, rows = some(every.parts, order[:inputs])
    new, new_rows = some(every.parts, order[inputs:])
    exact, fold = every.exact[rows], folds(parts, seed)
    chosen = select(parts, fold == 0, TOP)
    plan = design(parts, chosen, EXACT)
    drawn = plan.draw(parts, generator)
    ablated = Ablated(parts, plan, drawn, exact[drawn])
    bars = calibrate(ablated, fold, chosen, ALPHA)
    missed = bars_on_new(bars, new, every.exact[new_rows], tallies)
    own_interval(ablated, bars, fold, missed, tallies)
    means(every, parts, exact, ablated, fold, tallies)
    whole_audit = SimpleNamespace(
        parts=parts,
        ablated=ablated,
        bars=SimpleNamespace(alpha=ALPHA),
        table=pl.DataFrame(
            {
                "estimate": parts.score[drawn],
                "exact": ablated.exact,
                "inclusion": ablated.inclusion,
            }
        ),
    )
    sums(every, whole_audit, tallies)
    risk(every, rows, new_rows, parts, seed, tallies)


def bars_on_new(
    bars: Bars, new: Population, exact: np.ndarray, tallies: Callable[..., Tally]
) -> float:
    """Count the bars of new inputs that hold, by selection; return the share of all that do."""
    plan = design(new, bars.selections, EXACT)
    masks = bars.masks(new)
    half = bars.half_widths(new, reaches(new, plan, masks))
    right = np.abs(exact - new.score) <= half
    masks["all"] = np.ones(len(new), dtype=bool)
    masks[BY_EXACT] = np.abs(exact) >= np.quantile(np.abs(exact), 0.95)
    for name, mask in masks.items():
        said = "each site" if name.startswith("site ") else name
        said = "largest tenth of a site" if name.startswith("top of ") else said
        nominal = 0.85 if name == BY_EXACT else 1 - ALPHA
        tallies(f"bars: {said}", nominal, part=name).add(right[mask].sum(), mask.sum())
    for name in bars.together:
        wide = bars.together_half_widths(new, name)
        inside = bars.selections.masks(new)[name]
        broken = np.unique(new.example[inside & (np.abs(exact - new.score) > wide)])
        count = len(np.unique(new.example[inside]))
        tallies(f"bars at once: {name}", 1 - ALPHA).add(count - len(broken), count)
    return float(right.mean())


def own_interval(
    ablated: Ablated, bars: Bars, fold: np.ndarray, truth: float, tallies: Callable[..., Tally]
) -> None:
    """The interval of the measured coverage against the coverage on new inputs."""
    found = held_out(ablated, bars, fold == 2)[1]["all"]
    if found.low is not None and found.high is not None:
        tallies("interval of the coverage", 0.95).add(found.low <= truth <= found.high, 1)


def means(
    every: Whole,
    parts: Population,
    exact: np.ndarray,
    ablated: Ablated,
    fold: np.ndarray,
    tallies: Callable[..., Tally],
) -> None:
    """Intervals of the means of listed parts, exact and prediction-powered."""
    known = SimpleNamespace(of=lambda _, rows: exact[rows])
    sample = (ablated.rows, ablated.exact, ablated.inclusion)
    totals_of_parts = np.bincount(every.parts.part, weights=every.exact) / every.parts.examples
    for name, options in (
        ("means, listed parts patched", {}),
        ("means, prediction-powered", {"exact": False, "sampled": sample}),
    ):
        table = mean_effects(parts, 2 * TOP, known, fold == 0, ALPHA, **options)  # type: ignore[arg-type]
        hits = 0
        for row in table.iter_rows(named=True):
            truth = totals_of_parts[number(every.parts, row["group"], row["index"])]
            hits += row["low"] <= truth <= row["high"]
        tallies(name, 1 - ALPHA).add(hits, table.height)


def number(parts: Population, group: str, index: list[int]) -> int:
    """Return the number of a part in a population."""
    axes = parts.mechanisms.group(group).axes
    place = int(np.ravel_multi_index(tuple(index), axes))
    rows = parts.rows_of(group)
    return int(parts.part[rows[parts.place[rows] == place][0]])


def sums(every: Whole, audit: Any, tallies: Callable[..., Tally]) -> None:
    """Intervals of totals and of recall."""
    found = totals(audit, ALPHA)
    for code, name in enumerate(every.parts.names):
        truth = every.exact[every.parts.group == code].sum() / every.parts.examples
        tallies("totals, each site", 1 - ALPHA, part=name).add(found[name].covers(truth), 1)
    truth = every.exact.sum() / every.parts.examples
    tallies("totals, all", 1 - ALPHA).add(found["all"].covers(truth), 1)
    k = 5
    size = np.abs(every.parts.score)
    level = np.zeros(every.parts.examples)
    rows = every.parts.rank == k - 1
    level[every.parts.example[rows]] = size[rows] * (1 - 1e-9)
    large = np.abs(every.exact) >= level[every.parts.example]
    ratio = (large & (every.parts.rank < k)).sum() / large.sum()
    tallies("recall of the 5 largest", 1 - ALPHA).add(top_recall(audit, k, ALPHA).covers(ratio), 1)


def risk(
    every: Whole,
    rows: np.ndarray,
    new_rows: np.ndarray,
    parts: Population,
    seed: int,
    tallies: Callable[..., Tally],
) -> None:
    """Thresholds on 1 / |score| below which relative errors stay under a half."""
    doubt = 1 / np.maximum(np.abs(every.parts.score), 1e-300)
    wrong = np.abs(every.exact - every.parts.score) / np.maximum(np.abs(every.exact), 1e-300)
    options = {"tolerance": 0.5, "alpha": 0.1, "eta": 0.05, "seed": seed}
    found = calibrate_risk(doubt[rows], wrong[rows], parts.unit[parts.example], **options)  # type: ignore[arg-type]
    if found.threshold is None:
        tallies("selective risk, given a threshold", 0.05, most=True).add(0, 0)
        return
    new = new_rows[(doubt[new_rows] <= found.threshold) & (doubt[new_rows] > 0)]
    failed, example = wrong[new] > 0.5, every.parts.example[new]
    place = np.unique(example, return_inverse=True)[1]
    counts = np.bincount(place)
    each = np.bincount(place, weights=failed)
    # The share of inputs that fail, or of one row drawn at random from each input.
    share = (
        (each > 0).mean() if getattr(found, "promise", "") == "input" else (each / counts).mean()
    )
    tallies("selective risk, given a threshold", 0.05, most=True).add(share > 0.1, 1)


def directions(repetitions: int) -> Iterable[str]:
    """Run the benchmark of the number of directions and return its lines."""
    import number_of_directions as counting

    cells: dict[tuple[str, str, int], Any] = {}
    for seed in range(repetitions):
        counting.run(seed, cells)
    for (name, kind, k), cell in cells.items():
        share = cell.reached / repetitions
        error = 3 * math.sqrt(max(share * (1 - share), 1e-12) / repetitions)
        nominal = 0.95 if not cell.truth else 0.9
        star = "*" if share < nominal - error else ""
        title = f"{name}, {kind}, k = {k}"
        yield f"  {title:<70}>= {nominal:.2f}   {share:.3f} +- {error:.3f}{star}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--inputs", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=1500)
    parser.add_argument("--only", help="a word of the targets, or 'directions'")
    parser.add_argument("--models", default="runs/agreement-models")
    words = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{words.repetitions} repetitions of {words.inputs} inputs; nominal, measured +- 3 se")
    for title, (layers, construction) in TARGETS.items():
        if words.only and words.only not in title:
            continue
        for method, every in whole(Path(words.models), layers, construction, words.pairs).items():
            began, found = time.process_time(), {}

            def tallies(
                name: str,
                nominal: float,
                part: str = "",
                most: bool = False,
                found: dict[tuple[str, str], Tally] = found,
            ) -> Tally:
                return found.setdefault((name, part), Tally(nominal, most))

            for seed in range(words.repetitions):
                repetition(every, words.inputs, seed, tallies)
            spent = time.process_time() - began
            print(f"{title}, {method} ({spent / words.repetitions:.2f} CPU s a repetition)")
            for line in lines(found):
                print(line, flush=True)
    if not words.only or words.only == "directions":
        print("number of directions: intervals that reach the truth, and 'none' on noise")
        for line in directions(words.repetitions):
            print(line, flush=True)


def lines(found: dict[tuple[str, str], Tally]) -> Iterable[str]:
    """Return a line per promise; of promises made for every site the one kept worst."""
    for name in dict.fromkeys(key[0] for key in found):
        tallies = [tally for key, tally in found.items() if key[0] == name]
        known = [tally for tally in tallies if sum(tally.trials) > 0]
        if not known:
            yield f"  {name:<70}no threshold in any repetition"
            continue
        worst = min(known, key=lambda tally: sum(tally.hits) / sum(tally.trials))
        said = f"{name}, worst of {len(known)}" if len(known) > 1 else name
        yield f"  {said:<70}{worst.line()}"


if __name__ == "__main__":
    main()
