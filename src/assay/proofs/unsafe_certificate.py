"""Certificates of properties that hold: the envelope and fields of `assay.proofs.gate_certificate`,
with the claim "unsafe".

An example is one box of the property. Its graph ends in the constraints of the unsafe set, of which
each conjunction (`groups`) has one above zero on every leaf of its one tree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor, nn

from assay.bounds.search.goal import Goal
from assay.bounds.search.leaves import Found
from assay.bounds.trace import Traced
from assay.proofs.gate_certificate import Evidence, write_gates
from assay.proofs.problem import Problem

Proof = tuple[Traced, Goal, Tensor, Tensor, Found]
"""What proves one box: the constraints' graph, their goal, the ends of the box and the leaves."""


def write_unsafe(
    path: Path | str, proofs: Sequence[Proof], name: str, inputs: Iterable[Path | str]
) -> Path:
    """Write the certificate of a property that holds; name: a label of property and network."""
    evidence = []
    for number, (traced, goal, low, high, found) in enumerate(proofs):
        function = traced.program.function
        ends = (low,), (high,), ((low + high) / 2,)
        problem = Problem(function, (), ("inputs",), *ends, 1.0, False, True)
        evidence.append(Evidence(number, traced, problem, (found,), found.bound, goal.groups))
    # The weights of an ONNX file are in no file that the checker reads.
    model = nn.Module()
    return write_gates(
        path,
        evidence,
        claim="unsafe",
        metric=name,
        model=model,
        examples=len(proofs),
        inputs=tuple(inputs),
    )
