"""Effects of removing what nodes write, against loops over runs of the network with plain hooks."""

from __future__ import annotations

import node_models
import pytest
import torch
from cases import random_dictionary

from assay.core.target import Batch, Target
from assay.edges.direct import Piece, Reading, remove_pieces
from assay.targets.metrics import logit_difference
from assay.targets.names import resolve


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_neox parallel"])
@pytest.mark.parametrize("skip", [False, True])
def test_effects_are_those_of_a_loop_with_plain_hooks(family, skip):
    model = node_models.build(family)
    ids = torch.randint(1, 31, (1, 6), generator=torch.Generator().manual_seed(0))
    reads = [resolve(model, f"blocks.{layer}.mlp.hook_in").site for layer in range(3)]
    writes = [resolve(model, f"blocks.{layer}.hook_mlp_out").site for layer in range(3)]
    embed = resolve(model, "hook_embed").site
    dictionary = random_dictionary(16, 5, d_out=16, skip=True).double()
    generator = torch.Generator().manual_seed(1)

    def draw() -> torch.Tensor:
        return torch.randn(16, generator=generator, dtype=torch.float64)

    pieces = [
        Piece(1, {writes[0]: draw()}),
        Piece(2, {writes[0]: draw(), writes[1]: draw()}),
        Piece(3, {embed: draw()}),
        Piece(5, {writes[2]: draw()}),
    ]
    readings = [Reading(reads[1], 4, draw()), Reading(reads[2], 5, draw())]
    readings += [Reading(reads[0], 3, draw())]
    carried = {writes[1]: ((reads[1], dictionary.rest),)} if skip else {}
    held = {site: carried.get(site, ()) for site in writes}

    def outputs(found):
        return found.logits[:, -1, :3]

    found = remove_pieces(
        Target(model, logit_difference), Batch({"input_ids": ids}), pieces, readings, held, outputs,
        budget=1,
    )  # fmt: skip

    def module(site):
        return model.get_submodule(site.partition(":")[0])

    def passed(removal, clean):
        """Run with the removal, all outputs of MLPs held at `clean` where it is given."""
        seen = {}

        def before(site):
            return lambda module, args: seen.__setitem__(site, args[0])

        def after(site):
            def act(module, args, out):
                value = out if clean is None or site == embed else clean[site]
                if clean is not None and site in carried:
                    shift = seen[reads[1]] - clean[reads[1]]
                    value = value + shift @ dictionary.W_skip
                seen[site] = value
                if site in removal.vectors:
                    value = value.clone()
                    value[0, removal.position] -= removal.vectors[site]
                return value

            return act

        hooks = [module(site).register_forward_pre_hook(before(site)) for site in reads]
        hooks += [module(site).register_forward_hook(after(site)) for site in [embed, *writes]]
        with torch.no_grad():
            logits = outputs(model(input_ids=ids))[0]
        for hook in hooks:
            hook.remove()
        return logits, seen

    nothing = Piece(0, {})
    logits, clean = passed(nothing, None)
    for row, piece in enumerate(pieces):
        total = logits - passed(piece, None)[0]
        torch.testing.assert_close(found.total[row], total, rtol=1e-8, atol=1e-11)
        straight, seen = passed(piece, clean)
        torch.testing.assert_close(found.straight[row], logits - straight, rtol=1e-8, atol=1e-11)
        for column, reading in enumerate(readings):
            change = clean[reading.site] - seen[reading.site]
            expected = change[0, reading.position] @ reading.vector
            torch.testing.assert_close(found.direct[row, column], expected, rtol=1e-8, atol=1e-11)
    assert (found.total - found.straight)[:3].abs().min() > 1e-6
    assert found.direct[0, 1] != 0
    assert found.direct[0, 2] == 0
