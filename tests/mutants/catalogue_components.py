"""Mutants of components: squashings, penalties, masks, sources, recovery, scaling."""

from __future__ import annotations

from run_mutants import Mutant

COMPONENTS = "tests/mechanisms/components"

MUTANTS = [
    Mutant(
        "assay/mechanisms/components/squash.py",
        "return torch.where(z > 0, inside, ctx.leak * gradient.clamp(max=0)), None",
        "return torch.where(z > 0, inside, ctx.leak * gradient.clamp(min=0)), None",
        (f"{COMPONENTS}/test_squash.py::test_lower_passes_the_gradient_as_defined",),
    ),
    Mutant(
        "assay/mechanisms/components/minimality.py",
        "at = mean if smooth is None else smooth + (mean - mean.detach())",
        "at = mean if smooth is None else smooth",
        (
            f"{COMPONENTS}/test_component_minimality.py::test_running_means_are_debiased_and_keep_the_gradient_of_the_current_mean",
        ),
    ),
    Mutant(
        "assay/mechanisms/components/minimality.py",
        "            totals[name] = total if reduce is None else reduce(total)\n",
        "            totals[name] = total\n",
        (
            f"{COMPONENTS}/test_component_scaling.py::test_the_penalty_of_summed_shares_has_no_bias_and_that_of_local_ones_has",
        ),
    ),
    Mutant(
        "assay/mechanisms/components/masks.py",
        "rest, shrink = mask.components - delta, delta - 1",
        "rest, shrink = mask.components - 1, delta - 1",
        (f"{COMPONENTS}/test_component_masks.py::test_a_masked_pass_is_the_plain_loop",),
    ),
    Mutant(
        "assay/mechanisms/components/recovery.py",
        "cosines = (columns @ writer.T) * reader.sign()",
        "cosines = columns @ writer.T",
        (
            f"{COMPONENTS}/test_component_recovery.py::test_known_components_are_recovered_and_dead_ones_are_never_picked",
        ),
    ),
    Mutant(
        "assay/mechanisms/components/scene.py",
        "            routed = order < many.unsqueeze(-1)",
        "            routed = order <= many.unsqueeze(-1)",
        (
            f"{COMPONENTS}/test_component_sources.py::test_subset_routing_draws_k_uniformly_and_then_k_of_the_sites",
        ),
    ),
    Mutant(
        "assay/mechanisms/components/sources.py",
        ".add_(step).clamp_(0, 1)",
        ".sub_(step).clamp_(0, 1)",
        (
            f"{COMPONENTS}/test_component_sources.py::test_a_persistent_adversary_ascends_with_adam_and_clips",
        ),
    ),
    Mutant(
        "assay/mechanisms/components/problem.py",
        "loss = detached.loss(leaves, everywhere) / self.world",
        "loss = -detached.loss(leaves, everywhere) / self.world",
        (
            f"{COMPONENTS}/test_component_problem.py::test_the_main_backward_pass_is_one_more_ascent",
        ),
    ),
    Mutant(
        "assay/mechanisms/components/kind.py",
        "            low = torch.where(routed, low, ones)\n",
        "            low = torch.where(routed, low, low)\n",
        (
            f"{COMPONENTS}/test_component_gates.py::test_boxes_run_from_the_importance_to_one_and_for_the_delta_from_zero",
        ),
    ),
    Mutant(
        "assay/mechanisms/components/scaling.py",
        "share=1 - 1 / _bracket(mean * before, beta)",
        "share=1 - 1 / (1 + beta * old)",
        (
            f"{COMPONENTS}/test_component_scaling.py::test_beta_makes_sixty_to_eighty_percent_of_the_pressure",
        ),
    ),
    Mutant(
        "assay/mechanisms/components/initial.py",
        "if participation(rows) >= participation(pulls):",
        "if participation(rows) < participation(pulls):",
        (
            f"{COMPONENTS}/test_component_problem.py::test_a_start_at_data_is_where_single_features_are",
        ),
    ),
    Mutant(
        "assay/mechanisms/components/comparison.py",
        "return (v.T @ other_v) * (u @ other_u.T)",
        "return (v.T @ other_v).abs() * (u @ other_u.T).abs()",
        (
            f"{COMPONENTS}/test_component_recovery.py::test_two_decompositions_are_matched_by_their_rank_one_matrices",
        ),
    ),
    Mutant(
        "assay/mechanisms/components/initial.py",
        "chosen.append(int(((same & around).sum(1) * around).argmax()))",
        "chosen.append(best)",
        (
            f"{COMPONENTS}/test_component_problem.py::test_a_start_at_data_is_where_single_features_are",
        ),
    ),
    Mutant(
        "assay/mechanisms/components/importance.py",
        "torch.where(places < 0, -1, 1) * w1.abs()",
        "w1",
        (
            f"{COMPONENTS}/test_importance_functions.py::test_spread_nets_rise_with_the_size_of_their_input_to_one_at_the_largest",
        ),
    ),
    Mutant(
        "assay/mechanisms/components/scene.py",
        "{name: entry.round_() for",
        "{name: entry for",
        (
            f"{COMPONENTS}/test_component_sources.py::test_binary_sources_are_at_either_end_with_equal_probability",
        ),
    ),
]
