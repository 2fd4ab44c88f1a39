"""Mutants of training, files, targets, and of single nodes and edges."""

from __future__ import annotations

from run_mutants import Mutant

LOOP = ("tests/learn/test_loop.py",)
RUNS = ("tests/io/test_runs.py",)
FILES = ("tests/io/test_files.py",)
METRICS = ("tests/targets/test_metrics.py",)
NAMES = ("tests/targets/test_names.py",)
SUFFIX = ("tests/mechanisms/nodes/test_suffix_patching.py",)
NODES = ("tests/mechanisms/nodes/test_node_kind.py",)
EDGES = ("tests/edges/test_edges.py",)
POWER = ("tests/mechanisms/directions/test_power_iteration.py",)
CHANNEL_BOUNDS = ("tests/mechanisms/channels/test_channel_bounds.py",)

MUTANTS = [
    # learn
    Mutant(
        "assay/learn/loop.py",
        '                group["lr"] = rate * schedule(step / steps)',
        '                group["lr"] *= schedule(step / steps)',
        LOOP,
    ),
    Mutant(
        "assay/learn/loop.py",
        '        generator.set_state(state["generator"].cpu())\n',
        "        generator.manual_seed(0)\n",
        LOOP,
    ),
    Mutant(
        "assay/learn/loop.py",
        '        optimizer.load_state_dict(state["optimizer"])\n',
        "        optimizer.state_dict()\n",
        LOOP,
    ),
    Mutant(
        "assay/learn/loop.py",
        "            run.forget_after(name, first - 1)",
        "            run.forget_after(name, first)",
        LOOP,
    ),
    Mutant("assay/learn/toys.py", "int(losses.argmin())", "int(losses.argmax())", LOOP),
    # io: integrity
    Mutant(
        "assay/io/commits.py",
        "                return files.sha256(path) == self.sha256",
        "                return True",
        RUNS,
    ),
    Mutant(
        "assay/io/commits.py",
        "return digest(stream.read(self.size)) == self.sha256",
        "return True",
        RUNS,
    ),
    Mutant(
        "assay/io/commits.py",
        "        if check != self._check:",
        '        if check == "":',
        RUNS,
    ),
    Mutant(
        "assay/io/commits.py",
        'if path.is_absolute() or ".." in path.parts or',
        "if path.is_absolute() or",
        RUNS,
    ),
    Mutant(
        "assay/io/locks.py",
        "fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        RUNS,
    ),
    Mutant(
        "assay/io/record.py",
        "            data = path.read_bytes()[: entry.size]",
        "            data = path.read_bytes()",
        RUNS,
    ),
    Mutant(
        "assay/io/files.py",
        'return path.read_text(encoding="utf-8-sig")',
        'return path.read_text(encoding="utf-8")',
        FILES,
    ),
    Mutant(
        "assay/io/arrays.py",
        "math.prod(shape) * dtype.itemsize != len(body)",
        "math.prod(shape) * dtype.itemsize > len(body)",
        FILES,
    ),
    # targets
    Mutant(
        "assay/targets/metrics.py",
        'wrong = years <= labels["years"][:, None]',
        'wrong = years < labels["years"][:, None]',
        METRICS,
    ),
    Mutant(
        "assay/targets/metrics.py",
        "return (clean.exp() * (clean - logits.log_softmax(-1))).sum(-1)",
        "return (logits.softmax(-1) * (logits.log_softmax(-1) - clean)).sum(-1)",
        METRICS,
    ),
    Mutant(
        "assay/targets/metrics.py",
        "        weights = mask[:, 1:].to(each.dtype)",
        "        weights = mask[:, :-1].to(each.dtype)",
        METRICS,
    ),
    Mutant(
        "assay/targets/metrics.py",
        "return logits.to(torch.promote_types(logits.dtype, torch.float32))",
        "return logits",
        METRICS,
    ),
    Mutant(
        "assay/targets/families.py",
        '        before_mlp="pre_feedforward_layernorm",\n',
        '        before_mlp="post_attention_layernorm",\n',
        SUFFIX,
    ),
    Mutant(
        "assay/targets/families.py",
        'bool(getattr(config, "use_parallel_residual", False))',
        "True",
        EDGES,
    ),
    # nodes
    Mutant(
        "assay/mechanisms/nodes/suffix.py",
        "dtype=torch.bool).triu(1)",
        "dtype=torch.bool).triu(2)",
        SUFFIX,
    ),
    Mutant(
        "assay/mechanisms/nodes/suffix.py",
        "query.columns().to(columns.device)).all()",
        "query.columns().to(columns.device)).any()",
        SUFFIX,
    ),
    Mutant(
        "assay/mechanisms/nodes/suffix.py",
        "                    layer.call.mask_at(who, position),",
        "                    layer.call.mask_at(who, self.last[who]),",
        SUFFIX,
    ),
    Mutant(
        "assay/mechanisms/nodes/bind.py",
        "active = distance > 8 * torch.finfo(value.dtype).eps * size",
        "active = distance > 0 * size",
        NODES,
    ),
    Mutant(
        "assay/mechanisms/nodes/bind.py",
        'sorted({ref.site for ref in refs.values()}, key=lambda site: "+" in site)',
        'sorted({ref.site for ref in refs.values()}, key=lambda site: "+" not in site)',
        NODES,
    ),
    Mutant(
        "assay/mechanisms/nodes/bind.py",
        "            weights = mask.double().reshape(",
        "            weights = torch.ones_like(mask).double().reshape(",
        NODES,
    ),
    # edges
    Mutant(
        "assay/edges/scores.py",
        "            pulled -= pulled.mean(-1, keepdim=True)",
        "            pulled -= 0 * pulled.mean(-1, keepdim=True)",
        EDGES,
    ),
    Mutant(
        "assay/edges/scores.py",
        "constant = weight @ normed.offset + (0 if bias is None else bias)",
        "constant = 0 if bias is None else bias",
        EDGES,
    ),
    Mutant(
        "assay/edges/patching.py",
        "keep[torch.arange(1, len(chunk) + 1), chunk[:, 0], chunk[:, 1]] = False",
        "keep[torch.arange(1, len(chunk) + 1), chunk[:, 0]] = False",
        EDGES,
    ),
    Mutant(
        "assay/edges/graph.py",
        "return self.seen_by_heads(layer) + (0 if self.parallel else self.heads)",
        "return self.seen_by_heads(layer) + self.heads",
        EDGES,
    ),
    # what is kept is kept as it was
    Mutant(
        "assay/core/sites.py",
        "        found, _ = _read(model, inputs, wanted, copied=changed)",
        "        found, _ = _read(model, inputs, wanted, copied=frozenset())",
        ("tests/core/test_sites.py",),
    ),
    Mutant(
        "assay/mechanisms/channels/bind.py",
        "            Target(copy.deepcopy(network).double(), metric,",
        "            Target(network.double(), metric,",
        ("tests/mechanisms/channels/test_channel_binding.py",),
    ),
    # named by earlier surveys of the tests
    Mutant(
        "assay/mechanisms/directions/power.py",
        "            if climb[-1] > history[-1]:",
        "            if climb[-1] < history[-1]:",
        POWER,
    ),
    Mutant(
        "assay/mechanisms/channels/norms.py",
        "width * layer.epsilon).sqrt()",
        "4 * width * layer.epsilon).sqrt()",
        CHANNEL_BOUNDS,
    ),
]
