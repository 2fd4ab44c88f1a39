"""Which factors to decompose: those in which directions stand out most."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from assay.mechanisms.directions.counting import count_directions
from assay.mechanisms.directions.divergence import Divergence, divergence
from assay.mechanisms.directions.factors import (
    Factors,
    fisher_factors,
    normalise,
    other_samples,
    pair_gradients,
)
from assay.mechanisms.directions.local import Local
from assay.mechanisms.directions.power import PowerIteration
from assay.mechanisms.directions.tokens import token_gradients
from assay.progress import progress


@dataclass(frozen=True)
class Choice:
    """The factors chosen, and for every candidate the summed dominance of its clear directions
    (see `count_directions`).
    """

    name: str
    strengths: Mapping[str, float]

    @property
    def reason(self) -> str:
        """Say what was compared, in one sentence."""
        found = ", ".join(f"{name} {value:.2f}" for name, value in self.strengths.items())
        if not any(self.strengths.values()):
            return f"No factors show a clear direction; {self.name} are the default."
        return f"Directions stand out most in {self.name} (summed dominance: {found})."


def compare_factors(
    local: Local,
    measure: str | Divergence,
    k: int,
    *,
    generator: torch.Generator,
    draws: int = 8,
    budget: int = 2**29,
    samples: int = 200,
) -> tuple[Factors, Choice]:
    """Decompose Fisher factors and pair gradients on at most `samples` inputs, and return the
    factors whose clear directions have the largest summed dominance, for all inputs.

    Fisher factors show what changes the outputs most; where many parameters reach every output they
    hide circuits that share them, and gradients towards other outputs, or towards zero, show those.
    Where the Jacobian does not fit the budget, per-token gradients stand in for it. The first of
    equals is taken, Fisher factors first."""
    candidates = _candidates(local, divergence(measure), draws, budget)
    some = local
    if local.samples > samples:
        chosen = torch.randperm(local.samples, generator=generator)[:samples].sort().values
        some = local.take(chosen)
    strengths = {}
    for name, make in progress(candidates.items(), "choosing factors"):
        factors = make(some, generator)
        if len(candidates) > 1 and not bool((factors.traces() > 0).any()):
            strengths[name] = 0.0
            continue
        unit, _ = normalise(factors)
        directions, _ = PowerIteration(min(k, factors.size), steps=200).climb(unit, generator)
        counted = count_directions(unit, directions, generator=generator, refits=5, nulls=5)
        strengths[name] = counted.strength
    best = max(strengths, key=lambda name: strengths[name])
    return candidates[best](local, generator), Choice(best, strengths)


def choose_factors(
    local: Local,
    measure: str | Divergence,
    *,
    k: int = 16,
    generator: torch.Generator,
    draws: int = 8,
    budget: int = 2**29,
) -> Factors:
    """Return the factors that `compare_factors` chooses."""
    return compare_factors(local, measure, k, generator=generator, draws=draws, budget=budget)[0]


def _candidates(
    local: Local, measure: Divergence, draws: int, budget: int
) -> dict[str, Callable[[Local, torch.Generator], Factors]]:
    """Return the ways to make factors, by name; those that need two samples only where there are
    two.
    """
    with torch.no_grad():
        outputs = local.take(slice(0, 1)).output().numel() * local.samples
    dense = outputs * local.space.size * 8 <= budget
    found: dict[str, Callable[[Local, torch.Generator], Factors]] = {}
    if dense:
        found["Fisher factors"] = lambda at, _: fisher_factors(at, measure, budget=budget)
    else:
        found["Fisher factors"] = lambda at, generator: token_gradients(
            at, measure, draws=draws, generator=generator
        )
    if local.samples > 1:
        found["pair gradients towards other outputs"] = (
            (
                lambda at, generator: pair_gradients(
                    at, measure, references=draws, generator=generator, budget=budget
                )
            )
            if dense
            else (lambda at, generator: _token_pairs(at, measure, draws, generator))
        )
    if dense:
        found["pair gradients towards zero"] = lambda at, _: pair_gradients(
            at, measure, references="zero", budget=budget
        )
    return found


def _token_pairs(
    local: Local, measure: Divergence, references: int, generator: torch.Generator
) -> Factors:
    with torch.no_grad():
        output = torch.cat(
            [local.take(slice(at, at + 16)).output() for at in range(0, local.samples, 16)]
        )
    others = other_samples(local.samples, references, generator).to(output.device)
    return token_gradients(local, measure, towards=output[others])
