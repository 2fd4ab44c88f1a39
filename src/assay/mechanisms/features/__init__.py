"""Features: what dictionaries find in activations, and the error that they leave."""

from assay.mechanisms.features.bound import FeatureParts
from assay.mechanisms.features.kind import Features, features, identities

__all__ = ["FeatureParts", "Features", "features", "identities"]
