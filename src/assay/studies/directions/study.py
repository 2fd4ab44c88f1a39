"""The directions study: directions in chosen weights of any causal language model, on any text,
labelled by where they act.
"""

from __future__ import annotations

from typing import Any

import polars as pl
import torch
from torch import Tensor

from assay.core.target import Target
from assay.errors import InputError
from assay.io.runs import Run
from assay.io.texts import read_text
from assay.mechanisms.directions import (
    DirectionMechanisms,
    Local,
    PowerIteration,
    around,
    decompose,
    quadratic_forms,
    token_gradients,
)
from assay.mechanisms.directions import directions as bind
from assay.mechanisms.directions import evaluation as ev
from assay.mechanisms.directions.decomposition import Decomposition
from assay.mechanisms.directions.steps import divergence_of_step
from assay.studies import runner
from assay.studies.directions.config import Config
from assay.studies.directions.page import headline, sections
from assay.targets.language import LanguageModel, load_language_model, require_context
from assay.targets.metrics import loss, text_batch

__all__ = ["Config", "check", "contexts", "headline", "load", "run", "sections"]


def check(config: Config) -> None:
    """Refuse nothing more than the config does."""


def run(config: Config, run: Run) -> dict[str, Any]:
    """Find directions, label them by the contexts they act on, and measure how much a step
    leaves other contexts alone.
    """
    model, ids = _inputs(config)
    generator = torch.Generator().manual_seed(config.seed)
    positions = torch.randint(
        config.data.length // 4, config.data.length - 1, (len(ids),), generator=generator
    )
    local = around(model.model, {"input_ids": ids}, config.parameters, positions=positions)
    room = min(local.space.size, local.samples * config.references)
    if config.k > room:
        raise InputError(
            f"k = {config.k} directions, and the gradients and parameters here allow at most {room}"
        )
    output = _outputs(local)
    found = [_decompose(config, local, output, seed) for seed in range(config.seeds)]
    first = found[0]
    tensors = {
        "directions": first.directions,
        "scores": first.scores,
        "activity": first.activity,
        "kept": first.kept,
    }
    run.save_tensors("directions.safetensors", {**tensors, "ids": ids, "positions": positions})
    table = _table(config, model, local, first, ids, positions)
    run.save_table("directions.parquet", table)
    run.save_table("contexts.parquet", _contexts(model, first, ids, positions))
    kept = max(2, min(first.count, config.k))
    return {
        "family": model.family,
        "parameters": {"count": local.space.size, "names": list(local.space.names)},
        "windows": len(ids),
        "k": config.k,
        "k_chosen": first.count,
        "k_interval": list(first.interval),
        "error": 1 - float(first.activity.sum(1).mean()),
        "active_per_context": float(ev.effective_directions(first.activity).mean()),
        "stability": (
            ev.stability([one.directions[:kept] for one in found]) if len(found) > 1 else None
        ),
        "selectivity": _mean(table["selectivity"].head(first.count)),
    }


def _mean(values: pl.Series) -> float | None:
    """Return the mean, none where no direction is clear."""
    found = values.mean()
    return float(found) if isinstance(found, float) else None


def load(run: Run) -> DirectionMechanisms:
    """Bind the directions of a saved run to its windows; the metric is the loss of each window."""
    config = runner.config_of(run)
    tensors = run.tensors("directions.safetensors")
    assert config.target.path is not None
    model = load_language_model(config.target.path)
    target = Target(model.model, loss, model.path)
    return bind(
        target,
        text_batch(tensors["ids"]),
        parameters=config.parameters,
        found=tensors["directions"],
    )


def contexts(run: Run) -> pl.DataFrame:
    """Describe the windows that the run's directions were bound to."""
    config = runner.config_of(run)
    assert config.target.path is not None
    tokenizer = load_language_model(config.target.path).tokenizer
    ids = run.tensors("directions.safetensors")["ids"]
    return pl.DataFrame(
        {"example": range(len(ids)), "text": [tokenizer.decode(row.tolist()) for row in ids]}
    )


def _inputs(config: Config) -> tuple[LanguageModel, Tensor]:
    assert config.target.path is not None
    assert config.data.path is not None
    model = load_language_model(config.target.path)
    require_context(model.model, config.data.length, "set data.length lower")
    ids = read_text(config.data.path, model.tokenizer, length=config.data.length)
    if len(ids) < 2:
        raise InputError(
            f"{config.data.path} fills {len(ids)} window of {config.data.length} tokens; pair"
            " gradients need at least 2"
        )
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(config.seed))
    return model, ids[order[: config.data.windows]]


def _outputs(local: Local, chunk: int = 16) -> Tensor:
    with torch.no_grad():
        return torch.cat(
            [
                local.take(slice(first, first + chunk)).output()
                for first in range(0, local.samples, chunk)
            ]
        )


def _decompose(config: Config, local: Local, output: Tensor, seed: int) -> Decomposition:
    generator = torch.Generator().manual_seed(config.seed + seed)
    drawn = torch.randint(1, local.samples, (local.samples, config.references), generator=generator)
    others = (torch.arange(local.samples)[:, None] + drawn) % local.samples
    factors = token_gradients(local, "kl", towards=output[others], chunk=16)
    return decompose(factors, PowerIteration(config.k), generator=generator)


def _table(
    config: Config,
    model: LanguageModel,
    local: Local,
    found: Decomposition,
    ids: Tensor,
    positions: Tensor,
    own: int = 8,
) -> pl.DataFrame:
    """Return one row per direction: score, the outputs it writes to, and how selective a step of
    the given KL is.
    """
    rows = []
    curvature = quadratic_forms(local, found.directions.to(torch.float32), "kl").double().mean(0)
    for index, direction in enumerate(found.directions):
        top = [int(found.kept[sample]) for sample, _ in ev.top_inputs(found.activity, index, own)]
        words = ev.top_outputs(local, direction, top[0], 6)
        # To second order the mean KL of this step is the one asked for; what it really is stands in
        # the table.
        amount = (2 * config.kl / max(float(curvature[index]), 1e-12)) ** 0.5
        values = divergence_of_step(local, direction, amount, chunk=16)[:, 0]
        mine = torch.zeros(local.samples, dtype=torch.bool)
        mine[top] = True
        rows.append(
            {
                "direction": index,
                "score": float(found.scores[index]),
                "raises": " ".join(_word(model, token) for token, change in words if change > 0),
                "lowers": " ".join(_word(model, token) for token, change in words if change < 0),
                "step": amount,
                "own KL": float(values[mine].mean()),
                "other KL": float(values[~mine].mean()) if bool((~mine).any()) else float("nan"),
            }
        )
    return pl.DataFrame(rows).with_columns(
        selectivity=pl.col("own KL") / (pl.col("own KL") + pl.col("other KL"))
    )


def _contexts(
    model: LanguageModel, found: Decomposition, ids: Tensor, positions: Tensor, count: int = 5
) -> pl.DataFrame:
    """Return the contexts on which each direction holds the largest share of the gradient."""
    rows = []
    for index in range(found.directions.shape[0]):
        for sample, share in ev.top_inputs(found.activity, index, count):
            window = int(found.kept[sample])
            here = int(positions[window])
            before = model.tokenizer.decode(ids[window, max(0, here - 9) : here + 1].tolist())
            after = model.tokenizer.decode([int(ids[window, here + 1])])
            rows.append({"direction": index, "share": share, "context": before, "next": after})
    return pl.DataFrame(rows)


def _word(model: LanguageModel, token: int) -> str:
    return repr(model.tokenizer.decode([token]))
