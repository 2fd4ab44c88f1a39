"""Make the attribution graph of one prompt."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from assay.core.target import Target
from assay.dictionaries import DictionarySet
from assay.edges.prompt.exact import exact_effects, removals
from assay.edges.prompt.frozen import freeze
from assay.edges.prompt.graph import PromptGraph
from assay.edges.prompt.influence import shares
from assay.edges.prompt.replacement import replace_mlps
from assay.edges.prompt.rows import PullBack
from assay.errors import InputError, shown
from assay.io.prompts import require_tokenizer
from assay.targets import families
from assay.targets.language import require_context

ROUND = 2048  # features whose edges are computed before the others are ranked again


@torch.no_grad()
def prompt_graph(
    target: Target,
    dictionaries: DictionarySet,
    prompt: str | Sequence[int] | Tensor,
    *,
    targets: Sequence[int] | None = None,
    logits: int = 10,
    probability: float = 0.95,
    first: int = 1,
    most: int | None = None,
    exact: int = 0,
    budget: int | None = None,
) -> PromptGraph:
    """Return the attribution graph of one prompt, from its logits to its tokens over the active
    features of transcoders or cross-layer transcoders and the errors they leave.

        edge(s -> t) = <d value_t / d site_s, what s writes there>

    with attention patterns, norm scales and what MLPs put out held fixed, where the value of t is
    linear in all sources (Dunefsky et al. 2024, arXiv 2406.11944; Ameisen et al. 2025, Circuit
    tracing, transformer-circuits.pub). The edges are exact there; that the network's own blocks are
    linear then is checked with a random derivative.

    `prompt` is a text, which the target's tokenizer reads, behind its first token if it has one, or
    token ids. `targets` are the tokens whose logits are explained; by default as many of the
    likeliest as reach `probability` together, `logits` at most. The `first` positions have neither
    features nor errors, as their activations stand apart. `most` limits the features: the most
    influential ones, ranked again after every 2,048. `exact` of the most influential nodes are
    taken out of the network itself. `budget` is in bytes.

    Raises InputError for an empty prompt, tokens outside of the vocabulary, dictionaries that are
    no transcoders, do not fit or hold NaN, and families whose norms or patterns cannot be held
    fixed. Sheet: features."""
    began = time.process_time()
    model = target.model
    family = families.find_family(model)
    if family is None:
        raise InputError(
            "an attribution graph needs a family whose blocks are known"
            f" ({', '.join(families.FAMILIES)}); this model is of family"
            f" {families.model_type(model)!r}"
        )
    ids, text, words = _tokens(target, prompt, first)
    for name, value, least in (("logits", logits, 1), ("first", first, 0), ("exact", exact, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} must be a whole number from {least} on, got {shown(value)}")
    if most is not None and most < 1:
        raise InputError(f"most must be at least 1 feature, got {most}")
    if not 0 < probability <= 1:
        raise InputError(f"probability must be above 0 and at most 1, got {probability}")
    frozen = freeze(model, ids)
    chosen, odds = _choose(frozen.logits, targets, logits, probability)
    nodes = replace_mlps(model, dictionaries, frozen, first)
    embedded = frozen.seen[family.embedding]
    vectors = _logit_vectors(model, chosen).to(embedded)
    pull = PullBack(frozen, nodes, embedded * frozen.embedding_scale, vectors, budget)
    count = len(nodes.features)
    if most is None or most >= count:
        kept = torch.arange(count, device=ids.device)
        edges = pull.rows(torch.arange(count + len(chosen), device=ids.device))
    else:
        kept, edges = _most_influential(pull, odds, most)
    at_end = frozen.seen[family.final_norm][-1]
    values = torch.cat([nodes.activations[kept], vectors @ at_end]).double()
    graph = PromptGraph(
        target.name,
        text,
        ids[0].cpu(),
        words,
        len(frozen.blocks),
        dict(nodes.names),
        nodes.features[kept].cpu(),
        nodes.activations[kept].cpu(),
        chosen.cpu(),
        tuple(_word(target, token) for token in chosen.tolist()),
        odds.cpu(),
        edges.cpu(),
        values.cpu(),
        (values - edges.sum(1, dtype=torch.float64)).cpu(),
        count,
    )
    if exact:
        largest = graph.influence.argsort(descending=True, stable=True)[:exact]
        places = torch.cat([kept.cpu(), torch.arange(count, pull.columns)])[largest]
        removed = removals(nodes, embedded, family.embedding, places.tolist())
        found = exact_effects(model, ids, removed, vectors, budget)
        graph = replace(graph, removed=tuple(largest.tolist()), exact=found)
    return replace(graph, cpu_seconds=time.process_time() - began)


def _tokens(
    target: Target, prompt: str | Sequence[int] | Tensor, first: int
) -> tuple[Tensor, str, tuple[str, ...]]:
    """Return the token ids (1, positions) of a prompt, its text and the text of every token."""
    tokenizer: Any = getattr(target, "tokenizer", None)
    text = ""
    if isinstance(prompt, str):
        text = prompt
        require_tokenizer(tokenizer)
        listed = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        special = set(tokenizer.all_special_ids)
        start = next(
            (one for one in (tokenizer.bos_token_id, tokenizer.eos_token_id) if one is not None),
            None,
        )
        # Without a first token of its own the text would lose a word to the positions left out.
        if listed and first and listed[0] not in special and start is not None:
            listed = [start, *listed]
        prompt = listed
    ids = torch.as_tensor(prompt)
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1 or (len(ids) and (ids.is_floating_point() or ids.dtype == torch.bool)):
        raise InputError(
            "prompt must be a text or the token ids of one prompt, got a"
            f" {str(ids.dtype).removeprefix('torch.')} tensor of shape {tuple(ids.shape)}"
        )
    if len(ids) <= first:
        raise InputError(
            f"a prompt of {len(ids)} tokens, of which the first {first} have no features, has"
            " nothing to attribute; give a longer prompt"
        )
    model: Any = target.model
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    _require_in(ids, vocabulary, "prompt")
    require_context(target.model, len(ids), "give a shorter prompt")
    words = tuple(_word(target, token) for token in ids.tolist())
    if not text:
        text = " ".join(words) if tokenizer is None else str(tokenizer.decode(ids.tolist()))
    return ids.long()[None].to(target.device), text, words


def _word(target: Target, token: int) -> str:
    tokenizer = getattr(target, "tokenizer", None)
    return str(token) if tokenizer is None else str(tokenizer.decode([token]))


def _require_in(ids: Tensor, vocabulary: int, name: str) -> None:
    wrong = ids[(ids < 0) | (ids >= vocabulary)].unique().tolist()
    if wrong:
        raise InputError(
            f"{name}: token {wrong[0]} is outside of the vocabulary of {vocabulary} tokens"
        )


def _choose(
    logits: Tensor, targets: Sequence[int] | None, most: int, probability: float
) -> tuple[Tensor, Tensor]:
    """Return the tokens whose logits are explained, with their probabilities."""
    odds = logits.softmax(-1)
    if targets is not None:
        chosen = torch.as_tensor(targets, device=logits.device)
        if chosen.ndim != 1 or not len(chosen) or chosen.is_floating_point():
            raise InputError(f"targets must be token ids, at least one; got {shown(targets)}")
        _require_in(chosen, len(logits), "targets")
        if len(chosen.unique()) < len(chosen):
            raise InputError("targets: a token stands twice")
        return chosen, odds[chosen]
    top, index = odds.topk(min(most, len(odds)))
    count = int(torch.searchsorted(top.cumsum(0), probability)) + 1
    return index[:count], top[:count]


def _logit_vectors(model: nn.Module, chosen: Tensor) -> Float[Tensor, "targets width"]:
    """Return the rows of the unembedding less their mean over the vocabulary."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    weight = head.weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight[chosen].to(wide) - weight.mean(0, dtype=wide)


def _most_influential(pull: PullBack, odds: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the most influential features, in order, and the edges between them and the rest.

    Influence is known for those whose targets' edges are known: it is ranked again every round."""
    layers, count = pull.nodes.features[:, 0], len(pull.nodes.features)
    rows = pull.rows(count + torch.arange(len(odds), device=layers.device))
    known = torch.zeros(0, dtype=torch.long, device=layers.device)
    found = rows
    while len(known) < most:
        reached = odds.double() @ shares(rows)
        for layer in reversed(range(len(pull.frozen.blocks))):
            here = (layers[known] == layer).nonzero().flatten()
            if len(here):
                reached += reached[known[here]] @ shares(found[len(odds) + here])
        order = reached[:count].argsort(descending=True)
        order = order[~torch.isin(order, known)][: min(ROUND, most - len(known))]
        known = torch.cat([known, order])
        found = torch.cat([found, pull.rows(order)])
    turn = known.argsort()
    known = known[turn]
    columns = torch.cat([known, torch.arange(count, pull.columns, device=layers.device)])
    return known, torch.cat([found[len(odds) :][turn], rows])[:, columns]
