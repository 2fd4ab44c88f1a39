"""Exact ablation of 1,000 features of a 16,384-feature dictionary at the middle site of GPT-2 small
(random weights, no download), beside a loop of full forward passes, in CPU seconds.

The loop runs the whole model once for every feature, with a hook that subtracts its part; it is
timed on --loop features and scaled to all of them, and its effects are compared with ours. One
thread. Run: python benchmarks/feature_ablation.py [--features 1000] [--loop 40]"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import assay
from assay.attribution import ablate
from assay.core.target import Batch, Target
from assay.core.values import active_rows
from assay.dictionaries import Placed, architecture
from assay.targets.metrics import logit_difference

SITE, SIZE, ACTIVE, WIDTH = "blocks.6.hook_resid_post", 16_384, 64, 768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, default=1000)
    parser.add_argument("--loop", type=int, default=40)
    parser.add_argument("--positions", type=int, default=16)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(attn_implementation="eager")).eval().requires_grad_(False)
    dictionary = architecture("topk")(WIDTH, SIZE, k=ACTIVE)
    for parameter in dictionary.parameters():
        parameter.data.normal_(std=WIDTH**-0.5)
    tokens = torch.randint(50257, (2, 1, chosen.positions))
    labels = {
        "answers": torch.randint(50257, (1, 2)),
        "last": torch.tensor([chosen.positions - 1]),
    }
    mask = torch.ones(1, chosen.positions, dtype=torch.long)
    clean, patch = (Batch({"input_ids": ids, "attention_mask": mask}, labels) for ids in tokens)
    target = Target(model, logit_difference)
    placed = {SITE: Placed(dictionary, SITE, (SITE,))}

    began = time.process_time()
    bound = assay.features(target, placed, clean, patch)
    index, _ = active_rows(bound.norms()[SITE])
    index = index[torch.randperm(len(index))[: chosen.features]]
    effects = ablate(bound, SITE, index)[:, 0]
    ours = time.process_time() - began

    x = bound._clean["transformer.h.6"].value
    codes = dictionary.encode(x) - dictionary.encode(bound.bases["transformer.h.6"].value)
    began, found = time.process_time(), []
    with torch.no_grad():
        full = logit_difference(model(**clean.inputs), clean)
        for position, feature in index[: chosen.loop, 0].tolist():
            part = codes[0, position, feature] * dictionary.W_dec[feature]

            def remove(module, args, out, position=position, part=part):
                value = (out if isinstance(out, torch.Tensor) else out[0]).clone()
                value[0, position] -= part
                return value if isinstance(out, torch.Tensor) else (value, *out[1:])

            handle = model.transformer.h[6].register_forward_hook(remove)
            found.append(full - logit_difference(model(**clean.inputs), clean))
            handle.remove()
    loop = (time.process_time() - began) / chosen.loop * len(index)
    gap = float((torch.cat(found) - effects[: chosen.loop]).abs().max())
    print(
        f"{len(index)} features of {SIZE:,} at {SITE}, {chosen.positions} tokens; {bound.patching}"
    )
    print(f"assay, with binding          {ours:8.2f} CPU s")
    print(f"loop of full forward passes  {loop:8.2f} CPU s (from {chosen.loop} features)")
    print(f"ratio                        {loop / ours:8.1f}")
    scale = float(effects.abs().mean())
    print(f"largest difference           {gap:8.1e} (mean |effect| {scale:.1e})")


if __name__ == "__main__":
    main()
