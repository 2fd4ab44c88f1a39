"""Mutants of bounds: roundings that are left out, ends that are mixed up, aliases."""

from __future__ import annotations

from run_mutants import Mutant

MUTANTS = [
    # numbers
    Mutant(
        "assay/bounds/numbers.py",
        "np.nextafter(nearest, direction), nearest)",
        "nearest, nearest)",
        (
            "tests/bounds/test_precisions.py::test_what_float64_cannot_hold_is_refused_as_a_number_and_enclosed_as_an_end",
        ),
    ),
    Mutant(
        "assay/bounds/numbers.py",
        "_WHOLE = 2.0**53",
        "_WHOLE = 2.0**54",
        (
            "tests/bounds/test_precisions.py::test_what_float64_cannot_hold_is_refused_as_a_number_and_enclosed_as_an_end",
        ),
    ),
    Mutant(
        "assay/bounds/numbers.py",
        "return values.copy() if copy else values",
        "return values",
        ("tests/bounds/test_precisions.py::test_tensors_and_arrays_are_never_shared",),
    ),
    # rounding
    Mutant(
        "assay/bounds/rounding.py",
        "return add_up(mul_up(value, 1 + 2 * gamma(terms)), 2 * terms * TINY)",
        "return add_up(value, 2 * terms * TINY)",
        (
            "tests/bounds/test_rounding.py::test_one_float_product_with_its_error_encloses_the_exact_one",
        ),
    ),
    Mutant(
        "assay/bounds/rounding.py",
        "return cast(Array, np.maximum(sub_up(self.hi, middle), sub_up(middle, self.lo)))",
        "return cast(Array, sub_up(self.hi, middle))",
        ("tests/bounds/test_rounding.py::test_interval_operators_contain_every_pair",),
    ),
    Mutant(
        "assay/bounds/rounding.py",
        "return math.nextafter(terms * unit / (1 - terms * unit), math.inf) * (1 + 4 * UNIT)",
        "return terms * unit",
        ("tests/bounds/test_rounding.py::test_gamma_is_an_upper_bound_and_refuses_long_sums",),
    ),
    Mutant(
        "assay/bounds/rounding.py",
        "return Interval(sub_down(self.lo, other.hi), sub_up(self.hi, other.lo))",
        "return Interval(sub_down(self.lo, other.lo), sub_up(self.hi, other.hi))",
        ("tests/bounds/test_rounding.py::test_interval_operators_contain_every_pair",),
    ),
    # levels
    Mutant(
        "assay/bounds/levels.py",
        "LARGEST32 = 2.0**127",
        "LARGEST32 = 2.0**129",
        ("tests/bounds/test_float32_range.py::test_nothing_overflows_behind_a_bound",),
    ),
    Mutant(
        "assay/bounds/levels.py",
        "flushed = 2 * terms * SMALL32 * (1 + largest)",
        "flushed = 2 * terms * SMALL32",
        ("tests/bounds/test_execution_corners.py::test_subnormal_numbers_may_be_read_as_zeros",),
    ),
    Mutant(
        "assay/bounds/levels.py",
        "lo, hi = sub_down(lo, wobble), add_up(hi, wobble)",
        "lo, hi = sub_down(lo, 0.0), add_up(hi, 0.0)",
        ("tests/bounds/test_operations.py::test_merging_rows_pays_for_its_rounding",),
    ),
    Mutant(
        "assay/bounds/levels.py",
        "total = sum((sum_up(m.reshape(len(m), -1)) for m in magnitudes), np.ones(1))",
        "total = sum((sum_up(m.reshape(len(m), -1)) for m in magnitudes[:0]), np.ones(1))",
        ("tests/bounds/test_operations.py::test_underflowing_coefficients_are_paid_for",),
    ),
    # operations
    Mutant(
        "assay/bounds/operations.py",
        "            self.weight.shape[1] + 1, absolute, max(largest(x), largest(self.weight))",
        "            self.weight.shape[1], absolute, max(largest(x), largest(self.weight))",
        ("tests/bounds/test_operations.py::test_every_rounding_in_float32_is_allowed_for[affine]",),
    ),
    Mutant(
        "assay/bounds/operations.py",
        'add_up(Arithmetic("real").dot_up(x, self.absolute.T), np.abs(self.bias))',
        'add_up(Arithmetic("real").dot_up(x, self.absolute.T), 0.0)',
        (
            "tests/bounds/test_execution_corners.py::test_a_bias_that_dwarfs_the_products_is_rounded_too",
        ),
    ),
    Mutant(
        "assay/bounds/operations.py",
        "return ar.dot(xs[0].midpoint(), self.weight.T) + Interval(-spread, spread) + self.bias",
        "x = ar.dot(xs[0].midpoint(), self.weight.T) + Interval(-spread, spread)\n"
        "        return Interval(x.lo + self.bias, x.hi + self.bias)",
        ("tests/bounds/test_operations.py::test_a_bias_is_added_outward",),
    ),
    Mutant(
        "assay/bounds/operations.py",
        "    terms: int = 2\n",
        "    terms: int = 1\n",
        ("tests/bounds/test_operations.py::test_every_rounding_in_float32_is_allowed_for[scale]",),
    ),
    Mutant(
        "assay/bounds/operations.py",
        "return [rows, self.sign * rows], constant",
        "return [rows, rows], constant",
        ("tests/bounds/test_operations.py::test_a_step_through_two_inputs",),
    ),
    Mutant(
        "assay/bounds/operations.py",
        "return executed_sum(1, value.magnitude(), 0.0)",
        "return executed_sum(0, value.magnitude(), 0.0)",
        ("tests/bounds/test_operations.py::test_every_rounding_in_float32_is_allowed_for[add]",),
    ),
    # nonlinear
    Mutant(
        "assay/bounds/nonlinear.py",
        "        check_range(x)\n",
        "        check_range(0 * x)\n",
        (
            "tests/bounds/test_float32_range.py::test_nothing_overflows_behind_a_bound[interval-gelu]",
        ),
    ),
    Mutant(
        "assay/bounds/nonlinear.py",
        "mul_up(2.05, add_up(gap, 2 * ULPS * UNIT32)), 1.05 * (terms + 2) * UNIT32",
        "mul_up(2.05, add_up(gap, 2 * ULPS * UNIT32)), 0.0 * (terms + 2) * UNIT32",
        ("tests/bounds/test_execution_corners.py::test_a_softmax_may_lose_all_its_small_terms",),
    ),
    Mutant(
        "assay/bounds/nonlinear.py",
        "return np.full(value.shape, SMALL32)  # a subnormal number may be flushed",
        "return np.zeros(value.shape)",
        ("tests/bounds/test_float32_range.py::test_subnormal_numbers_may_be_flushed",),
    ),
    # graph
    Mutant(
        "assay/bounds/graph.py",
        "virtual=True, limited=True)",
        "virtual=True)",
        ("tests/bounds/test_float32_range.py::test_nothing_overflows_behind_a_bound",),
    ),
    Mutant(
        "assay/bounds/graph.py",
        "last = ops.Scale(weight, np.zeros(()), width + 8 + 2 * ULPS, reason)",
        "last = ops.Scale(weight, np.zeros(()), 8 + 2 * ULPS, reason)",
        ("tests/bounds/test_execution_corners.py::test_a_norm_may_lose_all_its_small_squares",),
    ),
    Mutant(
        "assay/bounds/graph.py",
        "shift = Interval.exactly(float(width**2)) * _checked_eps(eps)",
        "shift = Interval.exactly(float(4 * width**2)) * _checked_eps(eps)",
        ("tests/bounds/test_conversion.py::test_the_epsilon_of_a_norm_counts_once",),
    ),
    # relaxations
    Mutant(
        "assay/bounds/relaxations.py",
        "GELU_LEAST = -0.16997121",
        "GELU_LEAST = -0.1699712",
        ("tests/bounds/test_relaxations.py::test_gelu_turns_where_stated",),
    ),
    Mutant(
        "assay/bounds/relaxations.py",
        "np.where(unstable, (x.hi > -x.lo).astype(np.float64), chord)",
        "np.where(unstable, (x.hi < -x.lo).astype(np.float64), chord)",
        ("tests/bounds/test_relaxations.py::test_relu_lines_are_the_tightest_ones",),
    ),
    Mutant(
        "assay/bounds/relaxations.py",
        "-mul_up(0.5, mul_up(box.hi, second))",
        "-mul_up(0.25, mul_up(box.hi, second))",
        ("tests/bounds/test_relaxations.py::test_softmax_and_its_linear_part",),
    ),
    Mutant(
        "assay/bounds/relaxations.py",
        "high = np.minimum(radii, mul_up(0.25, mul_up(sum_, sum_)))",
        "high = np.minimum(radii, mul_up(0.25, mul_up(difference, difference)))",
        ("tests/bounds/test_relaxations.py::test_product_rest",),
    ),
    # regions
    Mutant(
        "assay/bounds/regions.py",
        "grown = add_up(box.radii, sqrt_up(sum_up(squares)))",
        "grown = box.radii",
        (
            "tests/bounds/test_regions.py::test_float32_bounds_hold_for_inputs_that_are_rounded_first",
        ),
    ),
    Mutant(
        "assay/bounds/regions.py",
        "return np.where(beyond, stepped, near).astype(np.float64)",
        "return near.astype(np.float64)",
        (
            "tests/bounds/test_regions.py::test_float32_bounds_hold_for_inputs_that_are_rounded_first",
        ),
    ),
    Mutant(
        "assay/bounds/regions.py",
        "if not np.all(np.isfinite(r) & (r >= 0)):",
        "if not np.all(np.isfinite(r)):",
        ("tests/bounds/test_regions.py::test_a_ball_that_is_none_is_refused",),
    ),
    # convert
    Mutant(
        "assay/bounds/convert.py",
        "in module._modules.items():",
        "in module.named_children():",
        (
            "tests/bounds/test_conversion.py::test_a_module_counts_as_often_as_it_stands_in_a_sequence",
        ),
    ),
    Mutant(
        "assay/bounds/convert.py",
        "    if type(model) is BilinearNetwork:",
        "    if isinstance(model, BilinearNetwork):",
        (
            "tests/bounds/test_conversion.py::test_some_impostors_are_bounded_right_and_subclasses_are_refused",
        ),
    ),
    Mutant(
        "assay/bounds/convert.py",
        "shape if rows * columns > 1 else shape[1:], (1, 3, 0, 2, 4))",
        "shape if rows * columns > 1 else shape[1:], (1, 3, 0, 4, 2))",
        (
            "tests/bounds/test_certify.py::test_a_converted_network_computes_the_same_function[patches]",
        ),
    ),
    # engine
    Mutant(
        "assay/bounds/engine.py",
        "mul_up(ar.gamma(1), magnitude))",
        "mul_up(0.0, magnitude))",
        ("tests/bounds/test_operations.py::test_merging_rows_pays_for_its_rounding",),
    ),
    # certify
    Mutant(
        "assay/bounds/certify.py",
        "return self.margins > 0",
        "return self.margins >= 0",
        ("tests/bounds/test_certify.py::test_a_tie_is_not_certified",),
    ),
    # derivatives and pins
    Mutant(
        "assay/bounds/search/pins.py",
        "found.append((lo >= 0, hi <= 0))",
        "found.append((lo >= -1, hi <= 0))",
        ("tests/bounds/test_derivatives.py::test_nothing_is_lost_on_the_face_that_is_left",),
    ),
    Mutant(
        "assay/bounds/trace/derivative.py",
        "ends = operation.scale * -0.5",
        "ends = operation.scale * 0.5",
        ("tests/bounds/test_derivatives.py::test_derivatives_are_those_of_the_network",),
    ),
    Mutant(
        "assay/bounds/rules/slope.py",
        "hi = np.where(inside, np.maximum(hi, bend[1]), hi)",
        "hi = np.where(inside, hi, hi)",
        ("tests/bounds/test_derivatives.py::test_a_slope_encloses_the_derivative",),
    ),
    # searches that go on
    Mutant(
        "assay/bounds/search/unfinished.py",
        'return held["search"] if held["key"] == self.key else None',
        'return held["search"]',
        ("tests/bounds/test_unfinished.py::test_another_search_is_not_gone_on_with",),
        slow=True,
    ),
    Mutant(
        "assay/bounds/search/leaves.py",
        "(highs if split.side == 0 else lows)[split.which]",
        "(highs if split.side == 1 else lows)[split.which]",
        ("tests/bounds/test_branching.py",),
    ),
    Mutant(
        "assay/bounds/search/branch.py",
        'self.began -= held["seconds"]',
        'self.began += held["seconds"]',
        (
            "tests/bounds/test_unfinished.py::test_a_search_that_is_killed_again_and_again_finds_the_same",
        ),
        slow=True,
    ),
    Mutant(
        "assay/bounds/search/branch.py",
        "if len(heap) + len(work.proved) > most:  # the leaves fill the memory",
        "if False:",
        ("tests/bounds/test_unfinished.py::test_leaves_stay_within_the_memory",),
        slow=True,
    ),
    # slopes of ReLU
    Mutant(
        "assay/bounds/search/ranges.py",
        "torch.where(mine == 0, usual_slope(x), (1 + mine.clamp(-1, 1)) / 2)",
        "usual_slope(x)",
        ("tests/bounds/test_branching.py::test_slopes_of_relu_are_moved_and_inherited",),
    ),
    Mutant(
        "assay/bounds/trace/lower.py",
        "        args = _first_as_node(lowering, args)\n",
        "",
        (
            "tests/bounds/test_traces.py::test_what_depends_on_no_input_may_be_summed_and_divided_by",
        ),
    ),
    # choices
    Mutant(
        "assay/bounds/rules/choice.py",
        "zero = x.lo, np.minimum(x.hi, t.hi)",
        "zero = x.lo, np.minimum(x.hi, t.lo)",
        ("tests/bounds/test_choices.py::test_lines_hold_wherever_the_threshold_may_lie",),
    ),
    Mutant(
        "assay/bounds/rules/choice.py",
        "return np.asarray(x.lo <= threshold.hi)",
        "return np.asarray(x.lo <= threshold.lo)",
        ("tests/bounds/test_rules_fuzz.py::test_a_rule_holds_at_random_points",),
    ),
    Mutant(
        "assay/bounds/search/ball.py",
        "whole = mul_up(lengths, sqrt_up(float(rows.shape[-1])))",
        "whole = lengths",
        ("tests/bounds/test_balls.py::test_no_input_leaves_the_ball_and_some_reach_it",),
    ),
    # properties of ONNX networks
    Mutant(
        "assay/bounds/search/goal.py",
        "return bounds[..., self._places].amax(-1).amin(-1)",
        "return bounds[..., self._places].amax(-1).amax(-1)",
        (
            "tests/proofs/test_unsafe.py::test_goals_are_the_least_conjunction_of_the_largest_constraint",
        ),
    ),
    Mutant(
        "assay/io/vnnlib.py",
        'one, other = (left, right) if x.head == "<=" else (right, left)',
        "one, other = (left, right)",
        ("tests/io/test_vnnlib.py::test_constraints_are_exact_and_in_disjunctive_normal_form",),
    ),
    Mutant(
        "assay/targets/onnx_network.py",
        "for pair in zip(begin[::-1], end[::-1], strict=True) for p in pair]",
        "for pair in zip(begin, end, strict=True) for p in pair]",
        ("tests/io/test_onnx.py::test_operations_agree_with_the_onnx_evaluator_and_have_bounds",),
    ),
    Mutant(
        "assay_check/gates/claims.py",
        "found = min(found, *(max(bounds[place] for place in group) for group in example.groups))",
        "found = max(bounds)",
        (
            "tests/proofs/test_unsafe.py::test_every_box_and_every_conjunction_counts_in_a_certificate",
        ),
    ),
    Mutant(
        "assay/proofs/unsafe.py",
        "[_rounded(x, -1) for x in case.low]",
        "[_rounded(x, 1) for x in case.low]",
        (
            "tests/proofs/test_unsafe.py::test_boxes_cover_what_no_float_holds_and_constants_grow_the_unsafe_set",
        ),
    ),
    Mutant(
        "assay/proofs/unsafe.py",
        "[_rounded(one.constant, -1) for one in numbers]",
        "[_rounded(one.constant, 1) for one in numbers]",
        (
            "tests/proofs/test_unsafe.py::test_boxes_cover_what_no_float_holds_and_constants_grow_the_unsafe_set",
        ),
    ),
    Mutant(
        "assay/proofs/unsafe.py",
        "return (found if whole else found / divisors) + constants",
        "return found + constants",
        ("tests/proofs/test_unsafe.py::test_coefficients_are_scaled_to_exact_ones",),
    ),
    Mutant(
        "assay/proofs/unsafe.py",
        "float((high if factor > 0 else low)[output])",
        "float(low[output])",
        ("tests/proofs/test_unsafe.py::test_an_enclosure_decides_by_its_worse_end",),
    ),
    Mutant(
        "assay/proofs/unsafe.py",
        "if found and left <= 0:",
        "if False:",
        ("tests/proofs/test_unsafe.py::test_boxes_that_there_is_no_time_for_stay_open",),
    ),
    Mutant(
        "assay/proofs/unsafe.py",
        "holds = len(found) == len(posed) and all(",
        "holds = any(",
        ("tests/proofs/test_unsafe.py::test_boxes_that_there_is_no_time_for_stay_open",),
    ),
    Mutant(
        "assay/proofs/unsafe.py",
        "inputs.append(min(max(value, first), last))",
        "inputs.append(value)",
        ("tests/proofs/test_unsafe.py::test_an_enclosure_decides_by_its_worse_end",),
    ),
    Mutant(
        "assay/proofs/gate_certificate.py",
        "if claim == UNSAFE and not found > 0:",
        "if False:",
        (
            "tests/proofs/test_unsafe.py::test_a_property_that_the_checker_cannot_show_gets_no_certificate",
        ),
    ),
    Mutant(
        "assay/io/vnnlib.py",
        "side, closer = (high, min) if factor > 0 else (low, max)",
        "side, closer = (high, max) if factor > 0 else (low, min)",
        ("tests/io/test_vnnlib.py::test_the_nearest_of_several_ends_counts",),
    ),
    Mutant(
        "assay/io/vnnlib.py",
        "boxes.setdefault(box, {})[unsafe] = None",
        "boxes[box] = {unsafe: None}",
        ("tests/io/test_vnnlib.py::test_constraints_are_exact_and_in_disjunctive_normal_form",),
    ),
    Mutant(
        "assay/io/vnnlib.py",
        "if any(_bits(x) > BITS for x in",
        "if any(_bits(x) < 0 for x in",
        ("tests/io/test_vnnlib.py::test_what_is_no_box_or_linear_constraint_is_refused",),
    ),
    Mutant(
        "assay/io/onnx_files.py",
        "    _require_valid(model, path)\n",
        "",
        ("tests/io/test_onnx.py::test_what_breaks_a_rule_or_the_memory_is_refused_before_it_runs",),
    ),
    Mutant(
        "assay/io/onnx_files.py",
        "if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:",
        "if False:",
        (
            "tests/io/test_onnx.py::test_files_that_are_not_what_they_should_be_are_refused_in_one_line",
        ),
    ),
    Mutant(
        "assay/io/onnx_files.py",
        "if len(versions) != 1 or not",
        "if not",
        (
            "tests/io/test_onnx.py::test_files_that_are_not_what_they_should_be_are_refused_in_one_line",
        ),
    ),
    Mutant(
        "assay/targets/onnx_network.py",
        "_single(0.01)",
        "0.01",
        ("tests/io/test_onnx.py::test_numbers_that_a_file_leaves_out_are_those_of_float32",),
    ),
    Mutant(
        "assay/targets/onnx_network.py",
        "    if step.version >= 13:\n",
        "    if True:\n",
        ("tests/io/test_onnx.py::test_an_old_softmax_is_over_all_axes_from_its_own_on",),
    ),
    Mutant(
        "assay/targets/onnx_network.py",
        "        self._measure()\n",
        "",
        ("tests/io/test_onnx.py::test_the_entries_of_all_steps_are_counted_before_they_are_made",),
    ),
    Mutant(
        "assay/targets/onnx_network.py",
        "if total.shape != found.shape:",
        "if False:",
        ("tests/io/test_onnx.py::test_what_breaks_a_rule_or_the_memory_is_refused_before_it_runs",),
    ),
    Mutant(
        "assay/bounds/search/plain.py",
        "torch.where(share * UNEVEN >= widest, score, 0.0)",
        "score",
        ("tests/bounds/test_branching.py::test_no_entry_stays_wide_because_lines_hide_it",),
    ),
    Mutant(
        "assay/bounds/search/points.py",
        "if self.probe is None:",
        "if True:",
        (
            "tests/proofs/test_unsafe.py::test_a_rare_unsafe_point_is_found_by_faces_and_in_the_worst_boxes",
        ),
    ),
    Mutant(
        "assay/bounds/search/attack.py",
        "at_end = draw(*self.low.shape) < ended",
        "at_end = draw(*self.low.shape) < 0",
        ("tests/proofs/test_unsafe.py::test_an_attack_draws_on_faces_of_every_dimension",),
    ),
    Mutant(
        "assay/bounds/search/sweep.py",
        "mine = asked.reshape(value.lo.shape)",
        "mine = np.ones(value.lo.shape, bool)",
        (
            "tests/proofs/test_unsafe.py::test_a_box_is_bounded_alike_whatever_is_bounded_with_it",
            "tests/proofs/test_unsafe.py::test_certificates_of_many_boxes_are_accepted",
        ),
    ),
    Mutant(
        "assay/bounds/trace/arithmetic.py",
        "lambda y: op(y, w, None, *args), x, zero",
        "lambda y: op(y, w, b, *args) - zero, x, zero",
        (
            "tests/bounds/test_traces.py::test_a_large_bias_does_not_round_the_weights_of_a_convolution",
        ),
    ),
    Mutant(
        "assay/bounds/trace/lower.py",
        "if value.ref in lowering.never:",
        "if False:",
        ("tests/bounds/test_traces.py::test_values_that_are_no_bound_are_refused",),
    ),
    Mutant(
        "assay_check/gates/claims.py",
        "and set(places) == set(range(size))",
        "and places",
        (
            "tests/proofs/test_unsafe.py::test_every_box_and_every_conjunction_counts_in_a_certificate",
        ),
    ),
]
