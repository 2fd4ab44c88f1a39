"""Labels of the features in the circuits: contexts, histograms and promoted tokens."""

from __future__ import annotations

from typing import Any

import polars as pl
import torch
from torch import Tensor

from assay.dictionaries import DictionarySet, Placed
from assay.dictionaries.labels import Context, FeatureLabel, label_features
from assay.errors import InputError
from assay.io.runs import Run
from assay.io.texts import read_text
from assay.learn.reading import Rows, rows_of
from assay.studies.features.config import Config
from assay.studies.features.inputs import encoded_rows
from assay.studies.pairs import read_all
from assay.studies.windows import require_vocabulary
from assay.targets.agreement import agreement_text
from assay.targets.language import LanguageModel, require_context
from assay.targets.promoted import promoted_tokens

FILE = "labels.parquet"
_STREAM = ("residual", "mlp", "attention")
_SCHEMA: dict[str, Any] = {
    "dictionary": pl.String,
    "feature": pl.Int64,
    "positions": pl.Int64,
    "active": pl.Int64,
    "contexts": pl.List(pl.Struct({"text": pl.String, "activation": pl.Float64})),
    "top": pl.Float64,
    "counts": pl.List(pl.Int64),
    "promoted": pl.List(pl.Struct({"token": pl.String, "logit": pl.Float64})),
    "lowered": pl.List(pl.Struct({"token": pl.String, "logit": pl.Float64})),
    "reason": pl.String,
}


def given_text(config: Config, model: LanguageModel) -> Rows | None:
    """Return the windows of the text that the config names, none where it names none.

    Raises InputError for a text that cannot label anything, before any work is done."""
    given = config.labels
    if given.text is None:
        return None
    require_context(model.model, given.length, "set labels.length lower")
    ids = read_text(given.text, model.tokenizer, length=given.length)
    require_vocabulary(ids, model, given.text)
    return rows_of(ids)


def save_labels(
    config: Config,
    run: Run,
    model: LanguageModel,
    dictionaries: DictionarySet,
    text: Rows | None = None,
) -> list[dict[str, Any]]:
    """Label every feature that is in a circuit from a text, by default from what the model was
    trained on or asked, save the labels, and return them.
    """
    if not run.has("circuit-parts.parquet"):
        return []
    wanted: dict[str, list[int]] = {}
    for group, index in run.table("circuit-parts.parquet").select("group", "index").iter_rows():
        if group in dictionaries and index[-1] not in wanted.setdefault(group, []):
            wanted[group].append(index[-1])
    given = config.labels
    found = label_features(
        model.model,
        _own_texts(config, run, model) if text is None else text,
        dictionaries,
        wanted,
        contexts=given.contexts,
        around=given.around,
        bins=given.bins,
    )
    tokens = {name: _promoted(model, dictionaries[name], wanted[name], given) for name in wanted}
    rows = [
        {
            "dictionary": one.name,
            "feature": one.feature,
            "positions": one.positions,
            "active": one.active,
            "contexts": [
                {"text": _marked(model, context), "activation": context.activation}
                for context in one.contexts
            ],
            "top": one.top,
            "counts": list(one.counts),
            **_tokens_of(one, wanted, tokens),
        }
        for one in found
    ]
    run.save_table(FILE, pl.DataFrame(rows, schema=_SCHEMA))
    return rows


def _own_texts(config: Config, run: Run, model: LanguageModel) -> Rows:
    if config.target.train:
        count = config.dictionaries.sentences
        return encoded_rows(agreement_text(count, seed=config.seed), model)
    pairs = read_all(config.data.pairs or run.checked("pairs.jsonl"), model)
    return rows_of(torch.cat([pairs.clean, pairs.patch]), pairs.mask.repeat(2, 1))


def _promoted(
    model: LanguageModel, placed: Placed, features: list[int], given: Any
) -> tuple[list[Any], list[Any], str]:
    """Return the tokens that features raise and lower most, or why there are none."""
    kinds = {model.site(site).kind for site in placed.writes}
    if not kinds <= set(_STREAM):
        return [], [], "what is written here is not in the residual stream"
    # What is written at several sites adds up in the residual stream.
    rows = placed.dictionary.W_dec[features]
    rows = rows.detach().unflatten(1, (len(placed.writes), placed.width)).sum(1)

    def named(directions: Tensor, sign: float) -> list[Any]:
        ids, values = promoted_tokens(model.model, directions, given.tokens)
        return [
            [
                {"token": text, "logit": sign * value}
                for text, value in zip(_names(model, line), numbers, strict=True)
            ]
            for line, numbers in zip(ids.tolist(), values.tolist(), strict=True)
        ]

    try:
        return named(rows, 1.0), named(-rows, -1.0), ""
    except InputError as error:
        return [], [], str(error)


def _tokens_of(
    one: FeatureLabel, wanted: dict[str, list[int]], tokens: dict[str, Any]
) -> dict[str, Any]:
    raised, lowered, reason = tokens[one.name]
    place = wanted[one.name].index(one.feature)
    return {
        "promoted": raised[place] if raised else [],
        "lowered": lowered[place] if lowered else [],
        "reason": "; ".join(filter(None, (one.reason, reason))),
    }


def _marked(model: LanguageModel, context: Context) -> str:
    """Return the text of a context with its token in brackets."""
    names = _names(model, list(context.tokens))
    name = names[context.place]
    before = name[: len(name) - len(name.lstrip())] if name.strip() else ""
    names[context.place] = f"{before}[{name.strip() or repr(name)}]"
    spaced = any(name.startswith(" ") for name in names)
    return ("" if spaced else " ").join(names).strip()


def _names(model: LanguageModel, ids: list[int]) -> list[str]:
    """Return the texts of tokens, and the tokenizer's own names of those that are bytes of a
    letter.
    """
    texts = [str(model.tokenizer.decode([token])) for token in ids]
    return [
        str(model.tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text else text
        for token, text in zip(ids, texts, strict=True)
    ]
