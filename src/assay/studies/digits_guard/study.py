"""The digits guard study: what a guard accepts and rejects, from nothing on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import polars as pl
import torch
from torch import Tensor

from assay.core.target import Batch, target
from assay.guard import Guard, Observed, fit
from assay.guard.bounded import prune_weights, site
from assay.guard.explanations import Explanation, Refused, explained_table
from assay.guard.files import save
from assay.guard.gates import last_column_off, swaps
from assay.guard.proposals import Proposal, judge, predict
from assay.guard.quantise import quantise
from assay.guard.tables import interval
from assay.guard.wrapper import hash_of
from assay.io.runs import Run
from assay.mechanisms.nodes import nodes
from assay.studies.digits_guard import measures
from assay.studies.digits_guard.config import Config
from assay.studies.digits_guard.latents import train_latents
from assay.studies.digits_guard.page import headline, sections
from assay.studies.digits_guard.scene import (
    SITES,
    Scene,
    families,
    reading,
    scene,
    splits,
    train,
    triggered,
)

__all__ = ["Config", "check", "headline", "run", "sections"]

PAIRS = 20  # proposals that are made from weights


def check(config: Config) -> None:
    """Refuse nothing more than the config does."""


def run(config: Config, run: Run) -> dict[str, Any]:
    """Fit guards of all networks, measure them, and save what the report shows."""
    scored: list[dict[str, Any]] = []
    accepted: list[dict[str, Any]] = []
    first: tuple[Scene, Guard, dict[str, Observed]] | None = None
    for index in range(config.model.networks):
        here = scene(config, index, run)
        parts = {name: here.split(name) for name in here.x}
        admitted, refused, predictions = _proposed(config, here, parts)
        guard = _fit(config, here, parts, admitted, refused)
        if first is None:
            first = here, guard, parts
            run.save_table("proposals.parquet", pl.DataFrame(predictions))
        rows, through = _families(config, here, guard, parts, index)
        scored += [{"network": index, **row} for row in rows]
        accepted += [{"network": index, **row} for row in through]
    assert first is not None
    here, guard, parts = first
    run.write_files(lambda folder: save(folder, guard))
    run.save_table("detectors.parquet", pl.DataFrame(scored))
    run.save_table("acceptance.parquet", pl.DataFrame(accepted))
    best = measures.winners(pl.DataFrame(scored))
    run.save_table("winners.parquet", best)
    curve = measures.learning_curve(guard, parts, config.guard.settings())
    run.save_table("curve.parquet", curve)
    run.save_table(
        "explanations.parquet", explained_table(guard.explanations, guard.refused, guard.names)
    )
    pool = here.observed(torch.cat([here.x["calibration"], here.x["held out"]]))
    share = len(parts["calibration"]) / len(pool)
    level = measures.level_over_resplits(guard, pool, config.resplits, share, config.seed)
    modes = _modes(config, here, parts)
    run.save_table("modes.parquet", pl.DataFrame(modes))
    backdoor = _backdoor(config, run)
    run.save_table("backdoor.parquet", pl.DataFrame(backdoor))
    held = guard(parts["held out"])
    return {
        "accuracy": here.accuracy,
        "accepted_without_explanations": curve["accepted"][0],
        "explanations": len(guard.explanations),
        "mechanistic": sum(one.sort == "mechanistic" for one in guard.explanations),
        "bits": guard.bits,
        "held_out": held.summary(),
        "ninety": measures.first_at(curve, 0.9),
        "level": level,
        "mean_auroc": float(best["combination"].mean()),  # type: ignore[arg-type]
        "worst_difference": float(best["difference"].min()),  # type: ignore[arg-type]
        "weights": _weights(config, here),
        "backdoor": {row["laboratory"]: row for row in backdoor},
        "agreement": _agreement(config, run),
        "theta": config.guard.theta,
        "delta": config.guard.delta,
        "alpha": config.guard.alpha,
        "needed": guard.figures["needed"],
        "networks": config.model.networks,
    }


def _fit(
    config: Config,
    here: Scene,
    parts: dict[str, Observed],
    admitted: list[Explanation] | None = None,
    refused: list[Refused] | None = None,
) -> Guard:
    return fit(
        parts["laboratory"],
        parts["fresh"],
        parts["calibration"],
        config.guard.settings(),
        given=admitted or (),
        refused=refused or (),
        model_hash=hash_of(here.model),
        reading=here.reading.to_json(),
    )


def _proposed(
    config: Config, here: Scene, parts: dict[str, Observed]
) -> tuple[list[Explanation], list[Refused], list[dict[str, Any]]]:
    """Propose that units of the first layer fire those of the second that they drive most, and
    judge what gates predict of it: predictions come from laboratory inputs, the trial from the
    fresh split.
    """
    x = here.x["laboratory"]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(config.seed))
    chosen = config.guard
    quantiser = quantise(parts["laboratory"].values, chosen.bins, least=chosen.least)
    bound = nodes(
        target(here.model, lambda output, batch: output[:, 0]),
        Batch(x),
        Batch(x[order]),
        SITES,
        neurons=SITES,
    )
    plain = replace(here.reading, logits=False)
    swap = swaps(
        bound, plain, quantiser, parts["laboratory"].take(order), last_column_off(plain, None)
    )
    names = plain.names
    fires = quantiser(parts["laboratory"].values) >= quantiser.fires
    fresh = quantiser(parts["fresh"].values) >= quantiser.fires
    rates = fires.double().mean(0)
    admitted: list[Explanation] = []
    refused: list[Refused] = []
    rows = []
    for proposal in _by_weight(here, names, rates):
        prediction = predict(proposal, swap, names)
        rate = float(rates[names.index(proposal.effect)])
        found = judge(prediction, rate, fresh, names)
        taken = isinstance(found, Explanation)
        admitted += [found] if isinstance(found, Explanation) else []
        refused += [found] if isinstance(found, Refused) else []
        one = found if isinstance(found, Explanation) else found.explanation
        rows.append(
            {
                "cause": proposal.cause,
                "effect": proposal.effect,
                "effect alone": rate,
                "predicted": prediction.value,
                "low": prediction.low,
                "high": prediction.high,
                "fresh split": one.observed,
                "bits": one.bits,
                "admitted": taken,
                "reason": "" if isinstance(found, Explanation) else found.reason,
            }
        )
    return admitted, refused, rows


def _by_weight(here: Scene, names: tuple[str, ...], rates: Tensor) -> list[Proposal]:
    """Return the pairs of units in which the first, when it fires, adds most to the second in units
    of the spread of its input; every unit once, among those that fire sometimes.
    """
    weight = dict(here.model.named_parameters())["2.weight"].detach()
    width = weight.shape[1]
    first = here.model[:2](here.x["laboratory"])
    spread = here.model[:3](here.x["laboratory"]).std(0)
    fired = first.sum(0) / (first > 0).sum(0).clamp_min(1)
    alive = (rates > 0.05) & (rates < 0.95)
    size = weight * fired / spread[:, None] * alive[None, :width] * alive[width:, None]
    found: list[Proposal] = []
    used: set[int] = set()
    for place in size.flatten().argsort(descending=True).tolist():
        effect, cause = divmod(place, width)
        if cause in used or width + effect in used or size[effect, cause] <= 0:
            continue
        used |= {cause, width + effect}
        found.append(Proposal(names[cause], names[width + effect]))
        if len(found) == PAIRS:
            break
    return found


def _families(
    config: Config, here: Scene, guard: Guard, parts: dict[str, Observed], index: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    anomalies = list(families(config, here, config.seed + index))
    latents = train_latents(parts["laboratory"].values, seed=config.seed)
    codes = {
        name: latents.encode(data.values)
        for name, data in [
            ("laboratory", parts["laboratory"]),
            ("held out", parts["held out"]),
            *anomalies,
        ]
    }
    outside = {measures.LATENTS: measures.latent_scores(codes, "laboratory")}
    return measures.family_rows(guard, parts["held out"], anomalies, outside)


def _modes(config: Config, here: Scene, parts: dict[str, Observed]) -> list[dict[str, Any]]:
    """Return what every mode accepts, for a guard of the second hidden layer alone, which bounds
    know: of laboratory inputs, of these with one activation changed, and of held-out inputs.
    """
    width = config.model.second
    columns = list(range(config.model.first, config.model.first + width))
    last = {name: data.columns(columns) for name, data in parts.items()}
    domain = (torch.zeros(64), torch.ones(64))
    place = site(here.model, 4, domain)
    edited = _edited(here, last["laboratory"].take(slice(0, 24)), config.seed)
    rows = []
    for modes in (
        (),
        ("memorise",),
        ("single-edit",),
        ("constant",),
        ("constant", "marginal"),
        ("constant", "add"),
        ("constant", "marginal", "add", "prune"),
    ):
        settings = config.guard.settings(modes)
        guard = fit(last["laboratory"], last["fresh"], last["calibration"], settings).attach(place)
        shares = {
            name: float(guard(data).accepted.double().mean())
            for name, data in (
                ("laboratory", last["laboratory"]),
                ("one activation changed", edited),
                ("held out", last["held out"]),
            )
        }
        words = ", ".join(modes) or "none"
        rows.append({"modes": words, "explanations": len(guard.explanations), **shares})
    return rows


def _edited(here: Scene, data: Observed, seed: int) -> Observed:
    """Return inputs with one activation of each moved by up to twice the largest there."""
    generator = torch.Generator().manual_seed(seed)
    values = data.values.clone()
    columns = torch.randint(values.shape[1], (len(values),), generator=generator)
    moved = 2 * float(values.max()) * torch.rand(len(values), generator=generator)
    values[torch.arange(len(values)), columns] = moved
    return Observed(values, data.names, here.model[4:](values))


def _weights(config: Config, here: Scene) -> dict[str, Any]:
    """Return how many weights provably do nothing, and how far the pruned network's logits moved on
    held-out digits beside the proved most.
    """
    domain = (torch.zeros(64), torch.ones(64))
    found = prune_weights(here.model, domain, config.tolerance)
    x = here.x["held out"]
    return {
        "weights": found.weights,
        "inactive": found.inactive,
        "redundant": found.redundant,
        "proved_most": found.moved,
        "moved": float((found.model(x) - here.model(x)).abs().max()),
    }


def _backdoor(config: Config, run: Run) -> list[dict[str, Any]]:
    """Train a network with a backdoor, and return what its guard accepts of clean and of triggered
    held-out digits, with and without triggered inputs in the laboratory.
    """
    chosen = config.backdoor
    x, y, novel = splits(config, config.data.novel, config.seed)
    share = chosen.share
    poisoned, labels = x["laboratory"].clone(), y["laboratory"].clone()
    poison = _some(len(poisoned), share, config.seed)
    poisoned[poison] = triggered(poisoned[poison])
    labels[poison] = chosen.target
    model = train(config, poisoned, labels, config.seed, run, "backdoor")
    here = Scene(model, reading(config), x, y, novel)
    outside = y["held out"] != chosen.target
    attack = triggered(x["held out"][outside])
    rows = []
    for name, carried in (("clean", 0.0), ("with triggered inputs", share)):
        parts = {}
        for at, part in enumerate(("laboratory", "fresh", "calibration")):
            inputs = x[part].clone()
            some = _some(len(inputs), carried, config.seed + at)
            inputs[some] = triggered(inputs[some])
            parts[part] = here.observed(inputs)
        guard = _fit(config, here, parts)
        clean, struck = guard(here.split("held out")), guard(here.observed(attack))
        low, high = interval(int(struck.accepted.sum()), len(struck))
        rows.append(
            {
                "laboratory": name,
                "triggered digits sent to the target": float(
                    (model(attack).argmax(1) == chosen.target).double().mean()
                ),
                "clean accuracy": here.accuracy,
                "clean accepted": float(clean.accepted.double().mean()),
                "triggered accepted": float(struck.accepted.double().mean()),
                "low": low,
                "high": high,
                "triggered inputs": len(struck),
            }
        )
    return rows


def _some(count: int, share: float, seed: int) -> Tensor:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + 1))
    return order[: round(share * count)]


def _agreement(config: Config, run: Run) -> dict[str, Any] | None:
    """Measure a guard of the agreement model on sentences outside of its grammar."""
    if config.agreement == "none":
        return None
    # Language models take seconds to import, and the digits need none.
    from assay.studies.digits_guard.language import agreement_guard

    settings = replace(config.guard.settings(), roots=32)
    guard, held, strange = agreement_guard(run, config.agreement, settings, config.seed)
    scored, accepted = measures.family_rows(guard, held, strange, {})
    run.save_table("agreement_detectors.parquet", pl.DataFrame(scored))
    run.save_table("agreement_acceptance.parquet", pl.DataFrame(accepted))
    best = measures.winners(pl.DataFrame(scored))
    run.save_table("agreement_winners.parquet", best)
    return {
        "explanations": len(guard.explanations),
        "held_out": guard(held).summary(),
        "mean_auroc": float(best["combination"].mean()),  # type: ignore[arg-type]
        "worst_difference": float(best["difference"].min()),  # type: ignore[arg-type]
    }
