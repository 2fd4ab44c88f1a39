"""The stops of the tour."""

from __future__ import annotations

from assay.studies.fields import Name, StudyConfig

STOPS = (
    "digits-channels",
    "agreement-attribution",
    "agreement-features",
    "max-of-k",
    "tms-directions",
    "tms-components",
    "crosscoder-proof",
    "digits-guard",
)


class Config(StudyConfig):
    stops: tuple[Name, ...] = STOPS
