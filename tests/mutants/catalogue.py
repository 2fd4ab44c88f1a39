"""The mutants, room by room; a line must stand exactly once in its file."""

from __future__ import annotations

import catalogue_bound
import catalogue_bounds
import catalogue_checker
import catalogue_components
import catalogue_crosscoder
import catalogue_dictionaries
import catalogue_graphs
import catalogue_guard
import catalogue_networks
import catalogue_proofs
from run_mutants import Mutant

RISK = ("tests/audit/test_risk.py",)
CONSTANTS = ("tests/mechanisms/channels/test_channel_constants.py",)
BOUNDS = "tests/mechanisms/channels/test_channel_bounds.py"
CERTIFICATES = (f"{BOUNDS}::test_no_certificate_is_violated",)
RELATIVE = (f"{BOUNDS}::test_the_relative_certificate_goes_to_its_limit",)
COUNTING = ("tests/mechanisms/directions/test_counting.py",)
INVARIANTS = ("tests/core/test_invariants.py",)
SUM = ("tests/core/test_gated_sum.py",)
SITES = ("tests/core/test_sites.py",)
VALUES = ("tests/core/test_values.py",)
METHODS = ("tests/attribution/test_methods.py", "tests/attribution/test_estimators.py")
NODES = (
    "tests/mechanisms/nodes/test_suffix_patching.py::test_every_site_of_every_family",
    "tests/mechanisms/nodes/test_suffix_patching.py::test_module_paths_are_known_too",
)
EDGES = ("tests/edges",)
AUDIT = ("tests/audit",)
BARS = ("tests/audit/test_bars.py",)
TOTALS = ("tests/audit/test_totals.py",)
EFFECTS = ("tests/audit/test_effects.py",)
OPERATIONS = ("tests/audit/test_audit_operations.py",)

CATALOGUE = [
    *catalogue_bound.MUTANTS,
    *catalogue_bounds.MUTANTS,
    *catalogue_proofs.MUTANTS,
    *catalogue_checker.MUTANTS,
    *catalogue_components.MUTANTS,
    *catalogue_crosscoder.MUTANTS,
    *catalogue_dictionaries.MUTANTS,
    *catalogue_graphs.MUTANTS,
    *catalogue_guard.MUTANTS,
    *catalogue_networks.MUTANTS,
    # core
    Mutant(
        "assay/core/parts.py",
        "gates[name].to(torch.promote_types(gates[name].dtype, wide)) - 1",
        "gates[name].to(wide) - 1",
        SUM,
    ),
    Mutant(
        "assay/core/parts.py",
        "    wide = torch.promote_types(seen.written.dtype, torch.float32)\n",
        "    wide = seen.written.dtype\n",
        SUM,
    ),
    Mutant(
        "assay/core/parts.py", "return total.to(seen.written.dtype)", "return total", INVARIANTS
    ),
    Mutant(
        "assay/core/parts.py",
        "return values.sum(axes, keepdim=True) if axes else values",
        "return values.mean(axes, keepdim=True) if axes else values",
        SUM,
    ),
    Mutant(
        "assay/core/parts.py",
        "self.atoms.double().square().sum(1)",
        "self.atoms.double().square().amax(1)",
        SUM,
    ),
    Mutant("assay/core/parts.py", "        mask = mask & here", "        mask = mask | here", SUM),
    Mutant("assay/core/sites.py", "if end < begin and not inside:", "if end <= begin + 3:", SITES),
    Mutant(
        "assay/core/sites.py",
        "return min((self.spans[path][0] for path in owners), default=0) if known else 0",
        "return max((self.spans[path][0] for path in owners), default=0) if known else 0",
        SITES,
    ),
    Mutant(
        "assay/core/sites.py",
        "known = all(path in self.spans for path in owners)",
        "known = any(path in self.spans for path in owners)",
        SITES,
    ),
    Mutant(
        "assay/core/sites.py", "        if count > 1 or changed:", "        if count > 1:", SITES
    ),
    Mutant(
        "assay/core/sites.py", "        if counts[site] > 1:", "        if counts[site] > 2:", SITES
    ),
    Mutant(
        "assay/core/sites.py",
        "            value = value + others[place]",
        "            value = value + 0 * others[place]",
        SITES,
    ),
    Mutant(
        "assay/core/mechanisms.py",
        "                if site not in acting:\n",
        "                if site in acting and False:\n",
        INVARIANTS,
    ),
    Mutant(
        "assay/core/mechanisms.py",
        "return tuple(dict.fromkeys([*self._read(acting), *acting]))",
        "return tuple(acting)",
        INVARIANTS,
    ),
    Mutant(
        "assay/core/mechanisms.py",
        "for site in dict.fromkeys([*read, *acting])}",
        "for site in acting}",
        INVARIANTS,
    ),
    Mutant(
        "assay/core/mechanisms.py",
        "squares[name] = add(squares[name], square) if name in squares else square",
        "squares[name] = square",
        SUM,
    ),
    Mutant(
        "assay/core/target.py",
        "return full - values if self.higher_is_right else values - full",
        "return full - values",
        SUM,
    ),
    Mutant(
        "assay/core/values.py", "held = sizes.values() > 0", "held = sizes.values() >= 0", VALUES
    ),
    Mutant(
        "assay/core/values.py",
        "return torch.where(held[place] == wanted, values.values()[place], 0)",
        "return values.values()[place]",
        VALUES,
    ),
    Mutant(
        "assay/core/values.py",
        "order = order[example[order].argsort(stable=True)]",
        "order = order[example[order].argsort(stable=True)].sort().values",
        VALUES,
    ),
    Mutant(
        "assay/core/values.py",
        "        key = key * size + index",
        "        key = key + index",
        VALUES,
    ),
    Mutant(
        "assay/core/values.py",
        "torch.sparse.sum(values, 0).to_dense() / len(values)",
        "torch.sparse.sum(values, 0).to_dense()",
        VALUES,
    ),
    # attribution
    Mutant(
        "assay/attribution/exact.py",
        "            weights[0] = 0\n",
        "            weights[0] = 1\n",
        METHODS,
    ),
    Mutant(
        "assay/attribution/exact.py",
        "            found.append(values[0] - values[1:])",
        "            found.append(values[1:] - values[0])",
        METHODS,
    ),
    Mutant(
        "assay/attribution/gradient.py",
        "earlier = {place: entry.detach() for place, entry in seen.earlier.items()}",
        "earlier = {place: seen.detach() for place, entry in seen.earlier.items()}",
        INVARIANTS,
    ),
    Mutant(
        "assay/attribution/gradient.py",
        "        return tracked.clone()",
        "        return tracked.detach()",
        METHODS,
    ),
    Mutant(
        "assay/attribution/gradient.py",
        "found[name] = add(found[name], gradient) if name in found else gradient",
        "found[name] = gradient",
        INVARIANTS,
    ),
    Mutant(
        "assay/attribution/path.py",
        "return add(ends, 4 * self.middle.gradients[name]) * (self.width / 6)",
        "return add(ends, 2 * self.middle.gradients[name]) * (self.width / 4)",
        METHODS,
    ),
    Mutant(
        "assay/attribution/path.py",
        "one = max((panel.right for panel in panels), key=lambda edge: edge.place)",
        "one = max((panel.left for panel in panels), key=lambda edge: edge.place)",
        INVARIANTS,
    ),
    Mutant(
        "assay/attribution/path.py",
        "worst = max(panels, key=lambda panel: panel.error)",
        "worst = min(panels, key=lambda panel: panel.error)",
        METHODS,
    ),
    Mutant(
        "assay/attribution/second.py",
        "values[name] = add(first[name], -second / 2)",
        "values[name] = add(first[name], second / 2)",
        METHODS,
    ),
    Mutant(
        "assay/attribution/probes.py",
        "    return total / probes",
        "    return total",
        METHODS,
    ),
    Mutant(
        "assay/attribution/transformer/norms.py",
        "inner = value - value.mean(-1, keepdim=True) if centred else value",
        "inner = value",
        ("tests/attribution", "tests/edges", "tests/mechanisms/nodes"),
    ),
    # nodes
    Mutant(
        "assay/targets/suffix.py",
        "alive = (positions == last) if late else (positions <= last)",
        "alive = (positions == last) if late else (positions < last)",
        NODES,
    ),
    Mutant(
        "assay/targets/suffix.py",
        'late = stage.layer == len(self.layers) - 1 and stage.piece not in ("pre", "keys")',
        'late = stage.layer == len(self.layers) - 1 and stage.piece not in ("pre",)',
        NODES,
    ),
    # channels, directions and selective risk
    Mutant("assay/audit/risk.py", "        if inputs < needed:", "        if inputs < 1:", RISK),
    Mutant("assay/audit/risk.py", "    held = kept[~tuned]", "    held = kept", RISK),
    Mutant(
        "assay/audit/risk.py", "        if p_value > eta:", "        if p_value > 1 - eta:", RISK
    ),
    Mutant(
        "assay/audit/risk.py",
        "failures = len(np.unique(owner[below & failed]))",
        "failures = len(np.unique(owner[below & failed])) // 2",
        RISK,
    ),
    Mutant(
        "assay/audit/risk.py",
        "kept = kept[np.unique(group[kept], return_index=True)[1]]",
        "kept = np.unique(kept)",
        RISK,
    ),
    Mutant(
        "assay/audit/risk.py",
        "return below if exact is None else below | np.asarray(exact, bool)",
        "return below if exact is None else below & ~np.asarray(exact, bool)",
        RISK,
    ),
    Mutant(
        "assay/audit/risk.py",
        "    np.maximum.at(largest, place, residual)",
        "    np.add.at(largest, place, residual)",
        RISK,
    ),
    Mutant(
        "assay/audit/risk.py",
        "math.ceil(round((self.inputs + 1) * (1 - self.alpha), 9))",
        "math.ceil(round(self.inputs * (1 - self.alpha), 9))",
        RISK,
    ),
    Mutant(
        "assay/mechanisms/channels/constants.py",
        "    budget = (torch.as_tensor(constant, dtype=attribution.dtype) * later)[:, None]",
        "    budget = (torch.as_tensor(constant, dtype=attribution.dtype) + later)[:, None]",
        CONSTANTS,
    ),
    Mutant(
        "assay/mechanisms/channels/constants.py",
        "torch.where(steps > 0, steps.square(), torch.nan)",
        "torch.where(steps > 0, steps, torch.nan)",
        CONSTANTS,
    ),
    Mutant(
        "assay/mechanisms/channels/attribution.py",
        "    size = attribute_channels(clean).abs()",
        "    size = attribute_channels(clean)",
        CONSTANTS,
    ),
    Mutant(
        "assay/mechanisms/channels/certify.py",
        "    total = self.curvature.abs() + self.second",
        "    total = self.curvature + self.second",
        CERTIFICATES,
    ),
    Mutant(
        "assay/mechanisms/channels/certify.py",
        "    return bound <= tolerance * estimate.abs() / (1 + tolerance)",
        "    return bound <= tolerance * estimate.abs() * (1 + tolerance)",
        RELATIVE,
    ),
    Mutant(
        "assay/mechanisms/directions/counting.py",
        "    bounded = ended and max(high, count) <= k",
        "    bounded = True",
        COUNTING,
        slow=True,
    ),
    Mutant(
        "assay/mechanisms/directions/counting.py",
        "    clear = structured & ((second >= 3 * first.square()) | (dominance > 0.5))",
        "    clear = structured",
        COUNTING,
        slow=True,
    ),
    Mutant(
        "assay/mechanisms/directions/choice.py",
        "    best = max(strengths, key=lambda name: strengths[name])",
        "    best = min(strengths, key=lambda name: strengths[name])",
        COUNTING,
        slow=True,
    ),
    # edges
    Mutant(
        "assay/edges/scores.py",
        "for alphas in (torch.arange(count, 0, -1) / count).split(chunk):",
        "for alphas in (torch.arange(count, 0, -1) / (count + 1)).split(chunk):",
        EDGES,
    ),
    Mutant(
        "assay/edges/scores.py", "    values = run.scores / count", "    values = run.scores", EDGES
    ),
    Mutant(
        "assay/edges/source_run.py",
        ".stop] = self.theirs[block.mlp] - ours[block.mlp]\n",
        ".stop] = ours[block.mlp] - self.theirs[block.mlp]\n",
        EDGES,
    ),
    # audit
    Mutant(
        "assay/audit/bars.py",
        "room = alpha * (self.weight + count) - reach",
        "room = alpha * self.weight",
        BARS,
    ),
    Mutant(
        "assay/audit/bars.py",
        'np.searchsorted(self.above, room + 1e-9, side="right") - 1',
        'np.searchsorted(self.above, room + 1e-9, side="right")',
        BARS,
    ),
    Mutant(
        "assay/audit/bars.py",
        "factor = np.where(mask, np.maximum(factor, quantile[parts.example]), factor)",
        "factor = np.where(mask, quantile[parts.example], factor)",
        BARS,
    ),
    Mutant(
        "assay/audit/bars.py",
        "mask = mask & (ranks(parts, name) < caps[name])",
        "mask = mask & (ranks(parts, name) <= caps[name])",
        BARS,
    ),
    Mutant(
        "assay/audit/calibration.py",
        "return 1 / (self.inclusion * self.parts.copies[self.rows])",
        "return 1 / self.inclusion",
        BARS,
    ),
    Mutant(
        "assay/audit/calibration.py",
        "total = float((1 / ablated.parts.copies[selected]).sum())",
        "total = float(selected.sum())",
        BARS,
    ),
    Mutant(
        "assay/audit/calibration.py",
        "np.maximum.at(largest, place, residual[rows])",
        "largest[place] = residual[rows]",
        BARS,
    ),
    Mutant(
        "assay/audit/calibration.py",
        "np.select([np.isin(parts.unit, fold) for fold in chosen[:2]], [0, 1], 2)",
        "np.select([np.isin(np.arange(parts.examples), fold) for fold in chosen[:2]], [0, 1], 2)",
        BARS,
    ),
    Mutant(
        "assay/audit/sampling.py",
        "return self.taken[place] / self.size[place]",
        "return np.ones(len(parts))",
        TOTALS,
    ),
    Mutant(
        "assay/audit/sampling.py",
        "order = np.lexsort((keys, cell))",
        "order = np.argsort(cell, kind='stable')",
        BARS,
    ),
    Mutant(
        "assay/audit/sampling.py",
        "drawn = np.minimum(self.taken, inside)",
        "drawn = np.minimum(self.taken, np.minimum(inside, 1))",
        BARS,
    ),
    Mutant(
        "assay/audit/population.py",
        "index, mask = active_rows(norms[name].cpu())",
        "index, mask = active_rows(torch.ones_like(norms[name].cpu()))",
        OPERATIONS,
    ),
    Mutant(
        "assay/audit/intervals.py",
        "        more.var(ddof=1)\n    ) / len(more)",
        "        0.0\n    ) / len(more)",
        TOTALS,
    ),
    Mutant(
        "assay/audit/totals.py",
        "known + exact - guess, level,",
        "known, level,",
        TOTALS,
    ),
    Mutant(
        "assay/audit/totals.py",
        "if np.ptp(above - share * below) <= 1e-12",
        "if np.ptp(above - share * below) <= -1e-12",
        TOTALS,
    ),
    Mutant(
        "assay/audit/scrubbing.py",
        "    return parts.add(carried)[donor]",
        "    return parts.add(weights)[donor]",
        OPERATIONS,
    ),
    Mutant(
        "assay/audit/means.py",
        "truth[drawn] += (known[source] - score[drawn]) / inclusion[source]",
        "truth[drawn] += known[source] - score[drawn]",
        EFFECTS,
    ),
    Mutant(
        "assay/audit/means.py",
        "chosen = ~others if (~others).any() else others",
        "chosen = np.ones_like(others)",
        EFFECTS,
    ),
    Mutant(
        "assay/audit/agreement.py",
        "return (np.cumsum(tied) - tied / 2)[place]",
        "return np.cumsum(tied)[place]",
        ("tests/audit/test_agreement.py",),
    ),
    Mutant(
        "assay/audit/coverage.py",
        "    finite = np.isfinite(half)",
        "    finite = np.ones(len(half), dtype=bool)",
        BARS,
    ),
    Mutant(
        "assay/audit/totals.py",
        "    if trials < LEAST:",
        "    if trials < 1:",
        TOTALS,
    ),
    Mutant(
        "assay/audit/totals.py",
        "weights=values / ablated.inclusion,",
        "weights=values,",
        TOTALS,
    ),
    Mutant(
        "assay/audit/agreement.py",
        "if graded else nan,",
        "if n > 0 else nan,",
        ("tests/audit/test_agreement.py",),
    ),
    Mutant(
        "assay/studies/attribution/study.py",
        "if text not in before]",
        "]",
        ("tests/studies/test_attribution_study.py",),
        slow=True,
    ),
    Mutant(
        "assay/audit/applied.py",
        "            < found.nominal",
        "            < 0",
        ("tests/audit/test_applied_bars.py",),
    ),
]
