"""Whether to estimate at all: where patching every part exactly costs less than an estimate with
its audit, the exact effects are the answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from assay.attribution.exact import Exact
from assay.attribution.method import Method
from assay.core.mechanisms import Mechanisms
from assay.core.values import data


@dataclass(frozen=True)
class Choice:
    """What a probe on one input says: CPU seconds per input of ablating all of its `parts` active
    parts, of the estimate, and of the `ablations` that its audit needs.
    """

    estimate: str
    parts: int
    ablations: int
    exact_seconds: float
    estimate_seconds: float
    audit_seconds: float

    @property
    def exact(self) -> bool:
        """Whether exact effects of everything cost no more than the estimate with its audit."""
        return self.exact_seconds <= self.estimate_seconds + self.audit_seconds

    @property
    def taken(self) -> str:
        return Exact.name if self.exact else self.estimate

    @property
    def reason(self) -> str:
        """The decision in words."""
        cost = (
            f"on one input, ablating all {self.parts} active parts takes"
            f" {self.exact_seconds:.3g} CPU s, and {self.estimate} with an audit of"
            f" {self.ablations} ablations {self.estimate_seconds + self.audit_seconds:.3g} CPU s"
        )
        if self.exact:
            return f"{cost}: the exact effects are shown, and {self.estimate} is not computed"
        return f"{cost}: {self.estimate} is shown, with its audit"

    def to_dict(self) -> dict[str, Any]:
        return {"taken": self.taken, "reason": self.reason, **asdict(self)}


def choose_method(mechanisms: Mechanisms, estimate: Method, *, exact: int = 64) -> Choice:
    """Time both ways on the first input and return which is cheaper: exact ablation of every part,
    or the estimate with an audit of `exact` ablations.

    Each is run twice, and the second run counts: the first also pays for what is set up once. The
    times are measured, so a close decision can differ from run to run: keep it with the results.
    """
    one = mechanisms.take(slice(0, 1))
    norms = one.norms()
    parts = sum(int((data(norm) > 0).sum()) for norm in norms.values())
    exact_seconds = _seconds(one, lambda: Exact().scores(one))
    estimate_seconds = _seconds(one, lambda: estimate.scores(one))
    ablations = min(exact, parts)
    return Choice(
        estimate.name,
        parts,
        ablations,
        exact_seconds,
        estimate_seconds,
        exact_seconds * ablations / max(parts, 1),
    )


def _seconds(mechanisms: Mechanisms, work: Callable[[], object]) -> float:
    cuda = mechanisms.target.device.type == "cuda"

    def now() -> float:
        if not cuda:
            return time.process_time()
        torch.cuda.synchronize(mechanisms.target.device)
        return time.perf_counter()

    work()
    began = now()
    work()
    return now() - began
