"""Mutants of prompt graphs, audits of graphs, steering, and query and key attributions."""

from __future__ import annotations

from run_mutants import Mutant

PROMPT = "tests/edges/prompt/test_prompt_graphs.py"
FAMILY = (f"{PROMPT}::test_every_family_has_the_edges_of_backward_passes",)
FORMS = (f"{PROMPT}::test_every_form_of_transcoder_has_the_edges_of_backward_passes",)
INFLUENCE = ("tests/edges/prompt/test_influence.py",)
REMOVED = (f"{PROMPT}::test_exact_effects_are_those_of_gates",)
DIRECT = ("tests/edges/test_direct_effects.py",)
CLAIMS = ("tests/audit/test_claims.py",)
AUDIT = "tests/studies/test_graph_audit.py"
RIGHT = (f"{AUDIT}::test_node_effects_are_ablations_and_right_claims_hold",)
SAMPLE = (f"{AUDIT}::test_a_sample_gives_the_rest_their_bars",)
STATED = (
    f"{AUDIT}::test_stated_numbers_are_compared_with_the_models_own",
    f"{AUDIT}::test_the_likely_cause_is_the_model_where_probabilities_differ",
)
BAD = (f"{AUDIT}::test_graphs_of_something_else_are_refused_by_name",)
FILES = ("tests/io/test_attribution_graphs.py",)
PICTURE = (f"{AUDIT}::test_the_picture_shows_what_survives_of_the_listed",)
STEERING = "tests/audit/test_steering.py"
SET = (
    f"{STEERING}::test_a_feature_is_set_to_a_value_where_it_is_active_and_where_not",
    f"{STEERING}::test_setting_to_a_value_is_predicted_by_its_derivatives",
)
GATES = (f"{STEERING}::test_changes_are_those_of_gates_and_predictions_those_of_derivatives",)
BARS = (f"{STEERING}::test_bars_hold_the_change_of_new_examples",)
QUERY = ("tests/edges/test_query_key.py",)
REFINED = ("tests/audit/test_refinement.py",)
CURVES = ("tests/audit/test_circuits_of_parts.py",)
ALIKE = ("tests/edges/test_supernodes.py",)

MUTANTS = [
    # prompt graphs
    Mutant(
        "assay/edges/prompt/frozen.py",
        "        inner = gradient * self.gains[at]\n",
        "        inner = gradient * self.gains[at] / self.scale[at]\n",
        FAMILY,
    ),
    Mutant(
        "assay/edges/prompt/frozen.py",
        "        return inner - inner.mean(-1, keepdim=True) if self.centred else inner\n",
        "        return inner\n",
        FAMILY,
    ),
    Mutant(
        "assay/edges/prompt/frozen.py",
        "weights = self.pattern[:, first:stop, :stop].transpose(1, 2)",
        "weights = self.pattern[:, first:stop, :stop].roll(1, 1).transpose(1, 2)",
        FAMILY,
    ),
    Mutant(
        "assay/edges/prompt/rows.py",
        "        out[:, self._of_tokens(stop)] += torch.einsum(",
        "        out[:, self._of_tokens(stop)] -= torch.einsum(",
        (f"{PROMPT}::test_rows_do_not_depend_on_how_many_fit",),
    ),
    Mutant(
        "assay/edges/prompt/rows.py",
        "        stop, count = place + 1, len(index)",
        "        stop, count = max(place, 1), len(index)",
        FAMILY,
    ),
    Mutant(
        "assay/edges/prompt/rows.py",
        "                    old += block.pull(old)\n",
        "                    old = old + block.pull(old)\n",
        FAMILY,
    ),
    Mutant(
        "assay/edges/prompt/replacement.py",
        "        error -= share.rest\n",
        "        error += share.rest\n",
        FORMS,
    ),
    Mutant(
        "assay/edges/prompt/replacement.py",
        "    vectors = torch.cat([*(share.rows for _, share in shares), error])\n",
        "    vectors = torch.cat([*(share.rows for _, share in shares), 0 * error])\n",
        FORMS,
    ),
    Mutant(
        "assay/edges/prompt/replacement.py",
        "added = vectors if norm is None else norm.push(vectors, positions)",
        "added = vectors",
        FAMILY,
    ),
    Mutant(
        "assay/edges/prompt/replacement.py",
        "    codes[:first] = 0\n",
        "    codes[: first - 1] = 0\n",
        FORMS,
    ),
    Mutant(
        "assay/edges/prompt/influence.py",
        "size / size.sum(1, keepdim=True).clamp_min(1e-10)",
        "size / size.sum(0, keepdim=True).clamp_min(1e-10)",
        INFLUENCE,
    ),
    Mutant(
        "assay/edges/prompt/influence.py",
        "    size = edges.abs().double()\n",
        "    size = edges.clamp_min(0).double()\n",
        INFLUENCE,
    ),
    Mutant(
        "assay/edges/prompt/influence.py",
        "            found = found + carried @ edges[rows].double()\n",
        "            found = found - carried @ edges[rows].double()\n",
        INFLUENCE,
    ),
    Mutant(
        "assay/edges/prompt/influence.py",
        "    nodes = reached >= _bound(reached, node_threshold)\n",
        "    nodes = reached > _bound(reached, node_threshold)\n",
        INFLUENCE,
    ),
    Mutant(
        "assay/edges/prompt/influence.py",
        "    wanted = (sizes >= _bound(sizes.flatten(), edge_threshold)) & (sizes > 0)\n",
        "    wanted = sizes > _bound(sizes.flatten(), edge_threshold)\n",
        INFLUENCE,
    ),
    Mutant(
        "assay/edges/prompt/influence.py",
        "        alive[own] &= wanted[own].any(1)\n",
        "        alive[own] |= wanted[own].any(1)\n",
        INFLUENCE,
    ),
    Mutant(
        "assay/edges/prompt/exact.py",
        "        found.append(values[-1] - values[:-1])\n",
        "        found.append(values[:-1] - values[-1])\n",
        REMOVED,
    ),
    Mutant(
        "assay/edges/prompt/exact.py",
        "    begin = len(nodes.features) + len(nodes.written) * len(tokens)\n",
        "    begin = len(nodes.features) + (len(nodes.written) - 1) * len(tokens)\n",
        REMOVED,
    ),
    Mutant(
        "assay/edges/prompt/build.py",
        "    return weight[chosen].to(wide) - weight.mean(0, dtype=wide)\n",
        "    return weight[chosen].to(wide)\n",
        FAMILY,
    ),
    # audits of graphs
    Mutant(
        "assay/edges/direct.py",
        "        straight.append(found[0] - found[1:])\n",
        "        straight.append(found[1:] - found[0])\n",
        DIRECT,
    ),
    Mutant(
        "assay/edges/direct.py",
        "                value = value + carry(self.now[reads]) - carry(self.clean[reads])\n",
        "                value = value + carry(self.now[reads])\n",
        DIRECT,
    ),
    Mutant(
        "assay/edges/direct.py",
        "self.read[:, which] = seen.value[:, position].double() @ vectors.T",
        "self.read[:, which] = seen.value[:, position - 1].double() @ vectors.T",
        DIRECT,
    ),
    Mutant(
        "assay/audit/claims.py",
        "                effect += weight / activations[receiver] * found[receiver]\n",
        "                effect += weight * found[receiver]\n",
        CLAIMS,
    ),
    Mutant(
        "assay/audit/claims.py",
        "    right = np.sign(claimed) == np.sign(exact)\n",
        "    right = np.sign(claimed) != -np.sign(exact)\n",
        CLAIMS,
    ),
    Mutant(
        "assay/audit/claims.py",
        '    drawn = known & table["sampled"].to_numpy()\n',
        "    drawn = known\n",
        CLAIMS,
    ),
    Mutant(
        "assay/audit/claims.py",
        "        incoming[target] = _finite(target, incoming.get(target, 0.0) + abs(weight))\n",
        "        incoming[target] = _finite(target, incoming.get(target, 0.0) + weight)\n",
        CLAIMS,
    ),
    Mutant(
        "assay/audit/claims.py",
        "    bars = np.where(known, 0.0, np.inf)\n",
        "    bars = np.zeros(len(known))\n",
        CLAIMS,
    ),
    Mutant(
        "assay/audit/claims.py",
        "        scale = np.maximum(sizes, floor)\n",
        "        scale = np.full(len(sizes), floor)\n",
        CLAIMS,
    ),
    Mutant(
        "assay/audit/strata.py",
        "    number = max(1, min(_MOST, size // least_sample(alpha)))\n",
        "    number = 1\n",
        CLAIMS,
    ),
    Mutant(
        "assay/audit/strata.py",
        "            many.setdefault((source, found[place]), []).append(place)\n",
        "            many.setdefault((source, place), []).append(place)\n",
        CLAIMS,
    ),
    Mutant(
        "assay/studies/graph_audit/audit.py",
        '        "stratum": [of_others.get(name) for name in ranked],\n',
        '        "stratum": [0 for name in ranked],\n',
        SAMPLE,
    ),
    # intervals of circuit curves
    Mutant(
        "assay/audit/intervals.py",
        "    spread = n / (n - 1) / len(above) ** 2 * rest @ rest.T\n",
        "    spread = 1 / len(above) ** 2 * rest @ rest.T\n",
        CURVES,
    ),
    Mutant(
        "assay/audit/intervals.py",
        "    units = np.arange(len(above)) if unit is None else",
        "    units = np.arange(len(above)) if True else",
        CURVES,
    ),
    Mutant(
        "assay/audit/circuits.py",
        "        strict = [self._interval(each, len(kept)) for each in kept]\n",
        "        strict = [None for each in kept]\n",
        CURVES,
    ),
    Mutant(
        "assay/audit/circuits.py",
        "                (weights * signs * clear) @ missing,\n",
        "                (weights * signs) @ missing,\n",
        CURVES,
    ),
    Mutant(
        "assay/studies/graph_audit/nodes.py",
        "        rebuilt = layer.dictionary.decode(codes[number], values[layer.reads])\n",
        "        rebuilt = layer.dictionary.decode(0 * codes[number], values[layer.reads])\n",
        RIGHT,
    ),
    Mutant(
        "assay/studies/graph_audit/nodes.py",
        "        first = self.writes.index(site) * self.width\n",
        "        first = 0 * self.width\n",
        RIGHT,
    ),
    Mutant(
        "assay/studies/graph_audit/nodes.py",
        "        depth = None if node.type == LOGIT else node.depth\n",
        "        depth = len(seen)\n",
        BAD,
    ),
    Mutant(
        "assay/studies/graph_audit/audit.py",
        "        return logits[:, tokens] - logits.mean(-1, keepdim=True)\n",
        "        return logits[:, tokens]\n",
        RIGHT,
    ),
    Mutant(
        "assay/studies/graph_audit/stated.py",
        "        return abs(here - there) / max(abs(there), 1e-6)\n",
        "        return abs(abs(here) - abs(there)) / max(abs(there), 1e-6)\n",
        STATED,
    ),
    Mutant(
        "assay/studies/graph_audit/stated.py",
        "        return 0.0 if here != 0 else 1.0\n",
        "        return 1.0\n",
        STATED,
    ),
    Mutant(
        "assay/studies/graph_audit/stated.py",
        "    if others and len(others) < len(by_layer):\n",
        "    if others and len(others) > len(by_layer):\n",
        STATED,
    ),
    Mutant(
        "assay/studies/graph_audit/tokens.py",
        "    fits = fits and text.startswith(first) and text.endswith(last)\n",
        "    fits = fits and text.startswith(first)\n",
        ("tests/studies/test_graph_tokens.py",),
    ),
    Mutant(
        "assay/studies/graph_audit/page.py",
        "    lines = edges.head(top).filter(alive)\n",
        "    lines = edges.filter(alive)\n",
        PICTURE,
    ),
    Mutant(
        "assay/io/attribution_graphs.py",
        "not 0 <= value <= 1 + _ROUNDING",
        "not value <= 1 + _ROUNDING",
        FILES,
    ),
    # steering
    Mutant(
        "assay/audit/setting.py",
        "            gates = {name: 1 + step * (gate - 1) for name, gate in gates.items()}\n",
        "            gates = {name: step * gate for name, gate in gates.items()}\n",
        GATES,
    ),
    Mutant(
        "assay/audit/setting.py",
        "torch.zeros_like(now), goal.values.to(now) - now)",
        "torch.zeros_like(now), goal.values.to(now))",
        SET,
    ),
    Mutant(
        "assay/audit/setting.py",
        "                    shift = shift if step is None else step * shift\n",
        "                    shift = shift if step is None else step.detach() * shift\n",
        SET,
    ),
    Mutant(
        "assay/audit/setting.py",
        "        free = goal.values.isnan()\n",
        "        free = goal.values.isnan() | (now == 0)\n",
        SET,
    ),
    Mutant(
        "assay/audit/steering.py",
        "    second = curvature / 2\n",
        "    second = curvature\n",
        GATES,
    ),
    Mutant(
        "assay/audit/steering.py",
        "        for own, other in (halves, halves[::-1]):\n",
        "        for own, other in (halves, halves):\n",
        BARS,
    ),
    Mutant(
        "assay/audit/steering.py",
        "    unit = distinct(mechanisms.batch)\n",
        "    unit = np.arange(len(before))\n",
        (f"{STEERING}::test_copies_of_an_example_calibrate_no_bar",),
    ),
    Mutant(
        "assay/mechanisms/features/bound.py",
        "        value = (seen.read(spot.reads) if spot.apart else seen).value\n",
        "        value = seen.value\n",
        (f"{STEERING}::test_a_transcoder_is_set_by_what_it_reads",),
    ),
    Mutant(
        "assay/mechanisms/crosscoder/gates.py",
        "        return self.codes[..., which], self.atoms[self.found.sites.index(site)][which]\n",
        "        return self.codes[..., which], self.atoms[0][which]\n",
        (f"{STEERING}::test_a_crosscoder_feature_is_set_to_what_a_gate_would_make_of_it",),
    ),
    # query and key attributions
    Mutant(
        "assay/edges/query_key.py",
        '    with modified_backward(model, "frozen"), torch.enable_grad():\n',
        "    with torch.enable_grad():\n",
        QUERY,
    ),
    Mutant(
        "assay/edges/query_key.py",
        "        sides.append(torch.cat([known, (whole - known.sum(1))[:, None]], 1))\n",
        "        sides.append(torch.cat([known, whole[:, None]], 1))\n",
        QUERY,
    ),
    Mutant(
        "assay/edges/query_key.py",
        "heads[1][:, head // shared, key]",
        "heads[1][:, head // shared, key - 1]",
        QUERY,
    ),
    Mutant(
        "assay/edges/query_key.py",
        "    values = float(attention.scaling) * torch",
        "    values = torch",
        QUERY,
    ),
    # refined circuits and supernodes
    Mutant(
        "assay/audit/refinement.py",
        "(rest - lost)[:, None] + gains",
        "(rest + lost)[:, None] + gains",
        (
            "tests/audit/test_refinement.py::test_the_best_exchange_of_a_linear_network_is_predicted",
        ),
    ),
    Mutant(
        "assay/audit/refinement.py",
        "found.square < now.square and",
        "found.square < 1e9 and",
        REFINED,
    ),
    Mutant(
        "assay/audit/refinement.py",
        " and found.bias <= now.bias:\n",
        ":\n",
        REFINED,
    ),
    Mutant(
        "assay/edges/supernodes.py",
        "        return (self.coactivation >= coactivation) & (self.effect >= effect)\n",
        "        return self.effect >= effect\n",
        ALIKE,
    ),
    Mutant(
        "assay/edges/supernodes.py",
        "        if ours is not theirs and bool(alike[ours][:, theirs].all()):\n",
        "        if ours is not theirs and bool(alike[ours][:, theirs].any()):\n",
        ALIKE,
    ),
]
