"""How far the gradient and integrated gradients stray from exact patches as the agreement model
gets deeper, and what each of the three costs.

Networks of two to four layers (width 128), two seeds each, are trained on agreement sentences;
every head, MLP and residual node of 100 held-out pairs is scored by both estimates and patched
exactly. CPU seconds are those of one method on all nodes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import torch
from torch import Tensor

from assay import Exact, IntegratedGradients, attribute, nodes
from assay.audit.agreement import agreement
from assay.core.target import Target
from assay.io.prompts import read_pairs
from assay.io.runs import Run
from assay.learn.language import AgreementTraining, train_agreement_model
from assay.targets.language import LanguageModel, load_language_model
from assay.targets.metrics import logit_difference, pair_batch

PAIRS = 100
SITES = {"head": "attn.hook_z", "mlp": "hook_mlp_out", "resid": "hook_resid_post"}


def estimates(
    run: Run, model: LanguageModel
) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Tensor], float]]:
    """Give each method's scores, beside the exact effects, by site, with its CPU seconds."""
    pairs = read_pairs(run.path("pairs.jsonl"), model.tokenizer, vocab_size=model.vocab_size)
    pairs = pairs.take(
        torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:PAIRS]
    )
    sites = [name for name in model.site_names() if name.split(".", 2)[-1] in SITES.values()]
    bound = nodes(
        Target(model.model, logit_difference), pair_batch(pairs), pair_batch(pairs, "patch"), sites
    )
    exact = attribute(bound, Exact())
    for name, scores in (
        ("gradient", attribute(bound)),
        ("IG", attribute(bound, IntegratedGradients())),
        ("exact", exact),
    ):
        yield name, dict(scores.values), dict(exact.values), scores.cpu_seconds


def row(estimate: dict[str, Tensor], exact: dict[str, Tensor], ending: str) -> str:
    chosen = [site for site in estimate if site.endswith(ending)]
    left, right = (
        torch.cat([values[site].flatten() for site in chosen]).double().numpy()
        for values in (estimate, exact)
    )
    found = agreement(left, right)
    return f"{found.pearson:>9.4f}{found.slope:>7.3f}"


def main() -> None:
    torch.set_num_threads(1)
    print(f"r and slope against exact patches, {PAIRS} pairs")
    print(
        f"{'layers':<8}{'seed':<6}{'method':<10}{'CPU s':>6}"
        + "".join(f"{kind:>16}" for kind in (*SITES, "all"))
    )
    for layers in (2, 3, 4):
        for seed in (0, 1):
            with tempfile.TemporaryDirectory() as folder:
                run = Run(folder)
                train_agreement_model(run, AgreementTraining(layers=layers, seed=seed))
                model = load_language_model(run.path("model"))
                for name, estimate, exact, seconds in estimates(run, model):
                    columns = "".join(
                        row(estimate, exact, ending) for ending in (*SITES.values(), "")
                    )
                    print(f"{layers:<8}{seed:<6}{name:<10}{seconds:>6.2f}{columns}", flush=True)


if __name__ == "__main__":
    main()
