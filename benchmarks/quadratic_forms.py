"""Quadratic forms of 64 parameter directions on 32 sequences: one forward-mode derivative each
against two nested ones.

A two-layer transformer of the GPT-2 architecture (width 128, vocabulary 1024, 128 positions); every
parameter of the blocks moves. CPU seconds of one thread; the nested time is measured on a part of
the work and scaled up."""

from __future__ import annotations

import resource
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from assay.mechanisms.directions import around, quadratic_forms
from assay.mechanisms.directions.nested import nested_quadratic_forms

DIRECTIONS, SAMPLES, LENGTH, VOCABULARY = 64, 32, 128, 1024


def build() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=128,
        n_layer=2,
        n_head=4,
        activation_function="gelu",
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    return GPT2LMHeadModel(config).eval()


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=generator)
    local = around(build(), tokens, "transformer.h.*")
    directions = torch.randn(DIRECTIONS, local.space.size, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    began = time.process_time()
    forms = quadratic_forms(local, directions)
    once = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    samples, rows = 8, 4
    began = time.process_time()
    for first in range(0, rows, 2):
        nested = nested_quadratic_forms(
            local.take(slice(0, samples)), directions[first : first + 2]
        )
        error = float(((nested - forms[:samples, first : first + 2]).abs() / nested).max())
    twice = (time.process_time() - began) * (SAMPLES / samples) * (DIRECTIONS / rows)
    print(
        f"{DIRECTIONS} directions of {local.space.size:,} parameters x {SAMPLES} sequences of"
        f" {LENGTH} tokens"
    )
    print(f"{'method':<32}{'CPU s':>8}{'peak GiB':>10}")
    print(f"{'JVP + output metric':<32}{once:>8.1f}{peak:>10.2f}")
    print(f"{'nested JVPs (scaled up)':<32}{twice:>8.1f}")
    print(f"ratio {twice / once:.1f}; largest relative difference in float32 {error:.1e}")


if __name__ == "__main__":
    main()
