"""Graphs of any function from its trace."""

from assay.bounds.trace.record import Program, record
from assay.bounds.trace.traced import Traced, trace

__all__ = ["Program", "Traced", "record", "trace"]
