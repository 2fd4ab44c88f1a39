"""Attribution graphs of single prompts: transcoder features, errors, tokens and logits, and the
direct linear effects between them.
"""

from assay.edges.prompt.build import prompt_graph
from assay.edges.prompt.graph import PromptGraph, PrunedGraph

__all__ = ["PromptGraph", "PrunedGraph", "prompt_graph"]
