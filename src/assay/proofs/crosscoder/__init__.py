"""Proofs made of crosscoder features: margins of a residual ReLU network, bounded feature by
feature."""
