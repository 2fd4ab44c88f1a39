"""The command: verbs only. Exit codes: 0 done, 1 failed, 2 bad input."""

from assay.cli.app import app
from assay.cli.entry import main

__all__ = ["app", "main"]
