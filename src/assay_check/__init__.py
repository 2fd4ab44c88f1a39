"""An independent checker of certificates: it needs numpy and python-flint alone, and believes
nothing but the weights.
"""

from pathlib import Path

from assay_check.envelope import Verdict, read
from assay_check.reading import InputError
from assay_check.tasks import TASKS

__all__ = ["InputError", "Verdict", "check"]


def check(certificate: Path | str, weights: Path | str) -> Verdict:
    """Recompute what a certificate claims from the weights, believing neither advice nor
    digests; InputError or OSError for bad files.
    """
    envelope = read(Path(certificate), TASKS)
    return TASKS[envelope.task].check(envelope, Path(weights).read_bytes())
