"""Components against transcoders on the MLPs of the agreement model at equal bits, under the same
objective each: both layer by layer (the error of an MLP's output as a share of its variance), and
both end to end (KL of the network's output).

Bits of one position: `sum_s E[log2 C(n_s, k_s)] + k q + p P / N`, for k of n parts that are active
at a matrix or MLP s, q bits for each active one's number (a transcoder's feature, a component's
importance), and P trained numbers of p bits (dictionary, encoder or importance function), shared by
N = 1,000,000 positions. q and p are the smallest at which KL moves by less than 1 %. The KL of
transcoders at the bits of a decomposition is interpolated in log KL between their settings.

What is measured: the KL of held-out sentences with both MLPs replaced, by transcoders or by the
components at their importances. FOLDER keeps the model and every row; a second call goes on.
Run: python benchmarks/components_transcoders.py FOLDER [--steps 150]"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor, nn

from assay.dictionaries import Placed, architecture
from assay.dictionaries import settings as dictionary_settings
from assay.dictionaries.splicing import logits_of, splice
from assay.dictionaries.training import train as train_dictionaries
from assay.io.runs import Run
from assay.learn.reading import Reader, rows_of
from assay.mechanisms import components
from assay.mechanisms.components.initial import start_at_singular
from assay.mechanisms.components.masks import Mask, run_masked
from assay.mechanisms.components.reconstruction import open_scene
from assay.mechanisms.components.scene import diverge
from assay.studies import runner
from assay.studies.components.inputs import Inputs, prepare

SHARED_BY = 1_000_000
PER_SITE, FEATURES, HIDDEN = 64, 256, 128
ACTIVE = (1, 2, 4, 8, 16, 32)
COEFFICIENTS = {
    "layerwise": (3e-3, 1e-2, 3e-2, 1e-1),
    "end to end": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}
LAYERS = (0, 1)
PRECISIONS = range(1, 17)


class Coded:
    """What replaces the MLPs: its KL with active numbers of `bits` bits, and the active parts."""

    modules: list[nn.Module]
    sizes: list[int]

    def run(self, bits: int | None) -> tuple[float, list[Tensor]]:
        """Return the mean KL, and the number of active parts (positions,) of every site."""
        raise NotImplementedError


class Transcoders(Coded):
    def __init__(self, inputs: Inputs, placed: dict[str, Placed]) -> None:
        self.inputs, self.splice = inputs, splice(inputs.model.model, placed)
        self.placed = placed
        self.modules = [one.dictionary for one in placed.values()]
        self.sizes = [one.dictionary.size for one in placed.values()]

    def run(self, bits: int | None) -> tuple[float, list[Tensor]]:
        held = self.inputs.held
        kept = self.inputs.kept(held)
        found: dict[str, Tensor] = {}

        def put(name: str, x: Tensor) -> Tensor:
            dictionary = self.placed[name].dictionary
            features = dictionary.encode(x)
            features = rounded(features / features.max(), bits) * features.max()
            found[name] = (features > 0).sum(-1)
            return dictionary.decode(features, x)

        output = logits_of(self.splice.run(rows_of(held, kept), put))
        return _kl(self.inputs, output), list(found.values())


class Parts(Coded):
    def __init__(self, inputs: Inputs, found: components.Decomposition) -> None:
        self.inputs, self.found = inputs, found
        self.modules = [found]
        self.sizes = [site.components for site in found.sites]

    def run(self, bits: int | None) -> tuple[float, list[Tensor]]:
        rows = self.inputs.rows(self.inputs.held)
        scene = open_scene(self.inputs.model.model, self.found, rows, "kl", torch.Generator())
        importance = {name: rounded(g, bits) for name, g in scene.importance.items()}
        masks = {name: Mask(g, g.new_zeros(())) for name, g in importance.items()}
        output = run_masked(self.inputs.model.model, rows.inputs, self.found, masks)
        kept = self.inputs.kept(self.inputs.held)
        return _kl(self.inputs, output), [(g[kept] > 0).sum(-1) for g in importance.values()]


def _kl(inputs: Inputs, output: Tensor) -> float:
    rows = inputs.rows(inputs.held)
    clean = logits_of(inputs.model.model(**rows.inputs))
    return float(diverge(output, clean, "kl")[inputs.kept(inputs.held)].mean())


def rounded(values: Tensor, bits: int | None) -> Tensor:
    """Round values in [0, 1] to 2^bits levels."""
    most = 1 if bits is None else 2**bits - 1
    return values if bits is None else (values * most).round() / most


@contextmanager
def stored(modules: list[nn.Module], bits: int) -> Iterator[None]:
    """Round every trained tensor to 2^bits levels between its extremes, and put it back."""
    parameters = [one for module in modules for one in module.parameters()]
    before = [one.detach().clone() for one in parameters]
    try:
        for one in parameters:
            low, high = one.data.min(), one.data.max()
            width = (high - low).clamp_min(1e-12)
            one.data.copy_(low + width * rounded((one.data - low) / width, bits))
        yield
    finally:
        for one, old in zip(parameters, before, strict=True):
            one.data.copy_(old)


def coarsest(kl: Callable[[int], float], exact: float) -> int:
    """Return the fewest bits at which KL moves by less than 1 %."""
    return next((bits for bits in PRECISIONS if abs(kl(bits) - exact) < 0.01 * exact), 32)


@torch.no_grad()
def count_bits(coded: Coded) -> dict[str, float]:
    """Return the bits of a position, and what they are made of."""
    exact, _ = coded.run(None)

    def with_stored(bits: int) -> float:
        with stored(coded.modules, bits):
            return coded.run(None)[0]

    q = coarsest(lambda bits: coded.run(bits)[0], exact)
    p = coarsest(with_stored, exact)
    kl, active = coded.run(q)
    choices = sum(
        float(_log2_choose(size, k).mean()) for size, k in zip(coded.sizes, active, strict=True)
    )
    l0 = sum(float(k.double().mean()) for k in active)
    trained = sum(one.numel() for module in coded.modules for one in module.parameters())
    stored_bits = p * trained / SHARED_BY
    return {
        "L0": l0,
        "q": q,
        "p": p,
        "choice": choices,
        "numbers": q * l0,
        "stored": stored_bits,
        "bits": choices + q * l0 + stored_bits,
        "KL": kl,
    }


def _log2_choose(size: int, k: Tensor) -> Tensor:
    k = k.double()
    n = torch.tensor(float(size), dtype=torch.double)
    return ((n + 1).lgamma() - (k + 1).lgamma() - (n - k + 1).lgamma()) / math.log(2)


def train_transcoders(inputs: Inputs, objective: str, k: int, steps: int) -> Transcoders:
    """Train one TopK transcoder for each MLP; end to end after as many steps layer by layer."""
    width = inputs.model.model.config.n_embd
    make = architecture("topk")
    placed = {
        f"mlp.{layer}": Placed(
            make(d_in=width, size=FEATURES, d_out=width, k=k),
            f"blocks.{layer}.mlp.hook_in",
            (f"blocks.{layer}.hook_mlp_out",),
        )
        for layer in LAYERS
    }
    further = objective == "end to end"
    settings = dictionary_settings.Training(
        steps=(10 + 2 * further) * steps,
        batch=1024,
        rate=2e-3,
        end_to_end=1 / 6 if further else 0.0,
        local=0.0 if further else 1.0,
        windows=64,
    )
    rows = rows_of(inputs.ids, inputs.kept(inputs.ids))
    return Transcoders(inputs, train_dictionaries(inputs.model.model, rows, placed, settings))


def train_parts(inputs: Inputs, objective: str, coefficient: float, steps: int) -> Parts:
    """Train components of the MLPs' matrices from their singular parts."""
    model = inputs.model.model
    sites = [f"transformer.h.{layer}.mlp.c_{name}" for layer in LAYERS for name in ("fc", "proj")]
    options = {"importance": "relative", "hidden": HIDDEN}
    whole = components.decomposition(model, sites, PER_SITE, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)

    def draw(generator: torch.Generator) -> Tensor:
        return inputs.ids[torch.randint(len(inputs.ids), (64,), generator=generator)]

    def learn(
        network: nn.Module,
        found: components.Decomposition,
        rows: Callable[[torch.Generator], components.Rows],
        weight: float,
    ) -> None:
        start_at_singular(network, found, rows(generator).inputs, generator)
        components.train(
            network,
            found,
            components.Objective(
                (components.Recon(routing="subset", coefficient=weight),),
                components.SmoothL0(coefficient, gamma=0.05),
                components.Faithfulness(100.0),
                "kl" if objective == "end to end" else "mse",
            ),
            rows,
            components.Training(steps=steps, rate=1e-3, importance_rate=2e-3, warmup_steps=0),
            generator=generator,
        )

    if objective == "end to end":
        learn(model, whole, lambda generator: inputs.rows(draw(generator)), 1.0)
        return Parts(inputs, whole)
    for layer in LAYERS:
        names = [f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out"]
        read = Reader(model, names)

        def values(generator: torch.Generator, read: Reader = read) -> dict[str, Tensor]:
            ids = draw(generator)
            return read(rows_of(ids, inputs.kept(ids)))

        mlp = model.get_submodule(f"transformer.h.{layer}.mlp")
        found = components.decomposition(mlp, ["c_fc", "c_proj"], PER_SITE, **options)  # type: ignore[arg-type]
        variance = float(values(generator)[names[1]].var(0).mean())
        learn(
            mlp,
            found,
            lambda generator, values=values, name=names[0]: components.Rows(  # type: ignore[misc]
                values(generator)[name]
            ),
            1 / variance,
        )
        _copy(found, whole, 2 * layer)
    return Parts(inputs, whole)


def _copy(found: components.Decomposition, whole: components.Decomposition, first: int) -> None:
    """Copy the factors and nets of one MLP to the sites from `first` on."""
    for name, value in found.state_dict().items():
        head, _, place = name.rpartition(".")
        target = whole.state_dict()[f"{head}.{int(place) + first}"]
        target.copy_(value)


def at_equal_bits(rows: list[dict[str, Any]], bits: float) -> float | None:
    """Return the KL that rows reach at a number of bits, None outside of theirs."""
    rows = sorted(rows, key=lambda row: row["bits"])
    for left, right in itertools.pairwise(rows):
        if left["bits"] <= bits <= right["bits"]:
            share = (bits - left["bits"]) / (right["bits"] - left["bits"])
            return math.exp((1 - share) * math.log(left["KL"]) + share * math.log(right["KL"]))
    return None


def _shown(rows: list[dict[str, Any]]) -> pl.DataFrame:
    """Return rows with their numbers to three digits."""
    return pl.DataFrame(
        [
            {
                key: f"{value:.3g}" if isinstance(value, float) else value
                for key, value in row.items()
            }
            for row in rows
        ],
        infer_schema_length=None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    config = runner.load("agreement-components").config
    chosen.folder.mkdir(parents=True, exist_ok=True)
    inputs = prepare(config, Run(chosen.folder / "agreement"))
    kept = chosen.folder / f"rows-{chosen.steps}.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {(row["objective"], row["kind"], row["setting"]) for row in rows}
    for objective, coefficients in COEFFICIENTS.items():
        for kind, settings in (("components", coefficients), ("transcoders", ACTIVE)):
            for setting in settings:
                if (objective, kind, setting) in done:
                    continue
                began = time.process_time()
                coded: Coded = (
                    train_transcoders(inputs, objective, int(setting), chosen.steps)
                    if kind == "transcoders"
                    else train_parts(inputs, objective, setting, chosen.steps)
                )
                seconds = time.process_time() - began
                row = {"objective": objective, "kind": kind, "setting": setting}
                rows.append({**row, **count_bits(coded), "CPU s": seconds})
                with kept.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    pl.Config.set_tbl_rows(-1).set_tbl_cols(-1).set_tbl_width_chars(200)
    pl.Config.set_tbl_hide_dataframe_shape(True).set_tbl_hide_column_data_types(True)
    print(_shown(rows))
    equal = []
    for row in rows:
        if row["kind"] == "components":
            others = [
                other
                for other in rows
                if other["kind"] == "transcoders" and other["objective"] == row["objective"]
            ]
            theirs = at_equal_bits(others, row["bits"])
            equal.append(
                {
                    "objective": row["objective"],
                    "coefficient": row["setting"],
                    "bits": row["bits"],
                    "KL of components": row["KL"],
                    "KL of transcoders": theirs,
                    "ratio": None if theirs is None else row["KL"] / theirs,
                }
            )
    print("At equal bits")
    print(_shown(equal))


if __name__ == "__main__":
    main()
