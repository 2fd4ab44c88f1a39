"""How right the cheap scores of a language model's nodes are, and whether their error bars keep
their promise.

Run with `python benchmarks/error_bars.py [RUN]`, RUN being a folder of `assay run
agreement-attribution` (trained when absent, in about two minutes). Prints agreement of attribution
patching and integrated gradients with exact patching of single heads, MLPs and residual nodes, and
the coverage and width of the bars over random resplits of the inputs into tuning, calibration and
held-out folds."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np

from assay.attribution import Gradient, IntegratedGradients
from assay.audit import Audit
from assay.studies import runner
from assay.studies.attribution.study import load


def measure(audit: Audit, resplits: int) -> dict[str, float]:
    """Return mean coverage, its standard error over resplits, the nominal coverage, and the
    width against a constant first-order bar.
    """
    again = [audit.at_level(audit.bars.alpha, seed=seed) for seed in range(resplits)]
    coverage = np.array([entry.coverage for entry in again])
    points = [count for entry in again for count in entry.bars.points.values()]
    alpha = audit.bars.alpha
    nominal = float(np.mean([math.ceil(round((n + 1) * (1 - alpha), 9)) / (n + 1) for n in points]))
    return {
        "coverage": float(coverage.mean()),
        "error": float(coverage.std(ddof=1) / math.sqrt(resplits)),
        "nominal": nominal,
        "width_ratio": float(
            np.mean([entry.width for entry in again])
            / np.mean([entry.constant_width for entry in again])
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", default="runs/agreement-attribution")
    parser.add_argument("--resplits", type=int, default=300)
    parser.add_argument("--exact", type=int, default=60)
    words = parser.parse_args()
    folder = Path(words.run)
    if not (folder / "summary.json").exists():
        runner.execute(runner.load("agreement-attribution"), folder, resume=folder.exists())
    mechanisms = load(runner.runs.opened(folder))
    print(
        f"{len(mechanisms.batch)} pairs, {words.exact} exactly patched nodes each, {words.resplits}"
        " resplits"
    )
    print(
        f"{'method':<22}{'r':>8}{'slope':>8}{'coverage':>10}{'+- 3 se':>9}"
        f"{'nominal':>9}{'width ratio':>13}{'CPU s':>8}"
    )
    first = Gradient().scores(mechanisms)
    for method in (Gradient(), IntegratedGradients()):
        began = time.process_time()
        scores = first if isinstance(method, Gradient) else method.scores(mechanisms)
        audit = scores.audit(exact=words.exact, against=None if scores is first else first)
        spent = time.process_time() - began
        found = measure(audit, words.resplits)
        print(
            f"{method.name:<22}{audit.pooled.pearson:8.4f}{audit.pooled.slope:8.3f}"
            f"{found['coverage']:10.4f}{3 * found['error']:9.4f}"
            f"{found['nominal']:9.4f}{found['width_ratio']:13.3f}{spent:8.2f}"
        )


if __name__ == "__main__":
    main()
