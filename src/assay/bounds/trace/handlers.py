"""The rule of every ATen operation, by name."""

from assay.bounds.trace import arithmetic, choices, functions, moves, norms
from assay.bounds.trace.registry import HANDLERS

__all__ = ["HANDLERS", "arithmetic", "choices", "functions", "moves", "norms"]
