"""A guard of the agreement model, and its family of anomalies: sentences outside of the grammar."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from assay.guard import Guard, Observed, Settings, fit, split
from assay.guard.reading import Reading, read, whole
from assay.guard.wrapper import hash_of
from assay.io.prompts import encode_texts, padded_inputs
from assay.io.runs import Run
from assay.learn.language import train_agreement_model
from assay.learn.settings import AGREEMENT
from assay.targets.agreement import CONSTRUCTIONS, agreement_pairs
from assay.targets.language import LanguageModel, load_language_model
from assay.targets.lexicon import words
from assay.targets.names import site_names

FEATURES = 128
PROMPTS = 700  # of each construction, those with several


def agreement_guard(
    run: Run, size: str, settings: Settings, seed: int
) -> tuple[Guard, Observed, list[tuple[str, Observed]]]:
    """Train the agreement model, fit a guard of its MLP neurons at the last word, and return it
    with held-out sentences and the families of sentences outside of the grammar.
    """
    model = load_language_model(train_agreement_model(run, AGREEMENT[size]))
    texts = [
        pair.clean_prefix
        for construction in CONSTRUCTIONS
        if construction != "simple"
        for pair in agreement_pairs(construction, PROMPTS, seed=seed + 7, held_out=False)
    ]
    texts = sorted(set(texts))
    sites = [model.site(name).site for name in site_names(model.model) if "hook_post" in name]
    reading = whole(model.model, inputs_of(model, texts), sites, FEATURES)
    data = observed(model, texts, reading)
    tables, fresh, calibration, held = split(data, (0.5, 0.15, 0.2, 0.15), seed)
    guard = fit(
        tables, fresh, calibration, settings,
        model_hash=hash_of(model.model), reading=reading.to_json(),
    )  # fmt: skip
    keys = dict(zip(data.keys, texts, strict=True))
    kept = [keys[key] for key in held.keys]
    strange = [(name, observed(model, found, reading)) for name, found in ungrammatical(kept, seed)]
    return guard, held, strange


def ungrammatical(texts: list[str], seed: int) -> Iterator[tuple[str, list[str]]]:
    """Yield sentences outside of the grammar, made of sentences inside of it: words shuffled, one
    word said twice, words drawn at random, the sentence cut before its last noun or verb.
    """
    generator = torch.Generator().manual_seed(seed)
    inside = {tuple(text.split()) for text in texts}
    vocabulary = words()

    def places(count: int) -> list[int]:
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        return order

    shuffled, doubled, drawn = [], [], []
    for text in texts:
        parts = text.split()
        mixed = [parts[place] for place in places(len(parts))]
        shuffled.append(mixed if tuple(mixed) not in inside else mixed[::-1])
        place = places(len(parts))[0]
        doubled.append([*parts[: place + 1], *parts[place:]])
        index = torch.randint(len(vocabulary), (len(parts),), generator=generator).tolist()
        drawn.append([vocabulary[one] for one in index])
    yield "shuffled words", [" ".join(parts) for parts in shuffled]
    yield "a word said twice", [" ".join(parts) for parts in doubled]
    yield "random words", [" ".join(parts) for parts in drawn]
    yield "cut short", [" ".join(text.split()[:-1]) for text in texts]


def observed(model: LanguageModel, texts: list[str], reading: Reading) -> Observed:
    """Return what the model does at the last word of texts."""
    return read(model.model, inputs_of(model, texts), reading)


def inputs_of(model: LanguageModel, texts: list[str]) -> dict[str, Any]:
    """Return texts as the arguments of a language model, padded on the right."""
    return padded_inputs(encode_texts(texts, model.tokenizer))
