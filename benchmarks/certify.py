"""Brackets [found, proved] of what free gates can do: channels of the digits network, units of
ReLU networks, and nodes of the agreement model, with the plain linear bound beside them.

    assay run digits-channels -o runs/digits
    assay run agreement-attribution -o runs/agreement
    OMP_NUM_THREADS=1 python benchmarks/certify.py runs/digits runs/agreement [--seconds 60]

--seconds are CPU seconds that an example may take, recomputation at level real included. The found
damages are lower bounds by a search, the proved ones upper bounds; a row prints the means over the
examples and their ratio, and of single examples the lowest ratio, the most CPU seconds and the most
boxes; "allowed" is the mean of what the last norm allows whatever the gates are, and "vacuous" says
in how many examples the proof excludes no more. A row ends early at a gap of .1 %, or with
--boxes 1 before the first split. With --compare two weaker bounds stand
beside it: "plain" is one linear bound at level float64 with the default slopes, "slopes" the same
at level real after a descent on them; neither pins an input, or splits."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from assay import Batch, attribute, certify, channels, nodes, target
from assay.attribution import Exact
from assay.bounds.search.leaves import Budget
from assay.core.mechanisms import Mechanisms
from assay.io.runs import opened
from assay.proofs.bracket import Certified
from assay.studies.runner import mechanisms_of
from assay.targets.data import load_digits

Masks = dict[str, Tensor]
Given = argparse.Namespace
"""seconds, boxes and examples; compare: whether the weaker bounds are printed too."""


def least_important(mechanisms: Mechanisms, sizes: Masks, free: int) -> Masks:
    """Keep all parts of every example but the `free` least important of those with an effect."""
    flat = torch.cat([size.flatten(1) for size in sizes.values()], 1)
    order = torch.where(flat > 0, flat, torch.inf).argsort(1)
    masks = torch.ones_like(flat, dtype=torch.bool).scatter(1, order[:, :free], False)
    masks |= flat == 0
    parts = masks.split([size[0].numel() for size in sizes.values()], 1)
    return {
        name: part.reshape(size.shape)
        for (name, size), part in zip(sizes.items(), parts, strict=True)
    }


def effect_sizes(mechanisms: Mechanisms, exact: bool) -> Masks:
    """Return |score| of every part, (examples, *axes) by group."""
    scores = attribute(mechanisms, Exact()) if exact else attribute(mechanisms)
    return {name: values.abs() for name, values in scores.values.items()}


def row(name: str, mechanisms: Mechanisms, keep: Masks, low: float | None, given: Given) -> None:
    """Print one line of the table."""
    seconds, found = given.seconds, list[Certified]()
    if given.compare:
        bare = Budget(seconds, boxes=1, steps=(0, 0), whole=0, pins=0)
        found.append(certify(mechanisms, keep, low=low, level="float64", budget=bare))
        slopes = Budget(seconds / 2, boxes=1, pins=0)
        found.append(certify(mechanisms, keep, low=low, budget=slopes))
    found.append(
        certify(mechanisms, keep, low=low, budget=Budget(seconds, gap=1e-3, boxes=given.boxes))
    )
    last = found[-1]
    each = [
        1.0 if proved == 0 else seen / proved
        for seen, proved in zip(
            last.found.values.tolist(), last.proved.values.tolist(), strict=True
        )
    ]
    print(
        f"{name:<34}{len(each):>9}{float(last.found.values.mean()):>10.4g}"
        + "".join(f"{float(r.proved.values.mean()):>10.4g}{r.ratio:>8.4f}" for r in found)
        + f"{min(each):>8.4f}{max(last.seconds):>7.1f}{max(last.boxes):>7}"
        + f"{float(last.allowed.mean()):>9.4g}{int(last.vacuous.sum()):>8}",
        flush=True,
    )


def answers(
    name: str, mechanisms: Mechanisms, keep: Masks, low: float | None, given: Given
) -> None:
    """Print how many answers are certified, broken and open."""
    budget = Budget(given.seconds, boxes=given.boxes)
    found = certify(mechanisms, keep, low=low, claim="same-answer", budget=budget)
    unbroken = int((~found.broken).sum())
    print(
        f"{name:<34}certified {int(found.certified.sum())} of {unbroken} unbroken"
        f" ({len(found.full)} examples, {int(found.open.sum())} open,"
        f" {int(found.vacuous.sum())} vacuous)",
        flush=True,
    )
    for entry in found.rows():
        if entry["verdict"] == "open":
            proved = entry["proved"]
            shown = "none" if proved is None else f"{proved:.3g}"
            print(
                f"    open: example {entry['example']}, margin in [{shown}, {entry['found']:.3g}]"
            )


class Residual(nn.Module):
    """A ReLU network of two hidden layers, the second of which is added to the first."""

    def __init__(self, generator: torch.Generator, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.first, self.second, self.head = nn.Linear(64, 47), nn.Linear(47, 47), nn.Linear(47, 10)
        self.one, self.two = nn.ReLU(), nn.ReLU()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(
                    (2 * torch.rand(parameter.shape, generator=generator) - 1)
                    / parameter.shape[-1] ** 0.5
                )

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(self.first(x))
        inner = self.two(self.second(h))
        return self.head(h + inner if self.residual else inner)


def trained(residual: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """Train on digits for 600 steps; return the network and the held-out examples."""
    data, generator = load_digits(), torch.Generator().manual_seed(0)
    model = Residual(generator, residual)
    optimiser = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.1)
    x, y = data.train_x.float(), data.train_y
    for _ in range(600):
        some = torch.randint(0, len(x), (128,), generator=generator)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[some]), y[some]).backward()
        optimiser.step()
    return model.requires_grad_(False), data.test_x.float(), data.test_y


def label_logit(output: Tensor, batch: Batch) -> Tensor:
    """Return the logit of each example's class."""
    return output.gather(1, batch.labels[:, None])[:, 0]


def head(compare: bool) -> None:
    names = ("plain", "slopes", "proved") if compare else ("proved",)
    print(
        f"{'free gates':<34}{'examples':>9}{'found':>10}"
        + "".join(f"{name:>10}{'ratio':>8}" for name in names)
        + f"{'lowest':>8}{'most s':>7}{'boxes':>7}{'allowed':>9}{'vacuous':>8}"
    )


def digits(folder: Path, given: Given) -> None:
    """The channels of the digits network, least important free, every gate in [0, 1]."""
    mechanisms = mechanisms_of(opened(folder)).take(slice(0, given.examples))
    sizes = effect_sizes(mechanisms, exact=False)
    for free in (50, 100, 200, 256):
        keep = least_important(mechanisms, sizes, free)
        row(f"digits channels, {free} of 256", mechanisms, keep, None, given)
    answers("digits channels, same answer", mechanisms, {}, None, given)


def relu(given: Given) -> None:
    """The units of two ReLU networks, zero at gate zero."""
    for residual in (False, True):
        model, x, y = trained(residual)
        batch = Batch(x[: given.examples], y[: given.examples])
        units = nodes(
            target(model, label_logit), batch, None, ["one", "two"], "zero", neurons=["one", "two"]
        )
        sizes = effect_sizes(units, exact=False)
        for free in (10, 40, 94):
            name = f"ReLU {'residual' if residual else 'plain'}, {free} free"
            row(name, units, least_important(units, sizes, free), None, given)


def corners(folder: Path, given: Given) -> None:
    """The twelve most important parts free, of networks in float64: the proof beside the largest
    damage of a corner.
    """
    saved = mechanisms_of(opened(folder)).take(slice(0, given.examples))
    network = copy.deepcopy(saved.target.model).double()
    bilinear = channels(network, saved.batch.inputs.double(), saved.batch.labels)
    cases: list[tuple[str, Mechanisms]] = [("digits channels", bilinear)]
    for residual in (False, True):
        model, x, y = trained(residual)
        batch = Batch(x[: given.examples].double(), y[: given.examples])
        goal = target(model.double(), label_logit)
        units = nodes(goal, batch, None, ["one", "two"], "zero", neurons=["one", "two"])
        cases.append((f"ReLU {'residual' if residual else 'plain'}", units))
    for name, mechanisms in cases:
        sizes = effect_sizes(mechanisms, exact=False)
        turned = {part: torch.where(size > 0, 1 / size, 0) for part, size in sizes.items()}
        keep = least_important(mechanisms, turned, 12)
        found = certify(mechanisms, keep, budget=Budget(given.seconds, gap=1e-8))
        gaps = (found.proved.values - found.found.values) / found.proved.values
        print(
            f"{name + ', 12 free, float64':<34}{len(found.full):>9} largest relative gap"
            f" {float(gaps.abs().max()):.1e}, at most {max(found.seconds):.1f} CPU s and"
            f" {max(found.boxes)} boxes",
            flush=True,
        )


def agreement(folder: Path, given: Given) -> None:
    """The nodes of the agreement model that have an effect, least important free."""
    mechanisms = mechanisms_of(opened(folder)).take(slice(0, given.examples))
    sizes = effect_sizes(mechanisms, exact=True)
    for free, low in ((5, 0.5), (5, 0.0), (10, 0.9), (10, 0.5), (10, 0.0)):
        keep = least_important(mechanisms, sizes, free)
        name = f"agreement nodes, {free} free, low {low}"
        row(name, mechanisms, keep, low, given)
        answers(name, mechanisms, keep, low, given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("digits", type=Path)
    parser.add_argument("agreement", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--examples", type=int, default=5)
    parser.add_argument("--only", choices=("digits", "relu", "corners", "agreement"))
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--boxes", type=int, default=1 << 20)
    given = parser.parse_args()
    parts: dict[str, Callable[[], None]] = {
        "digits": lambda: digits(given.digits, given),
        "relu": lambda: relu(given),
        "corners": lambda: corners(given.digits, given),
        "agreement": lambda: agreement(given.agreement, given),
    }
    began = time.process_time()
    head(given.compare)
    for name, part in parts.items():
        if given.only in (None, name):
            part()
    print(f"CPU seconds in all: {time.process_time() - began:.0f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
