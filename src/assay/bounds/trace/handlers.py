"""The rule of every ATen operation, by name."""

from assay.bounds.trace import arithmetic, functions, moves, norms
from assay.bounds.trace.registry import HANDLERS

__all__ = ["HANDLERS", "arithmetic", "functions", "moves", "norms"]
