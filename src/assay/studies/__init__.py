"""Recipes: YAML configs of complete runs, and the studies that carry them out."""
