"""TransformerLens's side of `patching.py`, run by it in an environment of its own: its patching
loops and its hooks for AtP.

Arguments: a folder with a GPT-2 model, a safetensors file (clean, patch, answers), a safetensors
file to write, repetitions. Prints the CPU seconds as JSON."""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig, patching
from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights
from transformers import GPT2LMHeadModel

LOOPS = {
    "attn.hook_z": patching.get_act_patch_attn_head_out_by_pos,
    "hook_mlp_out": patching.get_act_patch_mlp_out,
    "hook_resid_pre": patching.get_act_patch_resid_pre,
}


def load(folder: str) -> HookedTransformer:
    theirs = GPT2LMHeadModel.from_pretrained(folder)
    shape = theirs.config
    config = HookedTransformerConfig(
        n_layers=shape.n_layer,
        d_model=shape.n_embd,
        n_heads=shape.n_head,
        d_head=shape.n_embd // shape.n_head,
        d_mlp=4 * shape.n_embd,
        n_ctx=shape.n_positions,
        d_vocab=shape.vocab_size,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=shape.layer_norm_epsilon,
        device="cpu",
    )
    model = HookedTransformer(config)
    model.load_state_dict(convert_gpt2_weights(theirs, config), strict=False)
    return model.eval()


def patch_all(
    model: HookedTransformer, data: dict[str, Tensor], metric: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The effect of every node, averaged over the batch as the loops do it."""
    with torch.no_grad():
        _, cache = model.run_with_cache(data["patch"])
        base = metric(model(data["clean"])).mean()
        # What the loops call the corrupted run is the one that is patched, what they call the clean
        # cache the one patched in.
        return {
            name: loop(model, data["clean"], cache, lambda logits: metric(logits).mean()) - base
            for name, loop in LOOPS.items()
        }


def attribute(
    model: HookedTransformer, data: dict[str, Tensor], metric: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Attribution patching by a forward and a backward hook at every node: per example,
    (examples, positions[, heads]) by name.
    """
    clean: dict[str, Tensor] = {}
    slope: dict[str, Tensor] = {}

    def wanted(name: str) -> bool:
        return name.endswith(tuple(LOOPS))

    def keep(value: Tensor, hook: Any) -> None:
        clean[hook.name] = value.detach()

    def keep_gradient(value: Tensor, hook: Any) -> None:
        slope[hook.name] = value.detach()

    with torch.no_grad():
        _, patch = model.run_with_cache(data["patch"], names_filter=wanted)
    with model.hooks(fwd_hooks=[(wanted, keep)], bwd_hooks=[(wanted, keep_gradient)]):
        metric(model(data["clean"])).sum().backward()
    model.zero_grad()
    return {name: ((patch[name] - clean[name]) * slope[name]).sum(-1) for name in clean}


def main() -> None:
    folder, given, written, repeats = sys.argv[1:]
    torch.set_num_threads(1)
    keep_memory()
    model, data = load(folder), load_file(given)
    examples = torch.arange(len(data["answers"]))

    def metric(logits: Tensor) -> Tensor:
        last = logits[:, -1]
        return last[examples, data["answers"][:, 1]] - last[examples, data["answers"][:, 0]]

    def frozen() -> dict[str, Tensor]:
        # The gradients of the weights, which hooks do not need, are not computed: only the
        # embedding is differentiated.
        model.requires_grad_(False)
        with model.hooks(fwd_hooks=[("hook_embed", lambda value, hook: value.requires_grad_())]):
            return attribute(model, data, metric)

    attribute(model, data, metric)
    seconds = {}
    seconds["exact"], exact = timed(lambda: patch_all(model, data, metric), int(repeats))
    seconds["atp"], scores = timed(lambda: attribute(model, data, metric), 20 * int(repeats))
    frozen()
    seconds["atp, weights frozen"], again = timed(frozen, 20 * int(repeats))
    assert all(torch.allclose(scores[name], again[name], atol=1e-6) for name in scores)
    save_file(
        {f"exact {n}": v.contiguous() for n, v in exact.items()}
        | {f"atp {n}": v.contiguous() for n, v in scores.items()},
        written,
    )
    print(json.dumps(seconds))


def keep_memory() -> None:
    """Keep freed memory in the process, as the `assay` command does: page faults would be a
    large part of both sides' times.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)
        libc.mallopt(-1, (1 << 31) - 1)


def timed(function: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The least CPU seconds of some calls, which a busy machine disturbs least, and what the
    last one returned.
    """
    spent = []
    for _ in range(repeats):
        began = time.process_time()
        found = function()
        spent.append(time.process_time() - began)
    return min(spent), found


if __name__ == "__main__":
    main()
