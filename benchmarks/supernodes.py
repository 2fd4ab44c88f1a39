"""How often suggested supernodes merge what they should not, on planted duplicates.

In random dictionaries of a random GPT-2, features that vary are given a twin (the same encoder and
decoder up to noise), a companion (the same encoder, another decoder: active together, another
effect) and an impostor (the same decoder, another encoder: the same effect, active at other times).
For every threshold, of co-activation and effect alike: the share of twins that are found, and the
shares of companions, of impostors and of unrelated pairs that are merged, each with its 95 %
interval over the pairs.
Run: python benchmarks/supernodes.py [--noise 0.2] [--seeds 5]"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import combinations, pairwise

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import assay
from assay.audit.intervals import binomial_interval
from assay.core.target import Batch, Target
from assay.dictionaries import Placed, architecture
from assay.edges import measure_likeness, part_edges
from assay.edges.cut import Node
from assay.edges.supernodes import Likeness, join_alike
from assay.targets.metrics import logit_difference

WIDTH, SIZE, ACTIVE, LAYERS, POSITION = 64, 256, 24, 4, 5
PLANTED = 12
KINDS = ("twins", "companions", "impostors", "unrelated")
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--noise", type=float, default=0.2)
    parser.add_argument("--seeds", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    counts = {place: {kind: [0, 0] for kind in KINDS} for place in THRESHOLDS}
    for seed in range(chosen.seeds):
        for likeness, kinds in planted(seed, chosen.noise):
            for threshold in THRESHOLDS:
                groups = join_alike(likeness, threshold, threshold)
                merged = {pair for some in groups for pair in combinations(some, 2)}
                for pair in combinations(range(len(likeness.effect)), 2):
                    count = counts[threshold][kinds.get(pair, "unrelated")]
                    count[0] += pair in merged
                    count[1] += 1
    print(f"noise {chosen.noise:g} of a row's length, {chosen.seeds} seeds; merged, of how many:")
    print(f"{'threshold':>9}  " + "  ".join(f"{kind:>24}" for kind in KINDS))
    for threshold, found in counts.items():
        cells = []
        for merged_here, total in found.values():
            low, high = binomial_interval(merged_here / total, total, 0.05)
            cells.append(f"{merged_here:>5}/{total:<6}[{low:.3f}, {high:.3f}]")
        print(f"{threshold:>9}  " + "  ".join(f"{cell:>24}" for cell in cells))


def planted(seed: int, noise: float) -> Iterator[tuple[Likeness, dict[tuple[int, int], str]]]:
    """Yield, for every layer but the last, how alike the planted features are, and of which kind
    each planted pair is.
    """
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=LAYERS,
            n_embd=WIDTH,
            n_head=4,
            vocab_size=100,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="eager",
        )
    )
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(4 if parameter.ndim > 1 else 1)  # so that layers do more than pass on
    placed = {}
    for layer in range(LAYERS):
        name = f"blocks.{layer}.hook_resid_post"
        dictionary = architecture("topk")(WIDTH, SIZE, k=ACTIVE)
        for parameter in dictionary.parameters():
            parameter.data.normal_(std=WIDTH**-0.5)
        placed[name] = Placed(dictionary, name, (name,))
    examples, positions = 64, POSITION + 2
    tokens = torch.randint(100, (2, examples, positions))
    labels = {
        "answers": torch.randint(100, (examples, 2)),
        "last": torch.full((examples,), positions - 1),
    }
    mask = torch.ones(examples, positions, dtype=torch.long)
    clean, patch = (Batch({"input_ids": ids, "attention_mask": mask}, labels) for ids in tokens)
    names = list(placed)
    for here, after in pairwise(names):
        dictionary = placed[here].dictionary
        bound = assay.features(Target(model, logit_difference), placed, clean, patch)
        activity = assay.attribute(bound).values[here].to_dense()[:, POSITION].std(0)
        base = activity.topk(PLANTED).indices
        spare = activity.topk(3 * PLANTED, largest=False).indices.reshape(3, -1)
        others = activity.argsort(descending=True)[PLANTED : -3 * PLANTED]
        encoder, decoder = dictionary.W_enc.data, dictionary.W_dec.data
        like = noise * WIDTH**-0.5
        for slots, same_time, same_effect in zip(spare, (1, 1, 0), (1, 0, 1), strict=True):
            drawn = others[torch.randperm(len(others))[:PLANTED]]
            fresh = encoder[:, drawn], torch.randn(PLANTED, WIDTH)
            read = encoder[:, base] if same_time else fresh[0]
            write = decoder[base] if same_effect else fresh[1] * WIDTH**-0.5
            encoder[:, slots] = read + like * torch.randn_like(read)
            decoder[slots] = write + like * torch.randn_like(write)
            dictionary.b_enc.data[slots] = dictionary.b_enc.data[base]
        bound = assay.features(Target(model, logit_difference), placed, clean, patch)
        nodes: list[Node] = [
            (here, (POSITION, place)) for place in torch.cat([base, spare.flatten()]).tolist()
        ]
        scores = assay.attribute(bound).values[after].to_dense().abs().mean(0)
        best = scores.flatten().topk(60).indices.tolist()
        receivers: list[Node] = [(after, (place // SIZE, place % SIZE)) for place in best]
        kinds = {
            (one, one + PLANTED * turn): kind
            for one in range(PLANTED)
            for turn, kind in enumerate(KINDS[:3], start=1)
        }
        # A twin's companion is a companion, a twin's impostor an impostor.
        for one in range(PLANTED):
            kinds[one + PLANTED, one + 2 * PLANTED] = "companions"
            kinds[one + PLANTED, one + 3 * PLANTED] = "impostors"
        yield measure_likeness(part_edges(bound, receivers, nodes)), kinds


if __name__ == "__main__":
    main()
