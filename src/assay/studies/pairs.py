"""Models and pairs of prompts, for the studies that read them."""

from __future__ import annotations

from pathlib import Path

import torch

from assay.io.prompts import Pairs, read_pairs
from assay.io.runs import Run
from assay.studies.agreement_config import AgreementModelConfig
from assay.studies.agreement_model import train_agreement
from assay.targets.language import LanguageModel, load_language_model, require_context


def model_of(path: str | None, config: AgreementModelConfig, run: Run, seed: int) -> LanguageModel:
    """Load the user's model, or the agreement model of the run, which is trained when absent."""
    if path is not None:
        return load_language_model(path)
    trained = run.checked("model") if run.has("model") else None
    return load_language_model(trained or train_agreement(config, run, seed))


def read_all(path: Path | str, model: LanguageModel) -> Pairs:
    """Read the pairs of a file; InputError when the model cannot take them."""
    pairs = read_pairs(path, model.tokenizer, vocab_size=model.vocab_size)
    require_context(model.model, pairs.clean.shape[1])
    return pairs


def read_some(path: Path | str, model: LanguageModel, limit: int, seed: int) -> Pairs:
    """Read the pairs of a file, a random choice where there are more than the limit."""
    pairs = read_all(path, model)
    if len(pairs) <= limit:
        return pairs
    generator = torch.Generator().manual_seed(seed)
    return pairs.take(torch.randperm(len(pairs), generator=generator)[:limit].sort().values)
