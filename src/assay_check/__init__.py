"""An independent checker of certificates: it needs numpy and python-flint alone, and believes
nothing but the weights.
"""

from pathlib import Path

from assay_check.envelope import Verdict, read
from assay_check.reading import InputError
from assay_check.tasks import TASKS

__all__ = ["InputError", "Verdict", "check"]


def check(certificate: Path | str, weights: Path | str | None = None) -> Verdict:
    """Recompute what a certificate claims from the weights, believing neither advice nor
    digests; InputError or OSError for bad files.

    Certificates of gates hold their network's graph; weights, where given, are compared with it."""
    envelope = read(Path(certificate), TASKS)
    data = None if weights is None else Path(weights).read_bytes()
    return TASKS[envelope.task].check(envelope, data)
