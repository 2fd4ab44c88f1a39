"""Populations of scores and exact effects without a network, for the audit's statistics."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from assay.audit.calibration import Ablated
from assay.audit.population import Population
from assay.audit.sampling import design
from assay.audit.selections import Selections, select
from assay.core.parts import Group

SIZES = {"a": 12, "b": 6, "one": 1}


def mechanisms_of(inputs: int, sizes: dict[str, int]) -> SimpleNamespace:
    """Return what a population reads of mechanisms."""
    groups = {name: Group(name, ("site",), (inputs, size)) for name, size in sizes.items()}
    return SimpleNamespace(
        groups=groups, group=groups.__getitem__, describe=lambda name, place: f"{name}{place}"
    )


def of_arrays(
    score: np.ndarray,
    step: np.ndarray | None = None,
    sizes: dict[str, int] | None = None,
    unit: np.ndarray | None = None,
) -> Population:
    """Return the population of scores (inputs, parts); parts of step 0 are inactive."""
    sizes = sizes or SIZES
    inputs = len(score)
    step = np.ones_like(score) if step is None else step
    starts = np.cumsum([0, *sizes.values()])
    columns = []
    for code in range(len(sizes)):
        own = slice(starts[code], starts[code + 1])
        example, place = np.nonzero(step[:, own] > 0)
        columns.append(
            (
                example,
                np.full(len(example), code),
                place,
                score[:, own][example, place],
                step[:, own][example, place],
            )
        )
    example, group, place, scores, steps = (np.concatenate(found) for found in zip(*columns))  # noqa: B905
    return Population(
        mechanisms_of(inputs, sizes),  # type: ignore[arg-type]
        tuple(sizes),
        example,
        group,
        place,
        scores,
        {"step": steps},
        np.arange(inputs) if unit is None else unit,
    )


def column_of(parts: Population, values: np.ndarray) -> np.ndarray:
    """Return the entries of an array (inputs, parts) at the rows of a population."""
    return values[parts.example, parts.part]


def drawn(
    generator: np.random.Generator, inputs: int, sizes: dict[str, int] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return score, exact effect and step (inputs, parts): most parts do next to nothing, and
    errors grow with the effect, are heavy-tailed and shared within an input.
    """
    parts = sum((sizes or SIZES).values())
    level = generator.gamma(2.0, size=(inputs, 1))
    weight = np.geomspace(8, 0.01, parts)[generator.permutation(parts)][None]
    exact = weight * level * (1 + 0.3 * generator.standard_t(4, size=(inputs, parts)))
    difficulty = generator.gamma(2.0, size=(inputs, 1))
    score = exact * (1 - 0.3 * difficulty * np.abs(generator.standard_t(3, size=exact.shape)))
    step = (generator.random((inputs, parts)) < 0.9).astype(float)
    return score * step, exact * step, step


def sampled(
    parts: Population,
    exact: np.ndarray,
    selections: Selections,
    passes: int | None,
    generator: np.random.Generator,
) -> Ablated:
    """Return a sample of a population whose exact effects (inputs, parts) are known."""
    plan = design(parts, selections, passes)
    rows = plan.draw(parts, generator)
    return Ablated(parts, plan, rows, column_of(parts, exact)[rows])


def selected(parts: Population, fold: np.ndarray, count: int, **options: bool) -> Selections:
    return select(parts, fold == 0, count, **options)
