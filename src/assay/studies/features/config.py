"""The keys of the features study."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from assay.errors import InputError
from assay.io.files import existing, require_folder
from assay.io.supernodes import read_supernodes
from assay.studies.agreement_config import AgreementModelConfig
from assay.studies.fields import Config as Keys
from assay.studies.fields import (
    Count,
    Input,
    Name,
    Names,
    Positive,
    Probability,
    Several,
    Share,
    Size,
    StudyConfig,
    Whole,
)
from assay.studies.names import require_metric


class TargetConfig(AgreementModelConfig):
    """`path` is a Hugging Face folder or hub name; with `train` a small agreement model is trained
    with the other keys instead.
    """

    path: Input | None = None
    train: bool = False


class DataConfig(Keys):
    """`pairs` is a JSONL or CSV file of clean and patch prompts; without it the agreement model's
    held-out pairs.
    """

    pairs: Input | None = None
    limit: Several = 120


class DictionariesConfig(Keys):
    """Where dictionaries come from: files below `path`, with `reads` and `writes` for those that do
    not say their sites ({layer} stands for the number of the layer) and the `scale` of training
    where a file does not hold it; training, for the agreement model, with the keys below `kind`; or
    identity dictionaries, whose features are neurons. auto: `path` if there is one, training for
    the agreement model, else identity. Training reads `sentences` sentences, and `held_out` others
    of every construction measure what it gave.
    """

    path: Input | None = None
    reads: Name | None = None
    writes: Name | None = None
    scale: Positive | None = None
    kind: Literal["auto", "identity", "saved", "trained"] = "auto"
    architecture: Literal["batchtopk", "topk"] = "topk"
    features: Count = 512
    k: Count = 3
    steps: Count = 1000
    batch: Count = 512
    rate: Positive = 2e-3
    end_to_end: Probability = 0.4
    windows: Count = 64
    sentences: Count = 8000
    held_out: Count = 150


class EffectsConfig(Keys):
    """`everything` patches every part exactly; otherwise `exact` parts of every pair. `paths` is
    the number of pairs on which node paths with `points` points are computed, `shares` whether site
    paths are, which scale the bars. A node is missed where |AtP| is under `threshold` times the
    mean change of the metric from clean to patch, and the exact effect above it.
    """

    everything: bool = False
    exact: Count = 60
    alpha: Share = 0.1
    paths: Whole = 24
    points: Count = 4
    shares: bool = True
    tolerance: Positive = 0.02
    threshold: Positive = 0.02
    restored: tuple[Count, ...] = (1, 4, 16, 64)


class CircuitConfig(Keys):
    """A circuit of `nodes` parts for each of the `lengths` most frequent kinds of prompts (0: no
    circuit), of one length and with the same positions at which clean and patch differ: of the
    dictionaries of the residual stream where there are some, chosen on half of at most `pairs`
    pairs and measured on the others. The worst case of what is outside is searched on the first
    `searched` of these, and bounded on the first `certified`. Parts are grouped as in `supernodes`,
    a file of a run, or else where co-activation and effect are alike by `alike`, measured on edges
    to the first `receivers` features.
    """

    lengths: Whole = 1
    nodes: Count = 25
    pairs: Several = 100
    searched: Whole = 8
    certified: Whole = 1
    supernodes: Input | None = None
    alike: Share = 0.7
    receivers: Count = 200


class LabelsConfig(Keys):
    """What the circuits' features are labelled with: their `contexts` strongest contexts, of
    `around` tokens on either side, and `tokens` promoted tokens. Contexts come from `text`, a plain
    text cut into windows of `length` tokens, else from the agreement model's sentences or the
    prompts of the pairs.
    """

    text: Input | None = None
    length: Count = 64
    contexts: Count = 6
    around: Count = 8
    tokens: Count = 6
    bins: Several = 32


class LayoutConfig(Keys):
    """What a dry run assumes: the network's shape where `target.path` is no local folder, the
    features of a dictionary and how many are active, and the tokens of a prompt.
    """

    family: Name | None = None
    hidden: Size = 768
    layers: Size = 12
    heads: Size = 12
    intermediate: Size | None = None
    vocabulary: Count = 50257
    features: Count = 16_384
    active: Count = 64
    length: Several = 16


class Config(StudyConfig):
    """`sites` are patterns over TransformerLens names and module paths, for dictionaries that are
    trained or identities.
    """

    target: TargetConfig = TargetConfig()
    data: DataConfig = DataConfig()
    dictionaries: DictionariesConfig = DictionariesConfig()
    sites: Names = Field(
        (
            "blocks.*.hook_attn_out",
            "blocks.*.hook_mlp_out",
            "blocks.*.hook_resid_post",
        ),
        min_length=1,
    )
    metric: Name = "logit_difference"
    reference: Literal["counterfactual", "mean", "zero"] = "counterfactual"
    convention: Literal["pass_through", "detached_error"] = "pass_through"
    effects: EffectsConfig = EffectsConfig()
    circuit: CircuitConfig = CircuitConfig()
    labels: LabelsConfig = LabelsConfig()
    layout: LayoutConfig = LayoutConfig()

    @property
    def kind(self) -> str:
        """Where the dictionaries come from, decided."""
        given = self.dictionaries
        if given.kind != "auto":
            return given.kind
        if given.path is not None:
            return "saved"
        return "trained" if self.target.train else "identity"

    def require(self) -> None:
        """Refuse keys that do not go together, and inputs that are not there."""
        require_metric(self.metric)
        if self.metric == "kl":
            raise InputError(
                "metric 'kl' compares whole outputs; use the recipe attribution for it"
            )
        if self.target.path is None and not self.target.train:
            raise InputError(
                "this recipe takes your own model and pairs: --set target.path=MODEL_DIR --set"
                " data.pairs=PAIRS.jsonl (the recipe agreement-features trains a model of its own)"
            )
        if self.target.path is not None and self.target.train:
            raise InputError(
                "target.train trains a model and target.path names one; use the recipe features"
                " for a model of your own"
            )
        if self.target.path is not None and self.data.pairs is None:
            raise InputError(
                "a model of your own needs pairs of your own: --set data.pairs=PAIRS.jsonl"
            )
        if self.data.pairs is not None:
            existing(self.data.pairs)
        for key, given in (
            ("circuit.supernodes", self.circuit.supernodes),
            ("labels.text", self.labels.text),
        ):
            if given is None:
                continue
            if not self.circuit.lengths:
                raise InputError(f"{key} is for circuits, and circuit.lengths = 0 finds none")
            existing(given)
        if self.circuit.supernodes is not None:
            read_supernodes(self.circuit.supernodes)
        if self.target.path is not None:
            require_folder(self.target.path)
        if self.target.train:
            self.target.require_trainable()
        self._require_dictionaries()

    def _require_dictionaries(self) -> None:
        if self.kind == "saved" and self.dictionaries.path is None:
            raise InputError("dictionaries.kind = saved needs dictionaries.path=FOLDER")
        if self.kind != "saved" and self.dictionaries.path is not None:
            raise InputError(
                f"dictionaries.kind = {self.kind} and dictionaries.path do not go together"
            )
        if self.kind == "trained" and not self.target.train:
            raise InputError(
                "dictionaries of your own model are trained by: assay train dictionaries --set"
                " target.path=MODEL_DIR --set data.path=TEXT; then give their folder as"
                " dictionaries.path"
            )
        if self.dictionaries.path is not None and not Path(self.dictionaries.path).is_dir():
            raise InputError(f"no folder {self.dictionaries.path!r} of dictionaries")
        if self.dictionaries.k > self.dictionaries.features:
            raise InputError(
                f"dictionaries.k = {self.dictionaries.k} is more than dictionaries.features ="
                f" {self.dictionaries.features}"
            )
