"""The keys of the prompt graph study."""

from __future__ import annotations

from pathlib import Path

from assay.errors import InputError
from assay.io.files import require_folder
from assay.studies.fields import (
    Config as Keys,
)
from assay.studies.fields import (
    Count,
    Input,
    Name,
    Positive,
    Probability,
    StudyConfig,
    Whole,
)


class TargetConfig(Keys):
    """`path` is a Hugging Face folder or hub name."""

    path: Input | None = None


class DictionariesConfig(Keys):
    """Transcoders, or a cross-layer transcoder, below `path`, with `reads` and `writes` for files
    that do not say their sites ({layer} stands for the number of the layer) and the `scale` of
    training where a file does not hold it.
    """

    path: Input | None = None
    reads: Name | None = None
    writes: Name | None = None
    scale: Positive | None = None


class GraphConfig(Keys):
    """The likeliest next tokens up to `probability` together, `logits` at most, are explained. The
    `first` positions have neither features nor errors. `most` limits the features, `exact` nodes
    are taken out of the network itself, and pruning keeps the nodes and the edges that carry these
    shares of the influence.
    """

    logits: Count = 10
    probability: Probability = 0.95
    first: Whole = 1
    most: Count | None = None
    exact: Whole = 50
    node_threshold: Probability = 0.8
    edge_threshold: Probability = 0.98


class Config(StudyConfig):
    """`prompt` is the text whose next token is explained."""

    target: TargetConfig = TargetConfig()
    dictionaries: DictionariesConfig = DictionariesConfig()
    prompt: Name | None = None
    graph: GraphConfig = GraphConfig()

    def require(self) -> None:
        """Refuse a missing model, prompt or folder."""
        given = self.target.path, self.dictionaries.path, self.prompt
        if any(entry is None for entry in given):
            raise InputError(
                "this recipe takes your own model, transcoders and prompt: --set"
                " target.path=MODEL_DIR --set dictionaries.path=DIR --set prompt=TEXT"
            )
        if not self.graph.probability:
            raise InputError("graph.probability must be above 0")
        assert self.target.path is not None
        assert self.dictionaries.path is not None
        require_folder(self.target.path)
        if not Path(self.dictionaries.path).is_dir():
            raise InputError(f"no folder {self.dictionaries.path!r} of dictionaries")
