"""What the commands and configs take by name, known without loading PyTorch, so that a typo is
answered at once.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from pathlib import Path

from assay.errors import InputError, unknown
from assay.io.files import existing

_STEM = 50  # letters, at most 4 bytes each, of the 255 bytes that a name may have

TRAININGS = ("crosscoder", "dictionaries")
"""What `assay train` trains: recipes that take the user's own network."""

TASKS = ("max-of-k",)
"""What `assay prove` can prove about."""

LEVELS = ("float64", "real", "float32")
"""The arithmetics of a proof; float64 is a search and proves nothing."""

STRATEGIES = (
    *("brute_force", "union", "best", "set_exact", "box_exact", "worst_positions_ov"),
    *("worst_positions_qk", "worst_qk_residual", "worst_direct", "hybrid", "named_rivals", "cubic"),
    *("subcubic_anchored", "subcubic", "subcubic_qk_range", "subcubic_qk_subproduct"),
    *("subcubic_qk_max_diff", "subcubic_qk_svd", "subcubic_qk_recursive", "subcubic_direct"),
    *("subcubic_low_rank", "subcubic_low_rank_anchored", "subcubic_mean", "subcubic_global"),
)
"""The strategies of `assay.proofs.max_of_k`."""

METRICS = ("logit_difference", "probability", "answer_loss", "kl", "greater_than", "loss")
"""The metrics of `assay.targets.metrics`."""


def applied_table(path: Path | str) -> str:
    """Return the name of the table in which a run keeps what was applied to a file: its stem, and
    where that holds more than letters, digits, dots, dashes and underscores, or is long, what is
    left of it with a digest of the whole name.
    """
    path = Path(path)
    plain = re.sub(r"[^\w.-]", "_", path.stem)[:_STEM]
    if plain != path.stem:
        plain += f"-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]}"
    return f"verb-on-{plain}.parquet"


def require_strategy(name: str) -> None:
    """Raise InputError, with the nearest names, for an unknown strategy."""
    if name not in STRATEGIES:
        raise unknown("strategy", name, STRATEGIES)


def require_metric(name: str) -> None:
    """Raise InputError, with the nearest names, for an unknown metric."""
    if name not in METRICS:
        raise unknown("metric", name, METRICS)


def require_training(name: str) -> None:
    """Raise InputError, with the nearest names, for what is not trained on its own."""
    if name not in TRAININGS:
        raise unknown("training", name, TRAININGS)


def require_proof_level(level: str) -> None:
    """Raise InputError for a level that proves nothing."""
    if level not in ("real", "float32"):
        raise InputError(
            f"proofs.level must be real or float32 (float64 proves nothing), got {level!r}"
        )


def require_proof(task: str, weights: Path | str, strategy: str, level: str) -> None:
    """Raise InputError for an unknown task, strategy or level, and for weights that are not
    there.
    """
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    if strategy != "all":
        require_strategy(strategy)
    if level not in LEVELS:
        raise unknown("level", level, LEVELS)
    existing(weights)


def require_graph_options(
    path: Path | str, model: str | None, method: str, on: Path | None, within: float
) -> None:
    """Raise InputError where the audit of a graph's file lacks the model, or is given what belongs
    to the audit of a run.
    """
    existing(path)
    if model is None:
        raise InputError(f"{path} is a file: to audit its graph, give the model with --target")
    if method != "gradient" or on is not None:
        raise InputError("--method and --on belong to the folder of a run; a graph has neither")
    if not 0 < within < math.inf:
        raise InputError(f"--within must be above 0 and finite, got {within}")
