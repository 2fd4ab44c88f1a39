"""Transcoders of every form for the tiny models, and their graphs by brute force: one backward pass
through the model itself per target, in float64.
"""

from __future__ import annotations

import node_models
import torch
from cases import random_dictionary
from torch import Tensor

from assay.attribution.transformer.relp import modified_backward
from assay.core.sites import run_edited
from assay.core.target import Target
from assay.dictionaries import Placed
from assay.targets import families, names
from assay.targets.metrics import logit_difference

WIDTH, LAYERS, TOKENS = 16, 3, [4, 9, 2, 17, 23, 8]


def target(family: str = "gpt2") -> Target:
    return Target(node_models.build(family), logit_difference)


def transcoders(
    hook: str = "mlp.hook_in",
    *,
    out: str = "hook_mlp_out",
    kind: str = "relu",
    crossing: bool = False,
    skip: bool = False,
    size: int = 11,
    layers: tuple[int, ...] = (0, 1, 2),
    **options,
) -> dict[str, Placed]:
    found = {}
    for layer in layers:
        last = LAYERS if crossing else layer + 1
        wide = WIDTH * (last - layer)
        columns = WIDTH if skip else 0
        made = random_dictionary(WIDTH, size, layer + 5, kind, d_out=wide, skip=columns, **options)
        made.b_dec.data[WIDTH:] = 0  # each layer's bias is added once
        writes = tuple(f"blocks.{place}.{out}" for place in range(layer, last))
        found[f"layer {layer}"] = Placed(made.double(), f"blocks.{layer}.{hook}", writes)
    return found


def by_hand(
    target: Target, dictionaries: dict[str, Placed], ids: list[int], logits: Tensor, first: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Return edges (features and logits, sources), the values of the rows, and the features (layer,
    position, index): MLP outputs are leaves from which skip connections pass on what they read.
    """
    model = target.model
    family = families.find_family(model)
    site = {
        name: names.resolve(model, name).site
        for p in dictionaries.values()
        for name in (p.reads, *p.writes)
    }
    reads: dict[int, Tensor] = {}
    leaves: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}
    ends: dict[str, Tensor] = {}
    layer_of = {name: int(name.split(".")[1]) for name in site}

    edits = {}
    for placed in dictionaries.values():

        def keep(seen, layer=layer_of[placed.reads]):
            reads[layer] = seen.value
            return seen.written

        edits[site[placed.reads]] = keep
    written = {site[name]: layer_of[name] for p in dictionaries.values() for name in p.writes}
    for layer in range(LAYERS):
        written.setdefault(f"{family.blocks}.{layer}.{family.mlp}", layer)
    if len(written) > LAYERS:  # a norm follows: the outer site is no leaf
        written = {
            path: layer
            for path, layer in written.items()
            if not path.endswith("post_feedforward_layernorm")
        }
    for path, layer in written.items():

        def cut(seen, layer=layer):
            values[layer] = seen.value.detach()
            leaf = torch.zeros_like(seen.value).requires_grad_()
            leaves[layer] = leaf
            out = values[layer] + leaf
            for placed in dictionaries.values():
                weight = placed.dictionary.W_skip
                if weight is not None and layer_of[placed.reads] == layer:
                    passed = reads[layer] @ weight[:, :WIDTH]
                    out = out + (passed - passed.detach())
            return out

        edits[path] = cut

    def embed(seen):
        ends["embedding"] = seen.value.detach().clone().requires_grad_()
        return ends["embedding"]

    def end(seen):
        ends["final"] = seen.value
        return seen.written

    edits |= {family.embedding: embed, family.final_norm: end}
    with modified_backward(model, "frozen"), torch.enable_grad():
        run_edited(model, {"input_ids": torch.tensor([ids])}, edits)
        features, rows, outs = [], [], []
        errors = {layer: values[layer][0].clone() for layer in range(LAYERS)}
        for placed in sorted(dictionaries.values(), key=lambda one: layer_of[one.reads]):
            dictionary, layer = placed.dictionary, layer_of[placed.reads]
            codes = dictionary.encode(reads[layer][0])
            held = codes.detach().clone()
            held[:first] = 0
            rest = dictionary.rest(reads[layer][0].detach())
            for place, name in enumerate(placed.writes):
                columns = slice(place * WIDTH, (place + 1) * WIDTH)
                errors[layer_of[name]] -= held @ dictionary.W_dec[:, columns] + rest[..., columns]
            for position, index in held.nonzero().tolist():
                features.append((layer, position, index))
                rows.append(codes[position, index])
                outs.append(
                    [
                        (
                            layer_of[name],
                            position,
                            held[position, index]
                            * dictionary.W_dec[index, place * WIDTH : (place + 1) * WIDTH],
                        )
                        for place, name in enumerate(placed.writes)
                    ]
                )
        head = model.get_output_embeddings().weight
        rows += [ends["final"][0, -1] @ (head[token] - head.mean(0)) for token in logits.tolist()]
        for layer in range(LAYERS):
            for position in range(len(ids)):
                vector = errors[layer][position] * (position >= first)
                outs.append([(layer, position, vector)])
        where = [*(leaves[layer] for layer in range(LAYERS)), ends["embedding"]]
        table = []
        for row in rows:
            found = torch.autograd.grad(row, where, retain_graph=True, allow_unused=True)
            found = [
                torch.zeros_like(x) if g is None else g for g, x in zip(found, where, strict=True)
            ]
            line = [
                sum(
                    (found[layer][0, position] @ vector for layer, position, vector in out),
                    torch.zeros((), dtype=torch.float64),
                )
                for out in outs
            ]
            line += [
                found[-1][0, position] @ ends["embedding"][0, position]
                for position in range(len(ids))
            ]
            table.append(torch.stack(line))
    return torch.stack(table).detach(), torch.stack(rows).detach(), torch.tensor(features)
