"""What trained dictionaries recover of two small language models, and in which CPU time.

1. The agreement model, 4 layers of width 128: attention, MLP and residual stream of every layer, 3
   active features. To reach: 99 % of the loss at every site and 98 % with all twelve spliced.
2. A text model, 2 layers of width 64 over byte pairs of a plain text (`--text FILE`): six sites,
   512 features, at most 20 active. To reach: 95 % at every site, 90 % with all spliced, and at most
   a tenth of the features dead.

The models are trained into `--out` first, or read from there. Run with `python
benchmarks/dictionary_quality.py [--parts agreement text] [--text FILE] [--out DIR]`."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from assay.dictionaries import Placed, architecture
from assay.dictionaries.evaluation import evaluate
from assay.dictionaries.settings import Training
from assay.dictionaries.training import train
from assay.io.prompts import read_text
from assay.io.runs import Run
from assay.learn.language import (
    train_agreement_model,
    train_language_model,
    train_tokenizer,
)
from assay.learn.reading import Rows, rows_of
from assay.learn.settings import AgreementTraining, LanguageTraining
from assay.targets.agreement import agreement_text, encode_sentences
from assay.targets.language import load_language_model

HOOKS = ("hook_attn_out", "hook_mlp_out", "hook_resid_post")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=["agreement", "text"])
    parser.add_argument("--text", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        out = given.out or Path(temporary)
        if "agreement" in given.parts:
            measure_agreement(out)
        if "text" in given.parts:
            if given.text is None:
                parser.error("the text model needs --text FILE")
            measure_text(out, given.text)


def measure_agreement(out: Path) -> None:
    folder = train_agreement_model(Run(out / "agreement"), AgreementTraining(layers=4))
    model = load_language_model(folder)

    def rows(sentences: int, seed: int) -> Rows:
        ids = encode_sentences(agreement_text(sentences, seed=seed), model.tokenizer)
        return rows_of(ids, ids != model.tokenizer.pad_token_id)

    training = Training(
        steps=1500, batch=512, rate=2e-3, end_to_end=0.4, windows=64, auxiliary_features=3
    )
    report("agreement model", model.model, 4, 512, 3, rows(8000, 0), rows(600, 99), training)


def measure_text(out: Path, text: Path) -> None:
    tokenizer = train_tokenizer(text)
    settings = LanguageTraining(layers=2, width=64, steps=800, batch=32)
    folder = train_language_model(text, tokenizer, Run(out / "text"), settings)
    model = load_language_model(folder)
    ids = read_text(text, model.tokenizer, length=settings.context)
    kept = len(ids) - max(1, len(ids) // 10)  # the rest was held out of the model's training too
    rows, held = rows_of(ids[:kept], constant=1), rows_of(ids[kept:], constant=1)
    training = Training(steps=1500, batch=1024, end_to_end=0.1, windows=16, auxiliary_features=16)
    report("text model", model.model, 2, 512, 16, rows, held, training)


def report(
    name: str,
    model: nn.Module,
    layers: int,
    size: int,
    k: int,
    rows: Rows,
    held: Rows,
    training: Training,
) -> None:
    width = int(model.config.hidden_size)  # type: ignore[union-attr,arg-type]
    sites = [f"blocks.{layer}.{hook}" for layer in range(layers) for hook in HOOKS]
    placed = {site: Placed(architecture("topk")(width, size, k=k), site, (site,)) for site in sites}
    began = time.process_time()
    found = evaluate(model, held, train(model, rows, placed, training))
    print(f"{name}: {time.process_time() - began:.0f} CPU seconds of training and evaluation")
    print(found)
    if found.worst is not None:
        low, high = found.worst.interval
        print(f"worst site: {found.worst.loss_recovered:.4f} (95 % interval {low:.4f}-{high:.4f})")
    print(f"all spliced: {found.loss_recovered}")
    for site, reason in found.reasons.items():
        print(f"{site}: {reason}")


if __name__ == "__main__":
    main()
