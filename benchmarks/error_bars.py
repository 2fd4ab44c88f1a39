"""Whether error bars hold where users read, beside bars that are promised for sites alone.

Run with `python benchmarks/error_bars.py [--layers 2 4] [--resplits 200] [--exact 0]`. Agreement
models of each depth are trained when absent (half a minute to a minute each). On pairs that act at
one position and at four, the bars of attribution patching and of integrated gradients are
calibrated on random folds of 300 pairs and measured on the rest. `sites` are bars that promise
coverage for each site alone: the same quantile without the further selections, and a scale without
factors by part. A coverage below nominal by more than three standard errors is marked with a star.
`--exact N` ablates N parts of every pair instead of all of them."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from assay import Exact, IntegratedGradients, Scores, attribute, nodes
from assay.audit import Audit, ExactEffects, audit
from assay.audit.calibration import calibrate, folds
from assay.audit.held_out import held_out
from assay.core.target import Target
from assay.io.prompts import read_pairs
from assay.io.runs import Run
from assay.learn.language import AgreementTraining, train_agreement_model
from assay.mechanisms.nodes import Nodes
from assay.targets.language import load_language_model
from assay.targets.metrics import logit_difference, pair_batch

POSITIONS = {"within_rc": 1, "nounpp": 4}
SITES = ("attn.hook_z", "hook_mlp_out", "hook_resid_post")
SHOWN = (
    "all",
    "worst site",
    "top 5 % by score",
    "largest",
    "listed",
    "largest, together",
    "listed, together",
    "top 5 % by exact effect",
)


def bound(folder: Path, layers: int, construction: str) -> Nodes:
    """Return the nodes of an agreement model on the held-out pairs of a construction."""
    run = Run(folder / f"agreement-{layers}")
    with run:
        train_agreement_model(run, AgreementTraining(layers=layers))
    model = load_language_model(run.path("model"))
    path = run.path(f"pairs/{construction}.jsonl")
    pairs = read_pairs(path, model.tokenizer, vocab_size=model.vocab_size)
    sites = [name for name in model.site_names() if name.split(".", 2)[-1] in SITES]
    target = Target(model.model, logit_difference)
    return nodes(target, pair_batch(pairs), pair_batch(pairs, "patch"), sites)


class Sampled(ExactEffects):
    """Exact effects that are known, of which an audit uses a sample all the same."""

    complete = False


def without_promises(found: Audit, seed: int) -> Audit:
    """Return the audit with bars that are promised for sites alone."""
    fold = folds(found.ablated.parts, seed)
    bars = calibrate(found.ablated, fold, found.selections, 0.1, by_part=False, promises=())
    return replace(found, bars=bars, promises=held_out(found.ablated, bars, fold == 2)[1])


def measured(
    scores: Scores, exact: Scores, against: Scores | None, words: argparse.Namespace
) -> None:
    kind = Sampled if words.exact else ExactEffects
    effects = kind(scores.mechanisms, everything=exact)
    began, audits = time.process_time(), []
    for seed in range(words.resplits):
        options = {"exact": words.exact or 64, "seed": seed, "against": against}
        audits.append(audit(scores, effects=effects, **options))
    spent = (time.process_time() - began) / words.resplits
    old = [without_promises(found, seed) for seed, found in enumerate(audits)]
    constant = np.mean([found.constant_width for found in audits])
    print(
        f"  {scores.method}: r {audits[0].pooled.pearson:.3f}, slope {audits[0].pooled.slope:.2f};"
        f" constant bar around the gradient {constant:.3f}; {spent:.2f} CPU s an audit"
    )
    for name in SHOWN:
        print(f"    {name:<26}{column(audits, name)}   sites{column(old, name)}")


def column(audits: list[Audit], name: str) -> str:
    """Return the mean coverage with three standard errors, and the mean width; for "worst site"
    those of the site with the least coverage.
    """
    sites = [key for key in audits[0].promises if key.startswith("site ")]
    found = [statistics(audits, key) for key in (sites if name == "worst site" else [name])]
    known = [entry for entry in found if entry is not None]
    if not known:
        return f"{'no bar':>25}"
    share, error, width = min(known)
    return f"{share:8.3f} +-{error:6.3f}{'*' if share < 0.9 - error else ' '}{width:8.3f}"


def statistics(audits: list[Audit], name: str) -> tuple[float, float, float] | None:
    """Return mean coverage, three standard errors and mean width; None without two values."""
    found = [
        (entry.share, entry.width)
        for audit in audits
        if (entry := audit.promises.get(name)) is not None and entry.share is not None
    ]
    if len(found) < 2:
        return None
    shares, widths = np.array(found, dtype=float).T
    return shares.mean(), 3 * shares.std(ddof=1) / math.sqrt(len(shares)), widths.mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--resplits", type=int, default=200)
    parser.add_argument("--exact", type=int, default=0)
    parser.add_argument("--models", default="runs/agreement-models")
    words = parser.parse_args()
    torch.set_num_threads(1)
    print(f"coverage (nominal 0.9) +- 3 standard errors over {words.resplits} resplits, width")
    for layers in words.layers:
        for construction, positions in POSITIONS.items():
            mechanisms = bound(Path(words.models), layers, construction)
            first, exact = attribute(mechanisms), attribute(mechanisms, Exact())
            print(f"{layers} layers, {positions} active position(s), {len(mechanisms.batch)} pairs")
            measured(first, exact, None, words)
            measured(attribute(mechanisms, IntegratedGradients()), exact, first, words)


if __name__ == "__main__":
    main()
