"""Mutants of bounds and proofs: roundings that are left out, ends that are mixed up, ties."""

from __future__ import annotations

from run_mutants import Mutant

PRECISIONS = ("tests/bounds/test_precisions.py",)
CONVERSION = ("tests/bounds/test_conversion.py",)
OPERATIONS = ("tests/bounds/test_operations.py",)
ROUNDING = ("tests/bounds/test_rounding.py",)
REGIONS = ("tests/bounds/test_regions.py",)
RELAXATIONS = ("tests/bounds/test_relaxations.py",)
PROPAGATE = ("tests/bounds/test_propagate.py",)
CORNERS = ("tests/bounds/test_execution_corners.py",)
RANGE = ("tests/bounds/test_float32_range.py",)
CERTIFY = ("tests/bounds/test_certify.py",)
SOUNDNESS = ("tests/proofs/test_soundness.py",)
TABLES = ("tests/proofs/test_tables.py",)
CELLS = ("tests/proofs/test_cells.py",)
LOSS = ("tests/proofs/test_cross_entropy.py",)
CERTIFICATE = ("tests/proofs/test_certificate.py",)
ROOMS = ("tests/checker/test_check_rooms.py",)

MUTANTS = [
    # bounds: numbers of any precision
    Mutant(
        "assay/bounds/numbers.py",
        "np.nextafter(nearest, direction), nearest)",
        "nearest, nearest)",
        PRECISIONS,
    ),
    Mutant("assay/bounds/numbers.py", "_WHOLE = 2.0**53", "_WHOLE = 2.0**54", PRECISIONS),
    Mutant(
        "assay/bounds/numbers.py",
        "return values.copy() if copy else values",
        "return values",
        PRECISIONS,
    ),
    # bounds: rounding
    Mutant(
        "assay/bounds/rounding.py",
        "return add_up(mul_up(value, 1 + 2 * gamma(terms)), 2 * terms * TINY)",
        "return add_up(value, 2 * terms * TINY)",
        ROUNDING,
    ),
    Mutant(
        "assay/bounds/rounding.py",
        "return cast(Array, np.maximum(sub_up(self.hi, middle), sub_up(middle, self.lo)))",
        "return cast(Array, sub_up(self.hi, middle))",
        ROUNDING,
    ),
    Mutant(
        "assay/bounds/rounding.py",
        "return math.nextafter(terms * unit / (1 - terms * unit), math.inf) * (1 + 4 * UNIT)",
        "return terms * unit",
        ROUNDING,
    ),
    Mutant(
        "assay/bounds/rounding.py",
        "return Interval(sub_down(self.lo, other.hi), sub_up(self.hi, other.lo))",
        "return Interval(sub_down(self.lo, other.lo), sub_up(self.hi, other.hi))",
        ROUNDING,
    ),
    # bounds: levels
    Mutant("assay/bounds/levels.py", "LARGEST32 = 2.0**127", "LARGEST32 = 2.0**129", RANGE),
    Mutant(
        "assay/bounds/levels.py",
        "flushed = 2 * terms * SMALL32 * (1 + largest)",
        "flushed = 2 * terms * SMALL32",
        CORNERS,
    ),
    Mutant(
        "assay/bounds/levels.py",
        "lo, hi = sub_down(lo, wobble), add_up(hi, wobble)",
        "lo, hi = sub_down(lo, 0.0), add_up(hi, 0.0)",
        OPERATIONS,
    ),
    Mutant(
        "assay/bounds/levels.py",
        "total = sum((sum_up(m.reshape(len(m), -1)) for m in magnitudes), np.ones(1))",
        "total = sum((sum_up(m.reshape(len(m), -1)) for m in magnitudes[:0]), np.ones(1))",
        OPERATIONS,
    ),
    # bounds: operations
    Mutant(
        "assay/bounds/operations.py",
        "            self.weight.shape[1] + 1, absolute, max(largest(x), largest(self.weight))",
        "            self.weight.shape[1], absolute, max(largest(x), largest(self.weight))",
        OPERATIONS,
    ),
    Mutant(
        "assay/bounds/operations.py",
        'add_up(Arithmetic("real").dot_up(x, self.absolute.T), np.abs(self.bias))',
        'add_up(Arithmetic("real").dot_up(x, self.absolute.T), 0.0)',
        CORNERS,
    ),
    Mutant(
        "assay/bounds/operations.py",
        "return ar.dot(xs[0].midpoint(), self.weight.T) + Interval(-spread, spread) + self.bias",
        "return Interval(*(end + self.bias for end in vars("
        "ar.dot(xs[0].midpoint(), self.weight.T) + Interval(-spread, spread)).values()))",
        OPERATIONS,
    ),
    Mutant(
        "assay/bounds/operations.py", "    terms: int = 2\n", "    terms: int = 1\n", OPERATIONS
    ),
    Mutant(
        "assay/bounds/operations.py",
        "return [rows, self.sign * rows], constant",
        "return [rows, rows], constant",
        OPERATIONS,
    ),
    Mutant(
        "assay/bounds/operations.py",
        "return executed_sum(1, value.magnitude(), 0.0)",
        "return executed_sum(0, value.magnitude(), 0.0)",
        OPERATIONS,
    ),
    Mutant(
        "assay/bounds/nonlinear.py",
        "        check_range(x)\n",
        "        check_range(0 * x)\n",
        RANGE,
    ),
    Mutant(
        "assay/bounds/nonlinear.py",
        "mul_up(2.05, add_up(gap, 2 * ULPS * UNIT32)), 1.05 * (terms + 2) * UNIT32",
        "mul_up(2.05, add_up(gap, 2 * ULPS * UNIT32)), 0.0 * (terms + 2) * UNIT32",
        CORNERS,
    ),
    Mutant(
        "assay/bounds/nonlinear.py",
        "return np.full(value.shape, SMALL32)  # a subnormal number may be flushed",
        "return np.zeros(value.shape)",
        RANGE,
    ),
    Mutant("assay/bounds/graph.py", "virtual=True, limited=True)", "virtual=True)", RANGE),
    Mutant(
        "assay/bounds/graph.py",
        "last = ops.Scale(weight, np.zeros(()), width + 8 + 2 * ULPS, reason)",
        "last = ops.Scale(weight, np.zeros(()), 8 + 2 * ULPS, reason)",
        CORNERS,
    ),
    Mutant(
        "assay/bounds/graph.py",
        "shift = Interval.exactly(float(width**2)) * _checked_eps(eps)",
        "shift = Interval.exactly(float(4 * width**2)) * _checked_eps(eps)",
        CONVERSION,
    ),
    # bounds: relaxations
    Mutant(
        "assay/bounds/relaxations.py",
        "GELU_LEAST = -0.16997121",
        "GELU_LEAST = -0.1699712",
        RELAXATIONS,
    ),
    Mutant(
        "assay/bounds/relaxations.py",
        "np.where(unstable, (x.hi > -x.lo).astype(np.float64), chord)",
        "np.where(unstable, (x.hi < -x.lo).astype(np.float64), chord)",
        RELAXATIONS,
    ),
    Mutant(
        "assay/bounds/relaxations.py",
        "-mul_up(0.5, mul_up(box.hi, second))",
        "-mul_up(0.25, mul_up(box.hi, second))",
        RELAXATIONS,
    ),
    Mutant(
        "assay/bounds/relaxations.py",
        "high = np.minimum(radii, mul_up(0.25, mul_up(sum_, sum_)))",
        "high = np.minimum(radii, mul_up(0.25, mul_up(difference, difference)))",
        RELAXATIONS,
    ),
    # bounds: regions, graphs, propagation
    Mutant(
        "assay/bounds/regions.py",
        "grown = add_up(box.radii, sqrt_up(sum_up(squares)))",
        "grown = box.radii",
        REGIONS,
    ),
    Mutant(
        "assay/bounds/regions.py",
        "return np.where(beyond, stepped, near).astype(np.float64)",
        "return near.astype(np.float64)",
        REGIONS,
    ),
    Mutant(
        "assay/bounds/regions.py",
        "if not np.all(np.isfinite(r) & (r >= 0)):",
        "if not np.all(np.isfinite(r)):",
        REGIONS,
    ),
    Mutant(
        "assay/bounds/convert.py",
        "in module._modules.items():",
        "in module.named_children():",
        CONVERSION,
    ),
    Mutant(
        "assay/bounds/convert.py",
        "    if type(model) is BilinearNetwork:",
        "    if isinstance(model, BilinearNetwork):",
        CONVERSION,
    ),
    Mutant(
        "assay/bounds/convert.py",
        "shape if rows * columns > 1 else shape[1:], (1, 3, 0, 2, 4))",
        "shape if rows * columns > 1 else shape[1:], (1, 3, 0, 4, 2))",
        CERTIFY,
    ),
    Mutant(
        "assay/bounds/engine.py",
        "mul_up(ar.gamma(1), magnitude))",
        "mul_up(0.0, magnitude))",
        OPERATIONS,
    ),
    Mutant(
        "assay/bounds/certify.py",
        "return self.margins > 0",
        "return self.margins >= 0",
        CERTIFY,
    ),
    # proofs: ties are wrong
    Mutant(
        "assay/proofs/max_of_k/strategies/subcubic.py",
        "good = (margins(p, limits) < 0) & (limits >= 0)",
        "good = (margins(p, limits) <= 0) & (limits >= 0)",
        SOUNDNESS,
    ),
    Mutant(
        "assay/proofs/max_of_k/strategies/exact.py",
        "            no_others = part.over_competitors(part.all_max.copy()) < 0",
        "            no_others = part.over_competitors(part.all_max.copy()) <= 0",
        SOUNDNESS,
    ),
    Mutant(
        "assay/proofs/max_of_k/strategies/exact.py",
        "claimed & (part.worst(largest, c) < 0)[:, None]",
        "claimed & (part.worst(largest, c) <= 0)[:, None]",
        SOUNDNESS,
    ),
    Mutant(
        "assay/proofs/max_of_k/strategies/cubic.py",
        "sets[0, queries, m, c, :m] &= margin < 0",
        "sets[0, queries, m, c, :m] &= margin <= 0",
        SOUNDNESS,
    ),
    Mutant(
        "assay/proofs/max_of_k/strategies/rivals.py",
        "(tables.up(tables.times(few, of_key) + fixed) < 0) | absent",
        "(tables.up(tables.times(few, of_key) + fixed) <= 0) | absent",
        SOUNDNESS,
    ),
    Mutant(
        "assay/proofs/max_of_k/strategies/brute.py",
        "return np.asarray((margin < 0).all(-1))",
        "return np.asarray((margin <= 0).all(-1))",
        SOUNDNESS,
    ),
    # proofs: enclosures
    Mutant(
        "assay/proofs/max_of_k/strategies/brute.py",
        "found = largest < -doubt",
        "found = largest < 0",
        ROOMS,
    ),
    Mutant(
        "assay/proofs/max_of_k/tables.py",
        "return self.up(self.EV.hi[tokens] - self.EV.lo[tokens, m : m + 1])",
        "return self.up(self.EV.hi[tokens] - self.EV.hi[tokens, m : m + 1])",
        TABLES,
    ),
    Mutant(
        "assay/proofs/max_of_k/tables.py",
        "        2.0 * logit_error(weights, exp_ulp=exp_ulp).max(1)",
        "        1.0 * logit_error(weights, exp_ulp=exp_ulp).max(1)",
        TABLES,
    ),
    Mutant(
        "assay/proofs/max_of_k/execution.py",
        "relative, summed = 2 * UNIT * exp_ulp, (positions + 4) * UNIT",
        "relative, summed = 2 * UNIT * exp_ulp, 4 * UNIT",
        ROOMS,
    ),
    Mutant(
        "assay/proofs/max_of_k/execution.py",
        "spread = spread + gamma(w.head + 4) * (exact + spread)",
        "spread = spread + gamma(4) * (exact + spread)",
        ROOMS,
    ),
    Mutant(
        "assay/proofs/max_of_k/cross_entropy.py",
        "        np.ceil(loss * 2.0**_SCALE)",
        "        np.floor(loss * 2.0**_SCALE)",
        LOSS,
    ),
    Mutant(
        "assay/proofs/max_of_k/cross_entropy.py",
        "return Fraction(ceil(self.bound * (1 + Fraction(1, 1 << 20)) * unit), unit)",
        "return Fraction(int(self.bound * (1 + Fraction(1, 1 << 20)) * unit), unit)",
        LOSS,
    ),
    Mutant(
        "assay/proofs/max_of_k/cross_entropy.py",
        "mean = tables.up(np.maximum(top / low, top / high))",
        "mean = tables.up(top / high)",
        LOSS,
    ),
    Mutant(
        "assay/proofs/max_of_k/cells.py",
        "(c <= np.where(q == m, positions - 1, positions - 2)) & ((c == 0) | (m > 0))",
        "(c <= positions - 1) & ((c == 0) | (m > 0))",
        CELLS,
    ),
    # proofs: certificates
    Mutant(
        "assay/proofs/certificate.py",
        "        if any(_same(target, Path(given)) for given in inputs):",
        "        if any(target == Path(given) for given in inputs):",
        CERTIFICATE,
    ),
    Mutant(
        "assay/proofs/certificate.py",
        "    if os.path.lexists(advice) and not _is_advice(advice):",
        "    if os.path.exists(advice) and not _is_advice(advice):",
        CERTIFICATE,
    ),
]
