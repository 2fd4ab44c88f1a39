"""Compact proofs: certified lower bounds of a network's performance over all inputs (arXiv
2406.11779).
"""
