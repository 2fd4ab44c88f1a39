"""The agreement-directions study: find the direction of subject-verb agreement in one attention
block and measure what it moves.
"""

from __future__ import annotations

from typing import Any

import polars as pl
import torch
from torch import Tensor

from assay.core.target import Target
from assay.errors import InputError
from assay.io.prompts import Pairs, read_pairs
from assay.io.runs import Run, opened
from assay.mechanisms.directions import (
    DirectionMechanisms,
    Local,
    PowerIteration,
    around,
    decompose,
    token_gradients,
)
from assay.mechanisms.directions import directions as bind
from assay.mechanisms.directions import evaluation as ev
from assay.mechanisms.directions.decomposition import Decomposition
from assay.mechanisms.directions.steps import (
    divergence_of_step,
    step_of_divergence,
    top_eigenvector,
)
from assay.studies import runner
from assay.studies.agreement_directions.config import Config
from assay.studies.agreement_directions.page import headline, sections
from assay.studies.agreement_model import train_agreement
from assay.targets.language import LanguageModel, load_language_model
from assay.targets.metrics import logit_difference, pair_batch

__all__ = ["Config", "check", "contexts", "headline", "load", "run", "sections"]


def check(config: Config) -> None:
    """Refuse nothing more than the config does."""


def run(config: Config, run: Run) -> dict[str, Any]:
    """Train, decompose one half of the prompts, choose the number direction by its effect there,
    and compare steps of equal KL along every direction on the other half.
    """
    model, pairs = _prepare(config, run)
    found_on, measured_on = _half(pairs, config.prompts, 0), _half(pairs, config.prompts, 1)
    pattern = _pattern(config, model)
    local, rows, positions = _every_position(model, found_on, pattern)
    found, steepest = _decompose(config, local, positions)
    named = [(str(index), row) for index, row in enumerate(found.directions)]
    number = _largest(_steps(config, model, found_on, named))["direction"]
    table = _steps(config, model, measured_on, [*named, ("top eigenvector", steepest)])
    tensors = {
        "directions": found.directions,
        "scores": found.scores,
        "activity": found.activity,
        "kept": found.kept,
    }
    run.save_tensors(
        "directions.safetensors",
        {**tensors, "steepest": steepest[None], "prompts": measured_on.clean},
    )
    run.save_table("steps.parquet", table)
    run.save_table("contexts.parquet", _contexts(model, found, found_on, rows, positions))
    run.save_table("activity.parquet", _by_position(found, positions))
    chosen = _largest(table.filter(pl.col("direction") == number))
    others = table.filter(~pl.col("direction").is_in([number, "top eigenvector"]))
    steep = _largest(table.filter(pl.col("direction") == "top eigenvector"))
    return {
        "prompts": len(measured_on),
        "parameters": local.space.size,
        "block": pattern,
        "k": config.k,
        "k_chosen": found.count,
        "k_interval": list(found.interval),
        "kl": config.kl,
        "number_direction": number,
        "number_effect": chosen["effect"],
        "number_away": chosen["away"],
        "next_effect": _largest(others)["effect"],
        "eigenvector_effect": steep["effect"],
    }


def load(run: Run) -> DirectionMechanisms:
    """Bind the directions of a saved run to the prompts they were measured on; the metric is the
    logit difference.
    """
    config = runner.config_of(run)
    model, pairs = _prepare(config, run)
    batch = pair_batch(_half(pairs, config.prompts, 1))
    found = run.tensors("directions.safetensors")["directions"]
    return bind(
        Target(model.model, logit_difference, model.path),
        batch,
        parameters=_pattern(config, model),
        found=found,
    )


def contexts(run: Run) -> pl.DataFrame:
    """Describe the prompts that the run's directions were bound to."""
    config = runner.config_of(run)
    texts = _half(_prepare(config, run)[1], config.prompts, 1).texts
    return pl.DataFrame(
        {
            "example": range(len(texts)),
            "prompt": [text.clean_prefix for text in texts],
            "case": [text.case for text in texts],
        }
    )


def _prepare(config: Config, run: Run) -> tuple[LanguageModel, Pairs]:
    home = run if config.target.path is None else opened(config.target.path)
    if not home.has("model"):
        if config.target.path is not None:
            raise InputError(
                f"no agreement model in {config.target.path!r}: it must be the folder of an earlier"
                " run, with model and pairs"
            )
        train_agreement(config.target, run, config.seed)
    model = load_language_model(home.checked("model"))
    return model, read_pairs(
        home.checked(f"pairs/{config.construction}.jsonl"),
        model.tokenizer,
        vocab_size=model.vocab_size,
    )


def _half(pairs: Pairs, count: int, which: int) -> Pairs:
    if 2 * count > len(pairs):
        raise InputError(
            f"prompts = {count} for finding and as many for measuring, and there are {len(pairs)}"
            " pairs"
        )
    return pairs.take(slice(which * count, (which + 1) * count))


def _pattern(config: Config, model: LanguageModel) -> str:
    layers = int(model.model.config.n_layer)  # type: ignore[union-attr, arg-type]
    return f"transformer.h.{config.block % layers}.attn.*"


def _every_position(
    model: LanguageModel, pairs: Pairs, pattern: str
) -> tuple[Local, Tensor, Tensor]:
    """Return one sample per prompt and position, with the prompt and the position of each."""
    length = int(pairs.last[0]) + 1
    rows = torch.arange(len(pairs)).repeat_interleave(length)
    positions = torch.arange(length).repeat(len(pairs))
    inputs = {"input_ids": pairs.clean[rows], "attention_mask": pairs.mask[rows]}
    return around(model.model, inputs, pattern, positions=positions), rows, positions


def _decompose(config: Config, local: Local, positions: Tensor) -> tuple[Decomposition, Tensor]:
    """Decompose gradients towards the outputs of other prompts at the same position; also return
    the steepest direction.

    Positions whose output never varies have no such gradient, so nothing there would stop a
    direction from disturbing them: the mean Fisher over all positions does, as the metric that
    directions are compared in."""
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        output = local.output()
    length = int(positions.max()) + 1
    count = local.samples // length
    drawn = torch.randint(1, count, (count, config.references), generator=generator)
    prompts = (torch.arange(count)[:, None] + drawn) % count
    others = (prompts * length).repeat_interleave(length, 0) + positions[:, None]
    pairs = token_gradients(local, "kl", towards=output[others])
    fisher = token_gradients(local, "kl", draws=config.references, generator=generator)
    found = decompose(
        pairs,
        PowerIteration(config.k),
        generator=generator,
        against=fisher if config.whiten else None,
    )
    return found, top_eigenvector(fisher).double()


def _steps(
    config: Config, model: LanguageModel, pairs: Pairs, named: list[tuple[str, Tensor]]
) -> pl.DataFrame:
    """Return the effects of steps of equal KL along every direction, either way."""
    inputs = {"input_ids": pairs.clean, "attention_mask": pairs.mask}
    whole = around(model.model, inputs, _pattern(config, model))
    rows = [_step(config, whole, pairs, vector, name) for name, vector in named]
    return pl.DataFrame([row for both in rows for row in both])


def _largest(steps: pl.DataFrame) -> dict[str, Any]:
    """Return the step of the largest effect."""
    return steps.row(steps["effect"].arg_max(), named=True)


def _step(
    config: Config, whole: Local, pairs: Pairs, direction: Tensor, name: str
) -> list[dict[str, Any]]:
    """Return, for a step of the given KL either way: its effect on the metric and the share of
    its KL away from the verb.
    """
    rows = []
    prompts, verb = torch.arange(len(pairs)), pairs.last
    with torch.no_grad():
        before = whole.output()[prompts, verb].gather(1, pairs.answers).diff(dim=1)[:, 0]
        for sign in (1, -1):
            amount = step_of_divergence(whole, sign * direction, config.kl)
            values = divergence_of_step(whole, sign * direction, amount)
            after = (
                whole.moved(direction, sign * amount)[prompts, verb]
                .gather(1, pairs.answers)
                .diff(dim=1)[:, 0]
            )
            away = 1 - float(values[prompts, verb].sum() / values.sum())
            change = (after - before).double()
            rows.append(
                {
                    "direction": name,
                    "step": sign * amount,
                    "effect": float(change.abs().mean()),
                    "towards the other number": float(change.mean()),
                    "away": away,
                }
            )
    return rows


def _contexts(
    model: LanguageModel,
    found: Decomposition,
    pairs: Pairs,
    rows: Tensor,
    positions: Tensor,
    count: int = 5,
) -> pl.DataFrame:
    entries = []
    for index in range(found.directions.shape[0]):
        for sample, share in ev.top_inputs(found.activity, index, count):
            row, position = int(rows[found.kept[sample]]), int(positions[found.kept[sample]])
            text = model.tokenizer.decode(pairs.clean[row, : position + 1].tolist())
            entries.append(
                {"direction": index, "share": share, "context": text, "case": pairs.texts[row].case}
            )
    return pl.DataFrame(entries)


def _by_position(found: Decomposition, positions: Tensor) -> pl.DataFrame:
    where = positions[found.kept]
    return pl.DataFrame(
        [
            {
                "direction": index,
                "position": int(position),
                "share": float(found.activity[where == position, index].mean()),
            }
            for index in range(found.directions.shape[0])
            for position in where.unique()
        ]
    )
