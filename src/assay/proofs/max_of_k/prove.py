"""Prove a lower bound of a network's performance over all inputs, and write its certificate."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from assay.errors import InputError
from assay.progress import progress
from assay.proofs.certificate import check_destination, write
from assay.proofs.max_of_k import cells, operations
from assay.proofs.max_of_k.cells import ACCURACY, Measure
from assay.proofs.max_of_k.certificate import certify_answers, certify_cross_entropy
from assay.proofs.max_of_k.cross_entropy import STRATEGY, LossBound, bound_cross_entropy
from assay.proofs.max_of_k.strategies import STRATEGIES, brute, named
from assay.proofs.max_of_k.strategies.base import Advice, Problem, Strategy
from assay.targets import max_of_k
from assay.targets.max_of_k import Weights

_BRUTE_SEQUENCES = (
    1 << 25
)  # true accuracy is computed beside a bound up to so many sequences (about 2 s)

_PATIENCE = 300.0  # CPU seconds


@dataclass(frozen=True)
class ProofResult:
    """A certified share `count / total` of a measure, and what it cost.

    `normalised` is the bound over the true value (None where brute force is out of reach),
    `operations` those of the verifier, `unexplained` the dimensions that the proof treats as a
    black box, `seconds` the CPU time of search and verification. At level float64 nothing is
    proved: the number is what the search found."""

    strategy: str
    rule: str
    level: str
    measure: str
    count: int
    total: int
    normalised: float | None
    operations: int | None
    unexplained: int
    seconds: float

    @property
    def bound(self) -> Fraction:
        return Fraction(self.count, self.total)

    @property
    def proved(self) -> bool:
        return self.level != "float64"

    def to_json(self) -> dict[str, Any]:
        """Return plain values: counts as integers, the bound as a float and as a fraction."""
        return {
            **asdict(self),
            "bound": float(self.bound),
            "fraction": str(self.bound),
            "proved": self.proved,
        }


def prove(
    weights: Weights | Path | str,
    strategy: str = "best",
    level: str = "real",
    *,
    measure: Measure = ACCURACY,
    certificate_path: Path | str | None = None,
    exp_ulp: float = 2.0,
    count_operations: bool = True,
    normalise: bool = True,
) -> ProofResult:
    """Prove that a max-of-K network answers at least a share of all inputs right.

    `weights` is a safetensors file or loaded weights; `level` is `real` or `float32` for a proof,
    `float64` for a search alone. Raises InputError for unknown names, a measure of other sizes,
    brute force out of reach (with the estimate), and a certificate that would overwrite anything
    else than a certificate."""
    chosen, (loaded, inputs) = named(strategy), _loaded(weights)
    problem = Problem(loaded, level, exp_ulp)
    total = _total(loaded, measure)
    if certificate_path is not None:
        check_destination(certificate_path, inputs)
    began = time.process_time()
    advice = chosen.search(problem)
    count = chosen.verify(problem, advice).weigh(measure)
    seconds = time.process_time() - began
    if certificate_path is not None:
        claim = certify_answers(problem, chosen, advice, count, total, measure)
        write(certificate_path, claim, inputs)
    truth = true_count(loaded, measure) if normalise else None
    steps = replay(loaded, chosen, advice) if count_operations else None
    return ProofResult(
        chosen.name,
        chosen.rule,
        level,
        measure.name,
        count,
        total,
        count / truth if truth else None,
        steps,
        chosen.unexplained(loaded),
        seconds,
    )


def prove_all(
    weights: Weights | Path | str, level: str = "real", **settings: Any
) -> Iterator[ProofResult]:
    """Yield the result of every strategy, without those that would take more than minutes."""
    loaded, _ = _loaded(weights)
    for name in progress(STRATEGIES, "strategies"):
        if name == "brute_force":
            try:
                brute.refuse(loaded.vocabulary, loaded.positions)
            except InputError:
                continue
        if named(name).seconds(loaded) <= _PATIENCE:
            yield prove(loaded, name, level, **settings)


def search(
    weights: Weights | Path | str,
    measures: Iterable[Measure] = (ACCURACY,),
    strategies: Iterable[str] | None = None,
    level: str = "real",
) -> list[ProofResult]:
    """Return results of every measure with every strategy, ranked by bound and then by
    operations.
    """
    loaded, _ = _loaded(weights)
    names = list(STRATEGIES if strategies is None else strategies)
    results = [
        prove(loaded, name, level, measure=measure) for measure in measures for name in names
    ]
    return sorted(results, key=lambda result: (-result.bound, result.operations or 0))


def prove_cross_entropy(
    weights: Weights | Path | str,
    level: str = "real",
    *,
    certificate_path: Path | str | None = None,
    exp_ulp: float = 2.0,
) -> LossBound:
    """Prove an upper bound of the mean cross-entropy over all inputs, and write its certificate.

    Arguments as those of `prove`. Raises InputError as `prove` does, and AssayError when a margin's
    bound is too large for a loss in float64."""
    loaded, inputs = _loaded(weights)
    problem = Problem(loaded, level, exp_ulp)
    if certificate_path is not None:
        check_destination(certificate_path, inputs)
    found = bound_cross_entropy(loaded, level, exp_ulp=exp_ulp)
    if certificate_path is not None:
        write(certificate_path, certify_cross_entropy(problem, STRATEGY, found.claimed), inputs)
    return found


def _loaded(weights: Weights | Path | str) -> tuple[Weights, list[Path | str]]:
    """Return the weights, and the files that were read."""
    if isinstance(weights, Weights):
        return weights, []
    return max_of_k.load(weights), [weights]


def replay(weights: Weights, strategy: Strategy, advice: Advice) -> int:
    """Return the operations of a verifier, by replaying it on counting arrays."""
    arrays = {
        entry.name: operations.counting(getattr(weights, entry.name)) for entry in fields(weights)
    }
    problem = Problem(replace(weights, **arrays), "float64")
    return operations.count(lambda: strategy.verify(problem, advice))


def true_count(weights: Weights, measure: Measure = ACCURACY) -> int | None:
    """Return the weight of the right answers by brute force in float64, or None where that takes
    more than seconds.
    """
    if weights.vocabulary**weights.positions > _BRUTE_SEQUENCES:
        return None
    return brute.weigh(brute.table(Problem(weights, "float64").tables), measure)


def _total(weights: Weights, measure: Measure) -> int:
    measure.check(weights.vocabulary, weights.positions)
    total = cells.total(weights.vocabulary, weights.positions, measure)
    if total == 0:
        raise InputError(f"measure {measure.name!r} gives every input the weight 0")
    return total
