"""Brackets of features whose encoder decides: a step, or a choice of the largest, at a site behind
gates, so that the choice moves with them.
"""

from __future__ import annotations

from pathlib import Path

import cases
import pytest
import torch
from torch import Tensor, nn

from assay.bounds.search.leaves import Budget
from assay.core.mechanisms import Mechanisms
from assay.dictionaries import Placed
from assay.dictionaries.normalised import Normalised
from assay.mechanisms.features import features
from assay.proofs.boxed import boxed
from assay.proofs.gates import certify

BUDGET = Budget(seconds=60.0, boxes=2, steps=(5, 3), whole=0)
ENCODERS = {
    "topk": ("topk", {"k": 2}),
    "topk by norm": ("topk", {"k": 2, "by_norm": True}),
    "topk, all": ("topk", {"k": 6}),
    "batchtopk": ("batchtopk", {"k": 2}),
    "batchtopk by norm": ("batchtopk", {"k": 2, "by_norm": True}),
    "matryoshka": ("matryoshka", {"k": 2, "nested": [3, 6]}),
    "jumprelu": ("jumprelu", {}),
    "gated": ("gated", {}),
    "relu": ("relu", {}),
}
NORMS = ("layer_norm", "constant_norm_rescale")


def encoder(name: str, seed: int) -> nn.Module:
    """A dictionary with features that are active, close to their limits, and not active."""
    if name in NORMS:
        made = Normalised(name, "topk", {"d_in": 4, "size": 6, "k": 2})
        made.inner.load_state_dict(encoder("topk", seed).state_dict())
        return made.double()
    kind, options = ENCODERS[name]
    made = cases.random_dictionary(4, 6, seed, kind, **options)
    if kind in ("batchtopk", "matryoshka"):
        made.threshold.fill_(0.3)
    return made.double()


def nested(name: str) -> Mechanisms:
    """Dictionaries at two sites, one behind the other."""
    model = cases.tiny_target()
    dictionaries = {
        site: Placed(encoder(name, seed), site, (site,))  # type: ignore[arg-type]
        for seed, site in enumerate(("blocks.0", "blocks.1"))
    }
    clean, patch = (cases.tiny_batch(1, positions=2, seed=seed) for seed in (1, 2))
    return features(model, dictionaries, clean, patch)


def errors_free(mechanisms: Mechanisms) -> dict[str, Tensor]:
    """Free the error at the first site, which moves what the second dictionary reads, and some
    features of either.
    """
    keep = {n: torch.ones_like(g, dtype=torch.bool) for n, g in mechanisms.ones().items()}
    keep["blocks.0 error"][:] = False
    for site in ("blocks.0", "blocks.1"):
        norms = mechanisms.norms()[site]
        strongest = norms.to_dense().flatten().argsort(descending=True)[:2]
        keep[site].reshape(-1)[strongest] = False
    return keep


@torch.no_grad()
def seen(mechanisms: Mechanisms, keep: dict[str, Tensor], low: float, points: int = 60) -> Tensor:
    """Damages at corners and points of the free gates."""
    lows, generator = boxed(mechanisms, low).lows, torch.Generator().manual_seed(0)
    full, found = mechanisms.values().double(), []
    for point in range(points):
        gates = {}
        for name, ones in mechanisms.ones().items():
            share = torch.rand(ones.shape, generator=generator, dtype=ones.dtype)
            share = share.round() if point % 2 else share
            gates[name] = torch.where(keep[name], ones, lows[name] + share * (1 - lows[name]))
        found.append(mechanisms.target.damage(full, mechanisms.values(gates).double()))
    return torch.stack(found)


FAST = ("topk", "batchtopk by norm", "gated")


@pytest.mark.parametrize(
    "name",
    [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in (*ENCODERS, *NORMS)],
)
def test_no_point_leaves_the_bracket_of_any_encoder(name: str) -> None:
    mechanisms = nested(name)
    keep, low = errors_free(mechanisms), 0.9 if name in NORMS else 0.0
    found = certify(mechanisms, keep, low=low, budget=BUDGET)
    damages = seen(mechanisms, keep, low)
    assert float(damages.max()) > 1e-3
    assert bool((damages <= found.proved.values + 1e-9).all())
    assert bool((found.found.values <= found.proved.values).all())
    assert bool(found.proved.values.isfinite().all())
    # The search takes corners and points; more points find little more.
    assert float(damages.max()) <= float(found.found.values) + 0.2 * float(found.proved.values)


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Certificates of a step, a choice of the largest, and one of another number."""
    folder = tmp_path_factory.mktemp("features")
    for name in ("topk by norm", "jumprelu", "gated"):
        mechanisms = nested(name)
        keep = errors_free(mechanisms)
        certify(mechanisms, keep, budget=BUDGET, certificate=folder / f"{name}.json")
    return {name: folder / f"{name}.json" for name in ("topk by norm", "jumprelu", "gated")}
