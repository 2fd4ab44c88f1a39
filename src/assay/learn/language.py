"""Training of small language models: the agreement model that ships as a target, and any text file
with any tokenizer.

Both are GPT-2 architectures saved in the Hugging Face format, and resume from their run's
checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from assay.core.target import Batch, Target
from assay.errors import AssayError, InputError, unknown
from assay.io.files import read_text as read_file
from assay.io.pair_files import TextPair, write_pairs
from assay.io.prompts import encode_pairs, require_tokenizer
from assay.io.runs import Run
from assay.io.texts import read_text
from assay.learn.loop import cosine, fit
from assay.learn.settings import AGREEMENT, AgreementTraining, LanguageTraining
from assay.targets.agreement import (
    CONSTRUCTIONS,
    agreement_pairs,
    agreement_text,
    build_model,
    build_tokenizer,
    encode_sentences,
)
from assay.targets.language import load_language_model, load_tokenizer, save_language_model
from assay.targets.load import LanguageTarget, load, pairs
from assay.targets.metrics import logit_difference, pair_batch

__all__ = [
    "AGREEMENT",
    "AgreementTraining",
    "LanguageTraining",
    "measure_agreement",
    "train_agreement_model",
    "train_language_model",
    "train_tokenizer",
]

MODEL = "model"


def train_agreement_model(run: Run, config: AgreementTraining | None = None) -> Path:
    """Train the agreement model, or go on with it, and return its folder: model and tokenizer in
    the Hugging Face format.

    The run also gets held-out pairs (`pairs.jsonl`, and by construction in `pairs/`) and
    `agreement.json`, the share of them whose clean answer is above the patch answer. Raises
    AssayError when a construction stays below `required`."""
    config = AgreementTraining() if config is None else config
    held_out: dict[str, list[TextPair]] = {}
    for construction in CONSTRUCTIONS:
        held_out[construction] = agreement_pairs(construction, config.pairs, seed=config.seed + 1)
        _save_pairs(run, f"pairs/{construction}.jsonl", held_out[construction])
    _save_pairs(run, "pairs.jsonl", [pair for pairs in held_out.values() for pair in pairs])
    tokenizer = build_tokenizer()
    ids = encode_sentences(agreement_text(config.sentences, seed=config.seed), tokenizer)
    folder = _train(ids, tokenizer, run, config, "agreement")
    shares = measure_agreement(folder, held_out)
    run.save_json("agreement.json", shares)
    worst = min(shares, key=lambda name: shares[name])
    if shares[worst] < config.required:
        raise AssayError(
            f"the agreement model gives the clean answer in {shares[worst]:.1%} of the held-out"
            f" {worst!r} pairs, below the required {config.required:.1%}; train it for more than"
            f" {config.steps} steps"
        )
    return folder


def agreement(
    folder: Path | str, size: Literal["full", "short"] = "short", *, limit: int | None = None
) -> tuple[LanguageTarget, Batch, Batch]:
    """Return a small language model of subject-verb agreement as a target, with the clean and the
    patch batch of up to `limit` held-out pairs.

    The model is trained into `folder` (about 10 CPU-seconds for the short size, a minute for the
    full one), or read from there when an earlier call has trained it. Raises InputError for an
    unknown size."""
    if size not in AGREEMENT:
        raise unknown("size", str(size), AGREEMENT)
    run = Run(Path(folder))
    target = load(train_agreement_model(run, AGREEMENT[size]))
    return target, *pairs(target, run.checked("pairs.jsonl"), limit=limit)


def train_language_model(
    text: Path | str, tokenizer: Any, run: Run, config: LanguageTraining | None = None
) -> Path:
    """Train a small language model on a text file, or go on with it, and return its folder in the
    Hugging Face format.

    `tokenizer` is a tokenizer or the folder of one. The last tenth of the text is held out:
    `language.json` in the run has the loss there in nats per token, beside the loss of the training
    text's own token frequencies."""
    config = LanguageTraining() if config is None else config
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    require_tokenizer(tokenizer)
    windows = read_text(text, tokenizer, length=config.context)
    if len(windows) < 2:
        raise InputError(
            f"{text} fills {len(windows)} window of {config.context} tokens; at least 2 are needed,"
            " one of them held out"
        )
    kept = len(windows) - max(1, len(windows) // 10)
    folder = _train(windows[:kept], tokenizer, run, config, "language", padded=False)
    model = load_language_model(folder).model
    test = windows[kept:][:256]
    counts = torch.bincount(windows[:kept].flatten(), minlength=len(tokenizer)).double() + 1
    losses = [float(_loss(model, chunk, None)) * len(chunk) for chunk in test.split(config.batch)]
    run.save_json(
        "language.json",
        {
            "held_out_loss": sum(losses) / len(test),
            "frequency_loss": float(-(counts / counts.sum()).log()[test[:, 1:]].mean()),
            "training_tokens": kept * config.context,
        },
    )
    return folder


def train_tokenizer(text: Path | str, size: int = 1024) -> Any:
    """Return a tokenizer of byte pairs, learned from a text file: `size` tokens at most, all bytes
    among them, so that no text is unknown to it.

    Raises InputError for fewer tokens than there are bytes, and where there is no text."""
    if size <= 256:
        raise InputError(f"a tokenizer of byte pairs needs more than 256 tokens, got {size}")
    if not read_file(text).strip():
        raise InputError(f"{text} holds no text")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([read_file(text)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def measure_agreement(folder: Path | str, pairs: Mapping[str, list[TextPair]]) -> dict[str, float]:
    """Return, for each named set of pairs, the share in which the model puts the clean answer
    above the patch answer.
    """
    loaded = load_language_model(folder)
    target = Target(loaded.model, logit_difference)
    shares = {}
    for name, some in pairs.items():
        with torch.no_grad():
            values = target.values(pair_batch(encode_pairs(some, loaded.tokenizer)))
        shares[name] = float((values < 0).double().mean())
    return shares


def _train(
    ids: Tensor,
    tokenizer: Any,
    run: Run,
    config: LanguageTraining,
    name: str,
    *,
    padded: bool = True,
) -> Path:
    """Minimise the next-token loss over rows of ids, and save the model."""
    _require_same_training(run, ids, config, name)
    if run.has(MODEL):
        return run.checked(MODEL)
    if min(config.batch, config.steps) < 1 or ids.shape[1] > config.context:
        raise InputError(
            f"batch and steps must be at least 1 and context at least {ids.shape[1]}; got {config}"
        )
    stop = tokenizer.eos_token_id
    model = build_model(
        len(tokenizer),
        layers=config.layers,
        width=config.width,
        heads=config.heads,
        context=config.context,
        seed=config.seed,
        stop=stop,
    )
    generator = torch.Generator().manual_seed(config.seed)
    ignored = tokenizer.pad_token_id if padded else None

    def objective(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        rows = torch.randint(len(ids), (config.batch,), generator=generator)
        return _loss(model, ids[rows], ignored), {}

    fit(
        model,
        objective,
        torch.optim.AdamW(
            model.parameters(), lr=config.rate, weight_decay=config.decay, betas=(0.9, 0.98)
        ),
        steps=config.steps,
        generator=generator,
        schedule=lambda done: cosine(done, warmup=0.05),
        run=run,
        name=name,
        save_every=config.save_every,
    )
    return run.write_folder(MODEL, lambda new: save_language_model(new, model, tokenizer))


def _require_same_training(run: Run, ids: Tensor, config: LanguageTraining, name: str) -> None:
    """Raise InputError when the run trains, or trained, on other data or with other settings."""
    settings = asdict(config)
    settings.pop("required", None)  # it judges the model and does not change it
    data = hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest()
    training = {"settings": settings, "data": data}
    file = f"{name}-training.json"
    if not run.has(file):
        run.save_json(file, training)
    elif run.json(file) != training:
        before = run.json(file).get("settings", {})
        other = [key for key, value in settings.items() if before.get(key) != value] or ["data"]
        raise InputError(
            f"{run.folder} holds a model trained with other {', '.join(other)}; use another folder"
        )


def _save_pairs(run: Run, name: str, pairs: list[TextPair]) -> None:
    if not run.has(name):  # a resumed training drew the same ones
        run.write(name, lambda new: write_pairs(new, pairs))


def _loss(model: nn.Module, ids: Tensor, ignored: int | None) -> Tensor:
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return cross_entropy(
        logits[:, :-1].flatten(0, 1),
        ids[:, 1:].flatten(),
        ignore_index=-100 if ignored is None else ignored,
    )
