"""Slices of a batch whose working arrays, one state per channel, fit a memory budget."""

from __future__ import annotations

from collections.abc import Iterator

from assay.errors import InputError
from assay.mechanisms.channels.clean import Clean

# Small enough for the caches and for the allocator to reuse its buffers: larger budgets measure
# slower.
BUDGET = 24 * 2**20


def chunk_examples(clean: Clean, budget: int) -> Iterator[slice]:
    """Yield slices of examples; `budget` is in bytes.

    Raises InputError when the budget does not hold one example.
    """
    width, hidden, blocks = clean.weights.width, clean.weights.hidden, len(clean.weights.layers)
    entries = 3 * hidden * hidden + 5 * hidden * width + (2 * blocks + 2) * width * width
    each = entries * clean.positions * clean.weights.head.element_size()
    if each > budget:
        raise InputError(
            f"budget of {budget} bytes does not hold one example, which takes {each}; raise it"
        )
    for start in range(0, len(clean.labels), budget // each):
        yield slice(start, start + budget // each)
