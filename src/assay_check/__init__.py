"""An independent checker of certificates: it needs numpy and python-flint alone, and believes nothing but the weights."""

from assay_check.reader import InputError
from assay_check.verify import Verdict, check

__all__ = ["InputError", "Verdict", "check"]
