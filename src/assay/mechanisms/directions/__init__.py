"""Directions in parameter space that matter strongly for a few samples each: gates on the
parameter vector.
"""

from assay.mechanisms.directions.bilevel import BiLevel
from assay.mechanisms.directions.bind import DirectionMechanisms, Directions, directions
from assay.mechanisms.directions.choice import Choice, choose_factors, compare_factors
from assay.mechanisms.directions.counting import count_directions
from assay.mechanisms.directions.decomposition import Decomposer, Decomposition, decompose
from assay.mechanisms.directions.factors import fisher_factors, pair_gradients
from assay.mechanisms.directions.forms import jacobian, products, quadratic_forms
from assay.mechanisms.directions.local import Local, around
from assay.mechanisms.directions.npeff import NonNegativeFisher
from assay.mechanisms.directions.power import PowerIteration
from assay.mechanisms.directions.refinement import PairGradientRefinement
from assay.mechanisms.directions.tokens import token_gradients

__all__ = [
    "BiLevel",
    "Choice",
    "Decomposer",
    "Decomposition",
    "DirectionMechanisms",
    "Directions",
    "Local",
    "NonNegativeFisher",
    "PairGradientRefinement",
    "PowerIteration",
    "around",
    "choose_factors",
    "compare_factors",
    "count_directions",
    "decompose",
    "directions",
    "fisher_factors",
    "jacobian",
    "pair_gradients",
    "products",
    "quadratic_forms",
    "token_gradients",
]
