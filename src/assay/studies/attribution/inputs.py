"""What the attribution study scores: a model, its pairs of prompts, and the nodes bound to them."""

from __future__ import annotations

from dataclasses import replace

from assay.core.target import Batch, Target
from assay.io.prompts import Pairs
from assay.io.runs import Run
from assay.mechanisms.nodes import Nodes, nodes
from assay.studies.attribution.config import Config
from assay.studies.pairs import model_of, read_some
from assay.targets.language import LanguageModel
from assay.targets.metrics import choose_metric, pair_batch, with_clean_run


def load_model(config: Config, run: Run) -> LanguageModel:
    """Load the user's model, or the agreement model of the run, which is trained when absent."""
    return model_of(config.target.path, config.target, run, config.seed)


def read_limited(config: Config, run: Run, model: LanguageModel) -> Pairs:
    """Read the run's pairs, a random choice where there are more than its limit."""
    path = config.data.pairs or run.checked("pairs.jsonl")
    return read_some(path, model, config.data.limit, config.seed)


def bind(config: Config, model: LanguageModel, pairs: Pairs) -> Nodes:
    """Bind the nodes of the config's sites to pairs."""
    clean, patch = make_batches(config, model, pairs)
    target = Target(model.model, choose_metric(config.metric), model.path)
    wanted = ("attn.hook_z", "hook_mlp_out", "hook_resid_post")
    sites = list(config.sites) or [
        name for name in model.site_names() if name.partition(".")[2].partition(".")[2] in wanted
    ]
    return nodes(target, clean, patch, sites, config.reference)


def make_batches(config: Config, model: LanguageModel, pairs: Pairs) -> tuple[Batch, Batch]:
    """Return the clean and the patch prompts; the metric "kl" also needs the clean run's output."""
    clean, patch = pair_batch(pairs, "clean"), pair_batch(pairs, "patch")
    if config.metric != "kl":
        return clean, patch
    return with_clean_run(model.model, clean), with_clean_run(model.model, patch, clean)


def circuit_nodes(model: LanguageModel, bound: Nodes) -> Nodes | None:
    """Return the nodes that a circuit is made of, heads and MLPs: residual nodes would carry
    everything upstream of them.
    """
    kinds = ("head", "mlp", "attention", "neurons")
    spots = {name: spot for name, spot in bound.spots.items() if model.site(name).kind in kinds}
    return replace(bound, spots=spots) if spots else None
