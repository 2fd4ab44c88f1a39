"""Networks of TransformerLens and SAE objects of SAELens are taken as they are: effects are those
of the peers' own hooks, in an environment that the test makes.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
from peers import environment, kept_environments, run_script

import assay

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SCRIPT = """
import sys
sys.path.append(%r)  # what Assay needs and the peer has not
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge
from sae_lens.registry import get_sae_class
import assay
from assay.core.target import Batch

torch.manual_seed(0)
shape = dict(n_layers=2, d_model=16, n_ctx=16, d_head=4, n_heads=4, d_mlp=32, d_vocab=23,
             act_fn="gelu", normalization_type="LN", seed=1)
ids = torch.randint(0, 23, (3, 6))
other = torch.randint(0, 23, (3, 6))
mask = torch.ones_like(ids)
mask[1, 4:] = 0
ids, other = ids * mask, other * mask
last = mask.sum(1) - 1
labels = {"last": last, "answers": torch.tensor([[1, 2], [3, 4], [5, 6]])}
clean, patch = (Batch({"input_ids": x, "attention_mask": mask}, labels) for x in (ids, other))
rows = torch.arange(3)

def metric(logits):
    at = logits[rows, last]
    return at[rows, labels["answers"][:, 1]] - at[rows, labels["answers"][:, 0]]

kind, config = get_sae_class("jumprelu")
made = config(d_in=16, d_sae=24)
made.metadata.hook_name = "blocks.0.hook_mlp_out"
sae = kind(made)
with torch.no_grad():
    for parameter in sae.parameters():
        parameter.copy_(0.5 * torch.randn(parameter.shape))
    sae.threshold.copy_(sae.threshold.abs())

lens = HookedTransformer(HookedTransformerConfig(**shape))
for parameter in lens.parameters():
    parameter.data += 0.3 * torch.randn(parameter.shape)
bridge = TransformerBridge.boot_native(shape)
for model in (lens, bridge):
    target = assay.load(model)
    with torch.no_grad():
        plain = metric(model(ids, return_type="logits"))
        _, cache = model.run_with_cache(other)
    torch.testing.assert_close(target.values(clean), plain)
    m = assay.nodes(target, clean, patch, ["blocks.1.hook_resid_pre", "blocks.0.attn.hook_z"])
    effects = assay.attribute(m, assay.Exact())
    for name in ("blocks.1.hook_resid_pre", "blocks.0.attn.hook_z"):
        def put(value, hook):
            value = value.clone()
            value[:, 2] = cache[name][:, 2]
            return value
        with torch.no_grad():
            patched = metric(model.run_with_hooks(ids, fwd_hooks=[(name, put)]))
        found = m.group(name).shape
        gates = m.ones([name])[name]
        gates[:, 2] = 0
        with torch.no_grad():
            torch.testing.assert_close(m.values({name: gates}), patched, rtol=1e-4, atol=1e-5)
    single = effects.values["blocks.1.hook_resid_pre"][:, 2]
    with torch.no_grad():
        def put(value, hook):
            value = value.clone()
            value[:, 2] = cache["blocks.1.hook_resid_pre"][:, 2]
            return value
        whole = metric(model.run_with_hooks(ids, fwd_hooks=[("blocks.1.hook_resid_pre", put)]))
    torch.testing.assert_close(single.float(), plain - whole, rtol=1e-3, atol=1e-5)
    f = assay.features(target, sae, clean, reference="zero")
    assert list(f.spots) == ["blocks.0.hook_mlp_out"]
    with torch.no_grad():
        _, own = model.run_with_cache(ids)
        feature = int(sae.encode(own["blocks.0.hook_mlp_out"])[0, 3].argmax())
    def lose(value, hook):
        codes = sae.encode(value)
        out = value.clone()
        out[:, 3] -= codes[:, 3, feature, None] * sae.W_dec[feature]
        return out
    with torch.no_grad():
        lost = metric(model.run_with_hooks(ids, fwd_hooks=[("blocks.0.hook_mlp_out", lose)]))
    effect = assay.ablate(f, "blocks.0.hook_mlp_out", torch.tensor([[3, feature]]))[0]
    expected = torch.where(last >= 3, plain - lost, torch.zeros(3))
    torch.testing.assert_close(effect.float(), expected, rtol=1e-3, atol=1e-5)
    assert effect.abs().max() > 1e-4, effect
    scores = assay.attribute(f)
    assert scores.audit(exact=24).table.height
print("done")
"""


def test_networks_and_dictionaries_of_the_peers_are_taken_as_they_are(
    tmp_path: Path, tmp_path_factory
):
    python = environment("sae_lens", kept_environments(tmp_path_factory))
    source = Path(assay.__file__).parents[1]
    script = SCRIPT % sysconfig.get_paths()["purelib"]
    run_script(python, script, tmp_path, source)
