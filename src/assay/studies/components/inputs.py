"""What a components study takes apart and on which tokens: a user's model and text, or the
agreement model and its sentences."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM

from assay.errors import InputError
from assay.io.runs import Run, opened
from assay.io.texts import read_text, reorder
from assay.learn.processes import from_first
from assay.mechanisms.components import Rows
from assay.studies.agreement_model import train_agreement
from assay.studies.components.config import Config
from assay.studies.windows import require_vocabulary
from assay.targets.agreement import agreement_text, draw_sentences, encode_sentences
from assay.targets.language import LanguageModel, load_language_model, require_context

SENTENCES = 12_000


@dataclass(frozen=True)
class Inputs:
    """A language model, the windows to train on and those held out, and the token of padding."""

    model: LanguageModel
    ids: Int[Tensor, "windows length"]
    held: Int[Tensor, "held length"]
    padding: int | None = None

    def rows(self, ids: Int[Tensor, "windows length"]) -> Rows:
        """Return windows as a batch, in which padding counts for nothing."""
        kept = self.kept(ids)
        inputs = {"input_ids": ids, "attention_mask": kept.long()}
        return Rows(inputs) if bool(kept.all()) else Rows(inputs, kept.float(), int(kept.sum()))

    def kept(self, ids: Int[Tensor, "windows length"]) -> Tensor:
        """Return which positions are tokens and no padding."""
        return torch.ones_like(ids).bool() if self.padding is None else ids != self.padding

    @property
    def labels(self) -> Int[Tensor, "held length"]:
        """The next token at every held-out position, -100 where there is none."""
        labels = torch.full_like(self.held, -100)
        labels[:, :-1] = torch.where(self.kept(self.held)[:, 1:], self.held[:, 1:], -100)
        return labels


def prepare(config: Config, run: Run) -> Inputs:
    """Return the inputs in the first process, which trains what has to be trained."""
    if config.target.train:
        train_agreement(config.target.agreement, run, config.seed)
        from_first(torch.zeros(()))  # the others wait for the model's files
    return load_inputs(config, run)


def wait_for_inputs(config: Config, folder: Path) -> Inputs:
    """Return the inputs in another process than the first."""
    if config.target.train:
        from_first(torch.zeros(()))
    return load_inputs(config, Run(folder) if config.target.train else None)


def load_inputs(config: Config, run: Run | None) -> Inputs:
    """Return the inputs of a run whose model is there.

    Raises InputError for a text that fills too few windows or is of another vocabulary."""
    if config.target.train:
        assert run is not None
        found = _sentences(config, load_language_model(run.checked("model")))
    else:
        found = _windows(config)
    first = max(1, round(len(found.ids) * config.data.share))
    found = replace(found, ids=found.ids[:first])
    return replace(found, model=_drawn(found.model, config.seed)) if config.target.random else found


def opened_inputs(config: Config, folder: Path) -> Inputs:
    """Return the inputs of a finished run."""
    return load_inputs(config, opened(folder))


def _windows(config: Config) -> Inputs:
    assert config.target.path is not None
    assert config.data.path is not None
    model = load_language_model(config.target.path)
    require_context(model.model, config.data.length, "set data.length lower")
    ids = read_text(config.data.path, model.tokenizer, length=config.data.length)
    require_vocabulary(ids, model, config.data.path)
    if len(ids) < 2 * config.data.held_out:
        raise InputError(
            f"{config.data.path} fills {len(ids)} windows of {config.data.length} tokens;"
            f" data.held_out = {config.data.held_out} needs twice as many"
        )
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(config.seed))
    ids = reorder(ids, order)
    return Inputs(model, ids[config.data.held_out :], ids[: config.data.held_out])


def _sentences(config: Config, model: LanguageModel) -> Inputs:
    padding = model.tokenizer.pad_token_id
    ids = encode_sentences(agreement_text(SENTENCES, seed=config.seed), model.tokenizer)
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(config.seed))]
    held = [
        sentence.text()
        for construction in ("simple", "nounpp", "rc")
        for sentence in draw_sentences(
            construction,
            config.data.held_out,
            seed=config.seed + 1,
            held_out=True,
        )
    ]
    return Inputs(model, ids, encode_sentences(held, model.tokenizer), padding)


def _drawn(model: LanguageModel, seed: int) -> LanguageModel:
    """Return a model with the weights that its architecture starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = AutoModelForCausalLM.from_config(model.model.config, attn_implementation="eager")
    first = next(model.model.parameters())
    drawn = drawn.to(first.dtype).eval().requires_grad_(first.requires_grad)
    return replace(model, model=drawn)
