"""What a decomposition of a toy network is measured by, and what of it a run keeps."""

from __future__ import annotations

from typing import Any

import polars as pl
import torch
from torch import Tensor, nn

from assay.io.runs import Run
from assay.mechanisms.components import Decomposition
from assay.mechanisms.components.clustering import cluster
from assay.mechanisms.components.comparison import match_components
from assay.mechanisms.components.reconstruction import (
    climb_ladder,
    count_important,
    open_scene,
    reconstruct,
)
from assay.mechanisms.components.recovery import (
    ALIVE,
    alive,
    dense_error,
    identity_error,
    identity_order,
    monosemantic,
    probes,
    recover,
)
from assay.mechanisms.components.scene import Scene
from assay.studies.component_tables import spectrum
from assay.studies.toy_components.config import Config
from assay.targets.residual import ResidualMLP
from assay.targets.tms import TMS

SHOWN = 40
"""Features and components that the pictures show."""


def count_features(model: nn.Module) -> int:
    """Return the number of input features of a toy network."""
    if isinstance(model, ResidualMLP):
        return int(model.get_buffer("embed").shape[0])
    assert isinstance(model, TMS)
    return int(model.encoder.shape[1])


def draw_inputs(config: Config, features: int, rows: int, generator: torch.Generator) -> Tensor:
    """Draw inputs, each feature active with the target's probability: uniform on (0, 1), on
    (-1, 1) for a residual MLP.
    """
    x = torch.rand(rows, features, generator=generator)
    if config.target.kind == "residual":
        x = 2 * x - 1
    return x * (torch.rand(x.shape, generator=generator) < config.target.probability)


def open_evaluation(config: Config, model: nn.Module, found: Decomposition) -> Scene:
    """Return one batch of evaluation, the same for every decomposition of a config."""
    generator = torch.Generator().manual_seed(config.seed + 54321)
    x = draw_inputs(config, count_features(model), config.training.batch, generator)
    return open_scene(model, found, x, "mse", generator)


def measure(config: Config, model: nn.Module, found: Decomposition) -> list[dict[str, Any]]:
    """Return one row per site: alive components, agreement with the known mechanisms where there
    are any, and the whole decomposition's error under importance masks and the first adversary.
    """
    scene = open_evaluation(config, model, found)
    masked = reconstruct(scene).filter(pl.col("masks") == "ci")["divergence"].item()
    attacked = climb_ladder(scene, config.evaluation.pgd[:1])["divergence"].item()
    at_probes = found.importances(model, probes(count_features(model)))
    l0 = {row["site"]: row for row in count_important(scene.importance).to_dicts()}
    return [
        {
            **l0[name],
            "alive": int(alive(importance).sum()),
            "monosemantic": int(monosemantic(importance).sum()),
            **_known(config, model, found, name, importance),
            "divergence_ci": masked,
            "divergence_pgd": attacked,
        }
        for name, importance in at_probes.items()
    ]


def _known(
    config: Config, model: nn.Module, found: Decomposition, name: str, importance: Tensor
) -> dict[str, Any]:
    """Return how far a site of superposed features is from its known answer: one component per
    feature, or as many as an identity matrix has dimensions.
    """
    none = {"identity_error": None, "dense_error": None, "mmcs": None, "ml2r": None}
    if not isinstance(model, TMS):
        return none
    if name.startswith("hidden_layers"):
        return {**none, "dense_error": dense_error(importance, model.encoder.shape[0])}
    if not bool(alive(importance).any()):
        return {**none, "identity_error": identity_error(importance)}
    side = "inputs" if name == "linear1" else "outputs"
    recovery = recover(model, found, name, importance, features=side)  # type: ignore[arg-type]
    return {
        **none,
        "identity_error": identity_error(importance),
        "mmcs": recovery.mmcs,
        "ml2r": recovery.ml2r,
    }


def keep(
    config: Config, run: Run, model: nn.Module, found: Decomposition, others: list[Decomposition]
) -> None:
    """Save the first network, its decomposition, and the tables that the report draws."""
    generator = torch.Generator().manual_seed(config.seed + 12345)
    features = count_features(model)
    drawn = draw_inputs(config, features, 64 * config.evaluation.samples, generator)
    drawn = drawn[(drawn != 0).any(1)][: config.evaluation.samples]
    run.save_tensors("model.safetensors", dict(model.state_dict()))
    run.save_tensors("decomposition.safetensors", dict(found.state_dict()))
    run.save_tensors("inputs.safetensors", {"inputs": drawn})
    scene = open_evaluation(config, model, found)
    run.save_table("reconstruction.parquet", reconstruct(scene))
    run.save_table("ladder.parquet", climb_ladder(scene, config.evaluation.pgd))
    at_probes = found.importances(model, probes(features))
    run.save_table("importance.parquet", _importance_table(at_probes))
    run.save_table("spectrum.parquet", spectrum(scene, at_probes))
    run.save_table("factors.parquet", _factors(model, found, at_probes))
    run.save_table("clusters.parquet", _clusters(found, scene))
    frames = [
        match_components(
            found, other, (at_probes, other.importances(model, probes(features)))
        ).with_columns(pl.lit(again).alias("again"))
        for again, other in enumerate(others, 1)
    ]
    if frames:
        run.save_table("comparison.parquet", pl.concat(frames))


def summarise(config: Config, run: Run, table: pl.DataFrame) -> dict[str, Any]:
    """Return the run's summary; the worst of all networks and decompositions."""
    ladder = run.table("ladder.parquet")
    summary: dict[str, Any] = {
        "network": config.target.kind,
        "sites": table["site"].unique(maintain_order=True).to_list(),
        "components_per_site": config.components.per_site,
        "runs": table.select("network", "again").unique().height,
        "alive": _by_site(run, "alive"),
        "seconds": table["seconds"].max(),
        "divergence": {
            row["masks"]: row["divergence"]
            for row in run.table("reconstruction.parquet").to_dicts()
        },
        "pgd": {str(row["steps"]): row["divergence"] for row in ladder.to_dicts()},
    }
    if config.target.kind == "tms":
        ends = table.filter(pl.col("identity_error").is_not_null())
        encoder = table.filter(pl.col("site") == "linear1")
        summary |= {
            "identity_error": ends["identity_error"].max(),
            "mmcs": ends["mmcs"].min(),
            "ml2r": [encoder["ml2r"].min(), encoder["ml2r"].max()],
            "ml2r_decoder": [
                table.filter(pl.col("site") == "linear2")["ml2r"].min(),
                table.filter(pl.col("site") == "linear2")["ml2r"].max(),
            ],
            "dense_error": table["dense_error"].max(),
        }
    else:
        inner = table.filter(pl.col("site").str.ends_with("mlp_in"))
        together = inner.group_by("network", "again").agg(pl.col("monosemantic").sum())
        summary |= {
            "monosemantic_w_in": [
                together["monosemantic"].min(),
                together["monosemantic"].max(),
            ]
        }
    if run.has("comparison.parquet"):
        matched = run.table("comparison.parquet")["cosine"]
        summary["agreement_of_seeds"] = {
            "components": len(matched),
            "matched_above_0.9": int((matched > 0.9).sum()),
        }
    return summary


def _by_site(run: Run, column: str) -> dict[str, int]:
    first = run.table("runs.parquet").filter((pl.col("network") == 0) & (pl.col("again") == 0))
    return dict(zip(first["site"].to_list(), first[column].to_list(), strict=True))


def _importance_table(at_probes: dict[str, Tensor]) -> pl.DataFrame:
    """Return the importance matrix of every site, its columns in the order nearest to the identity,
    cut to what a picture shows."""
    frames = []
    for name, importance in at_probes.items():
        order = identity_order(importance)[: int(alive(importance).sum()) + 5]
        shown = importance[:SHOWN, order[:SHOWN]].double()
        rows, columns = shown.shape
        frames.append(
            pl.DataFrame(
                {
                    "site": name,
                    "feature": [str(row) for row in range(rows) for _ in range(columns)],
                    "component": [str(c) for _ in range(rows) for c in order[:SHOWN]],
                    "importance": shown.flatten().tolist(),
                }
            )
        )
    return pl.concat(frames)


@torch.no_grad()
def _factors(model: nn.Module, found: Decomposition, at_probes: dict[str, Tensor]) -> pl.DataFrame:
    """Return V and U of the alive components, each component's two factors at the same length; the
    side of a residual stream in the basis of its features."""
    frames = []
    for site in found.sites:
        v, u = (entry.double() for entry in found.factors(site.name))
        kept = [c for c in identity_order(at_probes[site.name]) if alive(at_probes[site.name])[c]]
        kept = kept[:SHOWN]
        v, u = v[:, kept].T, u[kept]
        size = (u.norm(dim=1) / v.norm(dim=1).clamp_min(1e-30)).sqrt().unsqueeze(1)
        sides = {"V": v * size, "U": u / size.clamp_min(1e-30)}
        if isinstance(model, ResidualMLP):
            embed = model.get_buffer("embed").double()
            side = "V" if site.name.endswith("mlp_in") else "U"
            sides[side] = sides[side] @ embed.T
        for side, values in sides.items():
            shown = values[:, :SHOWN]
            frames.append(
                pl.DataFrame(
                    {
                        "site": site.name,
                        "side": side,
                        "component": [str(c) for c in kept for _ in range(shown.shape[1])],
                        "entry": [str(i) for _ in kept for i in range(shown.shape[1])],
                        "value": shown.flatten().tolist(),
                    }
                )
            )
    return pl.concat(frames)


def _clusters(found: Decomposition, scene: Scene) -> pl.DataFrame:
    """Return clusters of components that are important together, over all sites."""
    flags, names = [], []
    for site in found.sites:
        active = scene.importance[site.name] > ALIVE
        some = active.any(0).nonzero()[:, 0].tolist()
        flags.append(active[:, some])
        names += [f"{site.name}[{c}]" for c in some]
    schema = {"cluster": pl.Int64, "size": pl.Int64, "share": pl.Float64, "members": pl.String}
    active = torch.cat(flags, 1)
    if not names:
        return pl.DataFrame(schema=schema)
    clusters = cluster(active)
    rows = [
        {
            "cluster": index,
            "size": len(own),
            "share": float(active[:, list(own)].any(1).double().mean()),
            "members": ", ".join(names[member] for member in own),
        }
        for index, own in enumerate(clusters.members)
    ]
    return pl.DataFrame(rows, schema=schema).sort("share", descending=True)
