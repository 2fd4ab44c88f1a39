"""Mutants of training, files and targets, and of what is kept of a network."""

from __future__ import annotations

from run_mutants import Mutant

MUTANTS = [
    # learn
    Mutant(
        "assay/learn/loop.py",
        '                group["lr"] = rate * schedule(step / steps)',
        '                group["lr"] *= schedule(step / steps)',
        (
            "tests/learn/test_small_trainings.py::test_every_rate_is_its_first_one_times_the_schedule",
        ),
    ),
    Mutant(
        "assay/learn/loop.py",
        '    generator.set_state(state["generator"].cpu())\n',
        "    generator.manual_seed(0)\n",
        ("tests/learn/test_loop.py::test_a_checkpoint_of_something_else_is_refused",),
    ),
    Mutant(
        "assay/learn/loop.py",
        '    optimizer.load_state_dict(state["optimizer"])\n',
        "    optimizer.state_dict()\n",
        ("tests/learn/test_small_trainings.py::test_an_interrupted_training_logs_every_step_once",),
    ),
    Mutant(
        "assay/learn/loop.py",
        "            run.forget_after(name, first - 1)",
        "            run.forget_after(name, first)",
        ("tests/learn/test_small_trainings.py::test_an_interrupted_training_logs_every_step_once",),
    ),
    Mutant(
        "assay/learn/toys.py",
        "int(losses.argmin())",
        "int(losses.argmax())",
        ("tests/learn/test_small_trainings.py::test_the_best_of_several_copies_is_kept",),
    ),
    # io
    Mutant(
        "assay/io/commits.py",
        "                return files.sha256(path) == self.sha256",
        "                return True",
        ("tests/io/test_record_lines.py::test_a_flipped_bit_is_found_in_logs_and_in_files",),
    ),
    Mutant(
        "assay/io/commits.py",
        "return digest(stream.read(self.size)) == self.sha256",
        "return True",
        ("tests/io/test_record_lines.py::test_a_flipped_bit_is_found_in_logs_and_in_files",),
    ),
    Mutant(
        "assay/io/commits.py",
        "        if check != self._check:",
        '        if check == "":',
        ("tests/io/test_runs.py::test_every_flipped_byte_is_named[assay-run.jsonl]",),
    ),
    Mutant(
        "assay/io/commits.py",
        'if path.is_absolute() or ".." in path.parts or',
        "if path.is_absolute() or",
        ("tests/io/test_record_lines.py::test_no_name_leads_out_of_the_folder",),
    ),
    Mutant(
        "assay/io/locks.py",
        "fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        ("tests/io/test_runs.py::test_one_process_at_a_time_and_no_lock_outlives_a_kill",),
    ),
    Mutant(
        "assay/io/record.py",
        "            data = path.read_bytes()[: entry.size]",
        "            data = path.read_bytes()",
        ("tests/io/test_runs.py::test_a_resumed_log_is_that_of_the_last_write",),
    ),
    Mutant(
        "assay/io/files.py",
        'return path.read_text(encoding="utf-8-sig")',
        'return path.read_text(encoding="utf-8")',
        ("tests/io/test_files.py::test_byte_order_marks_are_accepted",),
    ),
    Mutant(
        "assay/io/arrays.py",
        "math.prod(shape) * dtype.itemsize != len(body)",
        "math.prod(shape) * dtype.itemsize > len(body)",
        ("tests/io/test_files.py::test_npz_headers_are_held_against_the_bytes",),
    ),
    # targets
    Mutant(
        "assay/targets/metrics.py",
        'wrong = years <= labels["years"][:, None]',
        'wrong = years < labels["years"][:, None]',
        ("tests/targets/test_metrics.py::test_greater_than_counts_wrong_minus_right_years",),
    ),
    Mutant(
        "assay/targets/metrics.py",
        "return (clean.exp() * (clean - logits.log_softmax(-1))).sum(-1)",
        "return (logits.softmax(-1) * (logits.log_softmax(-1) - clean)).sum(-1)",
        (
            "tests/targets/test_metrics.py::test_the_divergence_is_that_of_the_clean_run_from_this_one",
        ),
    ),
    Mutant(
        "assay/targets/metrics.py",
        "        weights = mask[:, 1:].to(each.dtype)",
        "        weights = mask[:, :-1].to(each.dtype)",
        ("tests/targets/test_metrics.py::test_loss_leaves_padding_out",),
    ),
    Mutant(
        "assay/targets/metrics.py",
        "return logits.to(torch.promote_types(logits.dtype, torch.float32))",
        "return logits",
        ("tests/targets/test_metrics.py::test_half_precision_logits_are_widened",),
    ),
    Mutant(
        "assay/targets/families.py",
        '        before_mlp="pre_feedforward_layernorm",\n',
        '        before_mlp="post_attention_layernorm",\n',
        (
            "tests/mechanisms/nodes/test_suffix_patching.py::test_metrics_that_read_the_whole_vocabulary",
        ),
    ),
    Mutant(
        "assay/targets/families.py",
        'bool(getattr(config, "use_parallel_residual", False))',
        "True",
        (
            "tests/edges/test_edges.py::test_an_mlp_reads_the_heads_of_its_block_unless_they_run_side_by_side",
        ),
    ),
    # mechanisms: nodes
    Mutant(
        "assay/targets/suffix_plan.py",
        "dtype=torch.bool).triu(1)",
        "dtype=torch.bool).triu(2)",
        (
            "tests/mechanisms/nodes/test_suffix_patching.py::test_attention_to_later_positions_takes_the_general_path",
        ),
    ),
    Mutant(
        "assay/targets/suffix.py",
        "query.columns().to(columns.device)).all()",
        "query.columns().to(columns.device)).any()",
        (
            "tests/mechanisms/nodes/test_suffix_patching.py::test_single_columns_of_a_fused_projection",
        ),
    ),
    Mutant(
        "assay/targets/suffix.py",
        "                    layer.call.mask_at(who, position),",
        "                    layer.call.mask_at(who, self.last[who]),",
        (
            "tests/mechanisms/nodes/test_suffix_patching.py::test_every_site_of_every_family[mistral]",
        ),
    ),
    Mutant(
        "assay/targets/reading.py",
        "(distance > 8 * torch.finfo(value.dtype).eps * size)",
        "(distance > 0 * size)",
        (
            "tests/mechanisms/nodes/test_node_kind.py::test_nodes_that_differ_by_rounding_alone_are_inactive",
        ),
    ),
    Mutant(
        "assay/mechanisms/nodes/bind.py",
        'sorted({ref.site for ref in refs.values()}, key=lambda site: "+" in site)',
        'sorted({ref.site for ref in refs.values()}, key=lambda site: "+" not in site)',
        (
            "tests/mechanisms/nodes/test_node_kind.py::test_a_sum_of_sites_is_gated_behind_its_first_summand",
        ),
    ),
    Mutant(
        "assay/targets/reading.py",
        "            weights = mask.double().reshape(",
        "            weights = torch.ones_like(mask).double().reshape(",
        ("tests/mechanisms/nodes/test_node_kind.py::test_references",),
    ),
    # edges
    Mutant(
        "assay/edges/source_run.py",
        "            pulled -= pulled.mean(-1, keepdim=True)",
        "            pulled -= 0 * pulled.mean(-1, keepdim=True)",
        ("tests/edges/test_edges.py::test_eap_is_the_gradient_at_each_receivers_own_input",),
    ),
    Mutant(
        "assay/edges/source_run.py",
        "constant = weight @ normed.offset + (0 if bias is None else bias)",
        "constant = 0 if bias is None else bias",
        ("tests/edges/test_edges.py::test_eap_is_the_gradient_at_each_receivers_own_input",),
    ),
    Mutant(
        "assay/edges/patching.py",
        "found[place[0], place[1]] = True",
        "found[place[0]] = True",
        ("tests/edges/test_edges.py::test_exact_edges_cut_one_edge_at_a_time",),
    ),
    Mutant(
        "assay/edges/graph.py",
        "return self.seen_by_heads(layer) + (0 if self.parallel else self.heads)",
        "return self.seen_by_heads(layer) + self.heads",
        (
            "tests/edges/test_edges.py::test_an_mlp_reads_the_heads_of_its_block_unless_they_run_side_by_side",
        ),
    ),
    # core
    Mutant(
        "assay/core/sites.py",
        "        found, _ = _read(model, inputs, wanted, copied=changed)",
        "        found, _ = _read(model, inputs, wanted, copied=frozenset())",
        (
            "tests/core/test_sites.py::test_what_is_read_was_there_before_anything_was_written_in_place",
        ),
    ),
    # mechanisms: channels
    Mutant(
        "assay/mechanisms/channels/bind.py",
        "            Target(copy.deepcopy(network).double(), metric,",
        "            Target(network.double(), metric,",
        (
            "tests/mechanisms/channels/test_channel_binding.py::test_certificates_are_of_the_network_that_was_bound",
        ),
    ),
    # mechanisms: directions
    Mutant(
        "assay/mechanisms/directions/power.py",
        "            if climb[-1] > history[-1]:",
        "            if climb[-1] < history[-1]:",
        (
            "tests/mechanisms/directions/test_power_iteration.py::test_the_best_of_all_restarts_is_kept",
        ),
    ),
    # mechanisms: channels
    Mutant(
        "assay/mechanisms/channels/norms.py",
        "width * layer.epsilon).sqrt()",
        "4 * width * layer.epsilon).sqrt()",
        (
            "tests/mechanisms/channels/test_channel_bounds.py::test_the_epsilon_of_a_norm_counts_once",
        ),
    ),
]
