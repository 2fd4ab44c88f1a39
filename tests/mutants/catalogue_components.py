"""Mutants of components: squashings, penalties, masks, sources, recovery, scaling."""

from __future__ import annotations

from run_mutants import Mutant

COMPONENTS = "tests/mechanisms/components"

MUTANTS = [
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
