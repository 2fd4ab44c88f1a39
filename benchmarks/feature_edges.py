"""Edges into 200 downstream features of GPT-2 small (random weights, no download), beside a loop of
one backward pass per downstream feature, in CPU seconds.

Dictionaries stand at attention, MLP and residual stream of --layers layers. Both take the edges
from the same upstream features, on one network that is cut at every site, so that a backward pass
goes through one sublayer alone, and the loop shares the forward pass and the encoders as well. In
float32, and in float64 for how far the two are equal. One thread.
Run: python benchmarks/feature_edges.py [--nodes 200]"""

from __future__ import annotations

import argparse

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import assay
from assay.core.target import Batch, Target
from assay.dictionaries import Placed, architecture
from assay.edges import part_edges
from assay.edges.cut import Node
from assay.mechanisms.features import FeatureParts
from assay.targets.metrics import logit_difference

SIZE, ACTIVE, WIDTH, FIRST = 16_384, 32, 768, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=200)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--positions", type=int, default=16)
    parser.add_argument("--examples", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{chosen.nodes} downstream and upstream features at {3 * chosen.layers} sites with"
        f" {SIZE:,} each, {chosen.examples} x {chosen.positions} tokens"
    )
    for dtype in (torch.float32, torch.float64):
        bound, nodes = draw(chosen, dtype)
        fast = part_edges(bound, nodes)
        loop = part_edges(bound, nodes, general=True)
        none = part_edges(bound, [], nodes)  # shared: two forward passes, one backward, parts
        gap = float((fast.values - loop.values).abs().max() / loop.values.abs().max())
        ours, theirs = (found.cpu_seconds - none.cpu_seconds for found in (fast, loop))
        print(str(dtype).removeprefix("torch."))
        print(f"  shared by both                  {none.cpu_seconds:8.2f} CPU s")
        print(f"  assay                           {ours:8.2f} CPU s")
        print(f"  loop, a backward pass a feature {theirs:8.2f} CPU s")
        print(f"  ratio                           {theirs / ours:8.1f}")
        print(f"  ratio with what is shared       {loop.cpu_seconds / fast.cpu_seconds:8.1f}")
        print(f"  largest difference              {gap:8.1e} of the largest |edge|")


def draw(chosen: argparse.Namespace, dtype: torch.dtype) -> tuple[FeatureParts, list[Node]]:
    """Return random dictionaries in a random network, and the same number of the largest features
    of every site.
    """
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(attn_implementation="eager")).eval().requires_grad_(False)
    sites = [
        f"blocks.{layer}.hook_{name}"
        for layer in range(FIRST, FIRST + chosen.layers)
        for name in ("attn_out", "mlp_out", "resid_post")
    ]
    placed = {}
    for site in sites:
        dictionary = architecture("topk")(WIDTH, SIZE, k=ACTIVE)
        for parameter in dictionary.parameters():
            parameter.data.normal_(std=WIDTH**-0.5)
        placed[site] = Placed(dictionary.to(dtype), site, (site,))
    examples, positions = chosen.examples, chosen.positions
    tokens = torch.randint(50257, (2, examples, positions))
    labels = {
        "answers": torch.randint(50257, (examples, 2)),
        "last": torch.full((examples,), positions - 1),
    }
    mask = torch.ones(examples, positions, dtype=torch.long)
    clean, patch = (Batch({"input_ids": ids, "attention_mask": mask}, labels) for ids in tokens)
    bound = assay.features(Target(model.to(dtype), logit_difference), placed, clean, patch)
    scores = assay.attribute(bound)
    nodes = []
    for site in sites:
        flat = scores.values[site].to_dense().abs().mean(0)
        best = flat.flatten().topk(-(-chosen.nodes // len(sites))).indices
        nodes += [(site, (int(i) // SIZE, int(i) % SIZE)) for i in best]
    return bound, nodes[: chosen.nodes]


if __name__ == "__main__":
    main()
