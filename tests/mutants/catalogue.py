"""The mutants, room by room; a line must stand exactly once in its file."""

from __future__ import annotations

from run_mutants import Mutant

INVARIANTS = ("tests/core/test_invariants.py",)
SUM = ("tests/core/test_gated_sum.py",)
SITES = ("tests/core/test_sites.py",)
VALUES = ("tests/core/test_values.py",)
METHODS = ("tests/attribution/test_methods.py", "tests/attribution/test_estimators.py")
NODES = ("tests/mechanisms/nodes", "tests/core/test_invariants.py")
EDGES = ("tests/edges",)
COMPONENTS = "tests/mechanisms/components"

CATALOGUE = [
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
        "assay/mechanisms/nodes/suffix.py",
        "alive = (positions == last) if late else (positions <= last)",
        "alive = (positions == last) if late else (positions < last)",
        NODES,
    ),
    Mutant(
        "assay/mechanisms/nodes/suffix.py",
        'late = stage.layer == len(self.layers) - 1 and stage.piece not in ("pre", "keys")',
        'late = stage.layer == len(self.layers) - 1 and stage.piece not in ("pre",)',
        NODES,
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
        "assay/edges/scores.py",
        ".stop] = self.theirs[block.mlp] - ours[block.mlp]\n",
        ".stop] = ours[block.mlp] - self.theirs[block.mlp]\n",
        EDGES,
    ),
    # components
    Mutant(
        "assay/mechanisms/components/squash.py",
        "return torch.where(z > 0, inside, ctx.leak * gradient.clamp(max=0)), None",
        "return torch.where(z > 0, inside, ctx.leak * gradient.clamp(min=0)), None",
        (f"{COMPONENTS}/test_squash.py",),
    ),
    Mutant(
        "assay/mechanisms/components/minimality.py",
        "at = mean if smooth is None else smooth + (mean - mean.detach())",
        "at = mean if smooth is None else smooth",
        (f"{COMPONENTS}/test_component_minimality.py",),
    ),
    Mutant(
        "assay/mechanisms/components/minimality.py",
        "            totals[name] = total if reduce is None else reduce(total)\n",
        "            totals[name] = total\n",
        (f"{COMPONENTS}/test_component_scaling.py",),
    ),
    Mutant(
        "assay/mechanisms/components/masks.py",
        "rest, shrink = mask.components - delta, delta - 1",
        "rest, shrink = mask.components - 1, delta - 1",
        (f"{COMPONENTS}/test_component_masks.py",),
    ),
    Mutant(
        "assay/mechanisms/components/recovery.py",
        "cosines = (columns @ writer.T) * reader.sign()",
        "cosines = columns @ writer.T",
        (f"{COMPONENTS}/test_component_recovery.py",),
    ),
    Mutant(
        "assay/mechanisms/components/scene.py",
        "            routed = order < many.unsqueeze(-1)",
        "            routed = order <= many.unsqueeze(-1)",
        (f"{COMPONENTS}/test_component_sources.py",),
    ),
    Mutant(
        "assay/mechanisms/components/sources.py",
        ".add_(step).clamp_(0, 1)",
        ".sub_(step).clamp_(0, 1)",
        (f"{COMPONENTS}/test_component_sources.py",),
    ),
    Mutant(
        "assay/mechanisms/components/problem.py",
        "loss = detached.loss(leaves, everywhere) / self.world",
        "loss = -detached.loss(leaves, everywhere) / self.world",
        (f"{COMPONENTS}/test_component_problem.py",),
    ),
    Mutant(
        "assay/mechanisms/components/kind.py",
        "            low = torch.where(routed, low, ones)\n",
        "            low = torch.where(routed, low, low)\n",
        (f"{COMPONENTS}/test_component_gates.py",),
    ),
    Mutant(
        "assay/mechanisms/components/scaling.py",
        "share=1 - 1 / _bracket(mean * before, beta)",
        "share=1 - 1 / (1 + beta * old)",
        (f"{COMPONENTS}/test_component_scaling.py",),
    ),
    Mutant(
        "assay/mechanisms/components/initial.py",
        "if participation(rows) >= participation(pulls):",
        "if participation(rows) < participation(pulls):",
        (f"{COMPONENTS}/test_component_problem.py",),
    ),
    Mutant(
        "assay/mechanisms/components/comparison.py",
        "return (v.T @ other_v) * (u @ other_u.T)",
        "return (v.T @ other_v).abs() * (u @ other_u.T).abs()",
        (f"{COMPONENTS}/test_component_recovery.py",),
    ),
]
