"""The channels study: train a bilinear classifier, attribute and ablate every channel, bound and
calibrate the error.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import polars as pl
import torch

from assay.attribution import Gradient, SecondOrder, attribute
from assay.audit import Audit, areas, curve, keep_top, worst_case
from assay.audit.risk import calibrate_risk
from assay.io.runs import Run
from assay.learn import cosine, fit
from assay.mechanisms.channels import ChannelMechanisms, channels
from assay.mechanisms.channels.attribution import hoyer
from assay.mechanisms.channels.interaction import interaction_matrix
from assay.mechanisms.channels.objective import Training, make_objective, make_optimizer
from assay.studies import runner
from assay.studies.channels.config import Config
from assay.studies.channels.evaluation import evaluate
from assay.studies.channels.page import headline, sections
from assay.targets.bilinear import BilinearNetwork
from assay.targets.data import Data, load_arrays, load_digits

__all__ = ["Config", "check", "contexts", "headline", "load", "run", "sections"]


def check(config: Config) -> None:
    """Refuse data or sizes that cannot be trained on, and too few examples for the bars."""
    data = _data(config)
    _model(config, data)
    config.audit.require_bars(len(data.test_x))


def run(config: Config, run: Run) -> dict[str, Any]:
    """Train, open and report; every table is saved for the report and for the verbs over saved
    runs.
    """
    data = _data(config)
    model = _train(config, data, run)
    mechanisms = _bind(config, model, data)
    clean = mechanisms.clean
    with torch.no_grad():
        accuracy = float(
            (model.double()(data.test_x.double()).argmax(-1) == data.test_y).double().mean()
        )
    sparsity, defined = hoyer(mechanisms.attributions())
    by_block = (sparsity.sum(0) / defined.sum(0).clamp(min=1)).tolist()
    found = evaluate(clean, top=config.audit.top, tolerance=config.audit.tolerance)
    run.save_table("channels.parquet", found.table)
    first = attribute(mechanisms, Gradient())
    audits = {
        "first": first.audit(exact=config.audit.exact, alpha=config.audit.alpha, seed=config.seed)
    }
    if clean.weights.gate is None:
        second = attribute(mechanisms, SecondOrder())
        scales = (
            {"certificate": mechanisms.by_group(found.second_bound)}
            if found.second_bound is not None
            else None
        )
        audits["second"] = second.audit(
            exact=config.audit.exact, alpha=config.audit.alpha, seed=config.seed, scales=scales
        )
    for name, audit in audits.items():
        run.save_table(f"audit-{name}.parquet", audit.table)
    run.save_table("scores.parquet", first.table())
    faithful = curve(first, (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0), per_example=True)
    run.save_table("faithfulness.parquet", faithful)
    faces = _faces(mechanisms, data)
    if faces is not None:
        run.save_table("faces.parquet", faces)
    run.save_table("coverage.parquet", _coverage(audits))
    worst = worst_case(mechanisms, keep_top(first, 0.2, per_example=True), steps=10, restarts=3)
    threshold = _threshold(config, found.table)
    return {
        "accuracy": accuracy,
        "hoyer": sum(by_block) / len(by_block),
        "hoyer_by_block": by_block,
        "top": found.summary,
        "certified_share": found.certified,
        "not_available": found.refused,
        "agreement": {name: audit.pooled.to_dict() for name, audit in audits.items()},
        "bars": {name: audit.summary()["bars"] for name, audit in audits.items()},
        "calibrated_threshold": threshold,
        "faithfulness": areas(faithful),
        "worst_case": {
            "kept_share": 0.2,
            "mean_damage_at_least": float(worst.damage.mean()),
            "evaluations": worst.evaluations,
        },
        "functional": config.audit.functional,
        "examples": len(mechanisms.batch),
    }


def load(run: Run) -> ChannelMechanisms:
    """Bind the channels of a saved run to its held-out examples again."""
    config = runner.config_of(run)
    data = _data(config)
    model = _model(config, data)
    model.load_state_dict(run.tensors("model.safetensors"))
    return _bind(config, model, data)


def contexts(run: Run) -> pl.DataFrame:
    """Describe the examples that the run's channels were bound to: label and prediction."""
    mechanisms = load(run)
    names = _data(runner.config_of(run)).names
    clean = mechanisms.clean
    labels, guesses = clean.labels.tolist(), clean.logits.argmax(-1).tolist()
    return pl.DataFrame(
        {
            "example": range(len(labels)),
            "label": [names[index] for index in labels],
            "prediction": [names[index] for index in guesses],
        }
    )


def _data(config: Config) -> Data:
    if config.data.path is None:
        return load_digits()
    return load_arrays(config.data.path, train=config.data.train)


def _model(config: Config, data: Data) -> BilinearNetwork:
    generator = torch.Generator().manual_seed(config.seed)
    image = data.image if config.model.patch is not None else None
    return BilinearNetwork(
        data.inputs, data.classes, **config.model.model_dump(), image=image, generator=generator
    )


def _train(config: Config, data: Data, run: Run) -> BilinearNetwork:
    model = _model(config, data)
    training = Training(**config.training.model_dump())
    generator = torch.Generator().manual_seed(config.seed + 1)
    objective = make_objective(model, data, training, generator)
    optimizer = make_optimizer(model, training)
    fit(
        model,
        objective,
        optimizer,
        steps=training.steps,
        generator=generator,
        schedule=cosine,
        run=run,
        log_every=training.log_every,
    )
    run.save_tensors("model.safetensors", model.state_dict())
    return model


def _bind(config: Config, model: BilinearNetwork, data: Data) -> ChannelMechanisms:
    count = config.audit.examples
    # Float64: the certificates are about the computed numbers, and the identity is exact to 1e-10
    # only there.
    return channels(
        model.double(), data.test_x[:count].double(), data.test_y[:count], config.audit.functional
    )


def _threshold(config: Config, table: pl.DataFrame) -> dict[str, Any] | None:
    if "bound" not in table.columns:
        return None
    found = calibrate_risk(
        (table["bound"] / table["attribution"].abs()).to_numpy(),
        table["relative_error"].to_numpy(),
        table["example"].to_numpy(),
        tolerance=config.audit.tolerance,
        alpha=config.audit.risk,
        eta=config.audit.eta,
        seed=config.seed,
    )
    return asdict(found)


def _faces(mechanisms: ChannelMechanisms, data: Data, classes: int = 4) -> pl.DataFrame | None:
    """Return, for the first classes, what the first block looks for in pixels: its strongest
    eigenvector towards the class's logit.
    """
    weights = mechanisms.weights
    if (
        data.image is None
        or len(data.image) != 2
        or weights.positions > 1
        or weights.gate is not None
    ):
        return None
    height, across = data.image
    frames = []
    for index, name in list(enumerate(data.names))[:classes]:
        form = interaction_matrix(weights, 0, weights.head[index])
        seen = (form.vectors[:, 0] @ weights.embed).reshape(height, across)
        place = torch.cartesian_prod(torch.arange(height), torch.arange(across))
        columns = {
            "row": place[:, 0].tolist(),
            "column": place[:, 1].tolist(),
            "value": seen.flatten().tolist(),
        }
        frames.append(
            pl.DataFrame(columns).with_columns(
                pl.lit(name).alias("class"), pl.lit(float(form.values[0])).alias("eigenvalue")
            )
        )
    return pl.concat(frames)


def _coverage(audits: dict[str, Audit], resplits: int = 20) -> pl.DataFrame:
    """Return coverage and width of the bars by level, means over random resplits of the inputs
    with their spread.
    """
    rows = []
    for name, audit in audits.items():
        for alpha in (0.5, 0.4, 0.3, 0.2, 0.1, 0.05):
            again = [audit.at_level(alpha, seed=seed) for seed in range(resplits)]
            coverage, width = (
                torch.tensor([getattr(entry, key) for entry in again])
                for key in ("coverage", "width")
            )
            error = 2 * float(coverage.std()) / resplits**0.5
            mean = float(coverage.mean())
            bounds = {"low": mean - error, "high": mean + error}
            rows.append(
                {
                    "estimate": name,
                    "nominal": 1 - alpha,
                    "measured": mean,
                    **bounds,
                    "width": float(width.mean()),
                }
            )
    return pl.DataFrame(rows)
