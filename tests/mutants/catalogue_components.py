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
        "loss = detached.loss(leaves, everywhere)",
        "loss = -detached.loss(leaves, everywhere)",
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
    Mutant(
        "assay/mechanisms/components/decomposition.py",
        "h.abs() * factor.norm(dim=1) / whole",
        "h.abs() / whole",
        (
            f"{COMPONENTS}/test_importance_functions.py::test_relative_nets_read_what_a_component_writes_beside_the_whole",
        ),
    ),
    Mutant(
        "assay/mechanisms/components/importance.py",
        "slope * (shares[site.name] + FAINT).log() + corrections",
        "(shares[site.name] + FAINT).log() + corrections",
        (
            f"{COMPONENTS}/test_importance_functions.py::test_relative_nets_read_what_a_component_writes_beside_the_whole",
        ),
    ),
    Mutant(
        "assay/mechanisms/components/importance.py",
        "(len(every) - 1) * (1 - KEPT)",
        "(len(every) - 1) * KEPT",
        (
            f"{COMPONENTS}/test_importance_functions.py::test_relative_nets_start_with_the_largest_shares_above_one_half",
        ),
    ),
    Mutant(
        "assay/mechanisms/components/initial.py",
        "roots = sizes[: site.components].sqrt()",
        "roots = sizes[: site.components]",
        (
            f"{COMPONENTS}/test_component_problem.py::test_a_start_at_singular_parts_is_the_matrix_and_its_largest_parts",
        ),
    ),
    Mutant(
        "assay/mechanisms/components/halves.py",
        "== self.component, 2.0, 1.0)",
        "== self.component, 1.0, 1.0)",
        (f"{COMPONENTS}/test_component_controls.py::test_two_halves_do_what_the_whole_did",),
    ),
    Mutant(
        "assay/mechanisms/components/halves.py",
        "new_u[component] /= 2",
        "new_u[component] /= 1",
        (f"{COMPONENTS}/test_component_controls.py::test_two_halves_do_what_the_whole_did",),
    ),
    Mutant(
        "assay/mechanisms/components/singular.py",
        "strength = h.abs() * u.norm(dim=1)",
        "strength = h.abs()",
        (
            f"{COMPONENTS}/test_component_controls.py::test_gates_keep_the_strongest_parts_and_as_many_as_asked",
        ),
    ),
    Mutant(
        "assay/mechanisms/components/scene.py",
        "own = slice(bounds[rank], bounds[rank + 1])",
        "own = slice(bounds[rank], bounds[-1])",
        (
            f"{COMPONENTS}/test_component_controls.py::test_the_losses_of_shares_add_up_to_that_of_the_whole",
        ),
    ),
    Mutant(
        "assay/mechanisms/components/scene.py",
        "shape = (part.whole, *shape[1:])",
        "shape = (part.first + part.examples, *shape[1:])",
        (
            f"{COMPONENTS}/test_component_controls.py::test_the_losses_of_shares_add_up_to_that_of_the_whole",
        ),
    ),
    Mutant(
        "assay/mechanisms/components/problem.py",
        "(term - term.detach()) / world",
        "(term - term.detach())",
        (
            f"{COMPONENTS}/test_component_controls.py::test_the_gradients_of_shares_add_up_to_that_of_the_whole",
        ),
    ),
    Mutant(
        "assay/mechanisms/components/problem.py",
        "own + (reduce(own.detach()) - own.detach())",
        "own + 0 * reduce(own.detach())",
        (
            f"{COMPONENTS}/test_component_controls.py::test_the_gradients_of_shares_add_up_to_that_of_the_whole",
        ),
    ),
    Mutant(
        "assay/studies/components/measure.py",
        "expected, why = value + alone,",
        "expected, why = value,",
        (
            "tests/studies/test_components_studies.py::test_every_option_of_a_language_model_is_reported",
        ),
        slow=True,
    ),
    Mutant(
        "assay/studies/components/inputs.py",
        "found = replace(found, ids=found.ids[:first])",
        "found = replace(found, ids=found.ids[-first:])",
        ("tests/studies/test_components_studies.py::test_controls_change_what_they_name",),
        slow=True,
    ),
    Mutant(
        "assay/mechanisms/components/jax/step.py",
        "source + g[site] * (1 - source) - delta",
        "source + g[site] - delta",
        (
            f"{COMPONENTS}/test_component_jax.py::test_the_jax_step_is_the_torch_step_on_any_number_of_devices",
        ),
        slow=True,
    ),
    Mutant(
        "assay/mechanisms/components/jax/step.py",
        "own - rate * factor * step",
        "own - rate * step",
        (
            f"{COMPONENTS}/test_component_jax.py::test_the_jax_step_is_the_torch_step_on_any_number_of_devices",
        ),
        slow=True,
    ),
    Mutant(
        "assay/mechanisms/components/jax/terms.py",
        "LEAK * jnp.minimum(gradient, 0)",
        "LEAK * jnp.maximum(gradient, 0)",
        (
            f"{COMPONENTS}/test_component_jax.py::test_the_jax_step_is_the_torch_step_on_any_number_of_devices",
        ),
        slow=True,
    ),
    Mutant(
        "assay/mechanisms/components/jax/terms.py",
        "form.beta * jnp.log2(1 + total)",
        "form.beta * jnp.log2(1 + mean)",
        (
            f"{COMPONENTS}/test_component_jax.py::test_the_jax_step_is_the_torch_step_on_any_number_of_devices",
        ),
        slow=True,
    ),
    Mutant(
        "assay/mechanisms/components/scene.py",
        "gradients = tuple(reduce(gradient) for gradient in gradients)",
        "gradients = tuple(gradients)",
        (f"{COMPONENTS}/test_component_processes.py::test_several_processes_agree_with_one",),
        slow=True,
    ),
    Mutant(
        "assay/mechanisms/components/scene.py",
        "    output, clean = widened(output), widened(clean)\n",
        "",
        (
            f"{COMPONENTS}/test_component_inputs.py::test_sums_over_many_positions_and_large_weights_stay_in_range",
        ),
    ),
    Mutant(
        "assay/mechanisms/components/sites.py",
        "        owners.setdefault(id(weight), []).append(path)",
        "        owners.setdefault(id(layers[path].weight), []).append(path)",
        (
            f"{COMPONENTS}/test_component_inputs.py::test_weights_that_are_computed_at_every_look_are_not_taken_for_shared_ones",
        ),
    ),
    Mutant(
        "assay/mechanisms/components/decomposition.py",
        "        if found is None or found.shape != shape or",
        "        if found is None or found.ndim != len(shape) or",
        (f"{COMPONENTS}/test_component_inputs.py::test_damaged_importances_are_refused",),
    ),
    Mutant(
        "assay/mechanisms/components/minimality.py",
        "-torch.expm1(-self.rate * steps)",
        "(1 - torch.exp(-self.rate * steps))",
        (
            f"{COMPONENTS}/test_component_inputs.py::test_a_long_half_life_is_debiased_from_the_first_step_on",
        ),
    ),
    Mutant(
        "assay/mechanisms/crosscoder/states.py",
        "    return codes.to(torch.promote_types(states.dtype, torch.float32))",
        "    return codes.to(states.dtype)",
        (
            "tests/mechanisms/crosscoder/test_crosscoder_kind.py::test_codes_of_narrow_networks_keep_the_range_and_precision_of_float32",
        ),
    ),
]
