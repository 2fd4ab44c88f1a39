"""Components: weight matrices as sums of rank-one parts, of which few matter on any input and the
rest can be removed in any combination."""

from assay.mechanisms.components.decomposition import Decomposition, decomposition
from assay.mechanisms.components.initial import start_at_data, start_at_singular
from assay.mechanisms.components.kind import ComponentMechanisms, components
from assay.mechanisms.components.minimality import LpMinimality, SmoothL0
from assay.mechanisms.components.objective import Faithfulness, Objective, Recon
from assay.mechanisms.components.problem import Problem
from assay.mechanisms.components.scene import Rows, skip_zeros, zeros_are_inert
from assay.mechanisms.components.sites import WeightSite, match_sites
from assay.mechanisms.components.sources import Fresh, Merged, Monitor, Persistent, Stochastic
from assay.mechanisms.components.squash import lower, upper
from assay.mechanisms.components.training import Training, train

__all__ = [
    "ComponentMechanisms",
    "Decomposition",
    "Faithfulness",
    "Fresh",
    "LpMinimality",
    "Merged",
    "Monitor",
    "Objective",
    "Persistent",
    "Problem",
    "Recon",
    "Rows",
    "SmoothL0",
    "Stochastic",
    "Training",
    "WeightSite",
    "components",
    "decomposition",
    "lower",
    "match_sites",
    "skip_zeros",
    "start_at_data",
    "start_at_singular",
    "train",
    "upper",
    "zeros_are_inert",
]
