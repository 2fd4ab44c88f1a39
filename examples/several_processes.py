"""Exact patching of every node, with the prompts split over processes.

    python examples/several_processes.py                                  # one process
    torchrun --nproc-per-node 2 examples/several_processes.py             # two; the numbers are the
    same

Put your own model and pairs in the place of the untrained one here.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from assay import Exact, nodes, target
from assay.attribution.distributed import attribute_distributed, start
from assay.io.prompts import encode_pairs
from assay.targets.agreement import agreement_pairs, build_model, build_tokenizer
from assay.targets.metrics import logit_difference, pair_batch


def main() -> None:
    torch.set_num_threads(1)
    rank, world = start()
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), layers=2, width=32, heads=4, context=16, seed=0)
    pairs = encode_pairs(agreement_pairs("nounpp", 20, seed=0), tokenizer)
    sites = ["blocks.0.attn.hook_z", "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"]
    bound = nodes(
        target(model, logit_difference), pair_batch(pairs), pair_batch(pairs, "patch"), sites
    )
    scores = attribute_distributed(bound, Exact())
    if rank == 0:
        print(
            f"{len(pairs)} pairs over {world} process(es), {scores.cpu_seconds:.2f} CPU seconds"
            " in all"
        )
        print(scores.top(5))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
