"""Operations of traced graphs: moving entries, sums with constants, products, smooth functions."""

from assay.bounds.rules.choice import Choice, Decision, Jump, Largest, Open
from assay.bounds.rules.movement import Pick
from assay.bounds.rules.products import Contract, Planes, Product
from assay.bounds.rules.simple import Divide, Enclosed, Shift, Total
from assay.bounds.rules.slope import Slope
from assay.bounds.rules.smooth import FUNCTIONS, Smooth

__all__ = [
    "FUNCTIONS",
    "Choice",
    "Contract",
    "Decision",
    "Divide",
    "Enclosed",
    "Jump",
    "Largest",
    "Open",
    "Pick",
    "Planes",
    "Product",
    "Shift",
    "Slope",
    "Smooth",
    "Total",
]
