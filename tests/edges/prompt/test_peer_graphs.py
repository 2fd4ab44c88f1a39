"""Graphs of prompts are those of the real circuit-tracer on the same weights, edge by edge, and
pruning keeps the same; in an environment that the test makes, skipped with the reason where it
cannot be made. ASSAY_PEERS names a folder that keeps it from run to run.
"""

from __future__ import annotations

from pathlib import Path

import prompt_models
import pytest
import torch
from peers import environment, kept_environments, lens_weights, run_script
from safetensors.torch import load_file, save_file

from assay.dictionaries.save import save_circuit_tracer
from assay.edges.prompt import prompt_graph

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
FORMS = {
    "transcoders": {"kind": "jumprelu"},
    "skip connections": {"skip": True},
    "behind attention": {"hook": "hook_resid_mid", "size": 20},
    "cross-layer": {"crossing": True, "hook": "hook_resid_mid"},
    "before the gain": {"hook": "ln2.hook_normalized"},
}

SCRIPT = """
import sys
from pathlib import Path
import torch
import yaml
torch.set_default_dtype(torch.float64)
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformerConfig
from circuit_tracer import ReplacementModel, attribute
from circuit_tracer.graph import compute_graph_scores, prune_graph
from circuit_tracer.replacement_model.replacement_model_transformerlens import (
    TransformerLensReplacementModel,
)
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
from circuit_tracer.utils.hf_utils import load_transcoders

folder = Path(sys.argv[1])
state = load_file(folder / "model.safetensors")
ids = load_file(folder / "ids.safetensors")["ids"]

class Tokenizer:
    all_special_ids, bos_token_id, eos_token_id, pad_token_id = [int(ids[0])], 0, 0, 0
    vocab_size, padding_side, name_or_path = 31, "right", "none"
    def decode(self, tokens, **_):
        return str(tokens)

config = HookedTransformerConfig(
    n_layers=3, d_model=16, n_ctx=32, d_head=4, n_heads=4, d_mlp=64, d_vocab=31,
    act_fn="gelu_new", normalization_type="LN", eps=1e-5, dtype=torch.float64, device="cpu",
)
results = {}
for path in sorted((folder / "sets").iterdir()):
    about = yaml.safe_load((path / "config.yaml").read_text())
    hooks = about["feature_input_hook"], about["feature_output_hook"]
    if about["model_kind"] == "cross_layer_transcoder":
        made = load_clt(str(path), *hooks, dtype=torch.float64, lazy_decoder=False)
    else:
        about["transcoders"] = [str(path / f"layer_{i}.safetensors") for i in range(3)]
        made = load_transcoders(about, None, torch.float64, False, False)
    model = TransformerLensReplacementModel.from_config(config, made)
    model.tokenizer = Tokenizer()
    bare = {}
    for key in model.state_dict():
        bare[key.replace(".old_mlp", "").replace(".old_unembed", "")] = key
    assert set(state) <= set(bare), set(state) - set(bare)
    model.load_state_dict({bare[name]: tensor for name, tensor in state.items()}, strict=False)
    for most in (None, 12):
        graph = attribute(ids, model, batch_size=16, max_feature_nodes=most)
        name = f"{path.name}/{most}/"
        results[name + "edges"] = graph.adjacency_matrix.contiguous()
        chosen = graph.selected_features
        results[name + "features"] = graph.active_features[chosen].contiguous()
        results[name + "activations"] = graph.activation_values[chosen].contiguous()
        results[name + "logits"] = graph.logit_token_ids.contiguous()
        results[name + "odds"] = graph.logit_probabilities.contiguous()
        results[name + "scores"] = torch.tensor(compute_graph_scores(graph))
        for share in (0.5, 0.8):
            kept = prune_graph(graph, share, 0.9)
            results[name + f"nodes {share}"] = kept.node_mask.contiguous()
            results[name + f"links {share}"] = kept.edge_mask.contiguous()
            results[name + f"cumulative {share}"] = kept.cumulative_scores.contiguous()
save_file(results, folder / "results.safetensors")
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    return environment("circuit-tracer", kept_environments(tmp_path_factory))


def test_graphs_are_those_of_circuit_tracer(tmp_path: Path, python: Path):
    target = prompt_models.target()
    save_file(lens_weights(target.model), tmp_path / "model.safetensors")
    save_file({"ids": torch.tensor(prompt_models.TOKENS)}, tmp_path / "ids.safetensors")
    sets = {name: prompt_models.transcoders(**form) for name, form in FORMS.items()}
    for name, dictionaries in sets.items():
        save_circuit_tracer(tmp_path / "sets" / name, dictionaries, model_name="gpt2", scan="x/y")
    run_script(python, SCRIPT, tmp_path)
    results = load_file(tmp_path / "results.safetensors")
    for name, dictionaries in sets.items():
        for most in (None, 12):
            theirs = {
                key.rpartition("/")[2]: value
                for key, value in results.items()
                if key.startswith(f"{name}/{most}/")
            }
            graph = prompt_graph(target, dictionaries, prompt_models.TOKENS, most=most)
            assert graph.features.tolist() == theirs["features"].tolist()
            assert graph.logits.tolist() == theirs["logits"].tolist()
            torch.testing.assert_close(graph.activations, theirs["activations"])
            torch.testing.assert_close(graph.probabilities, theirs["odds"])
            count, sources = graph.layout.features, graph.layout.sources
            rows = torch.cat([torch.arange(count), torch.arange(len(graph.logits)) + sources])
            expected = theirs["edges"][rows, :sources]
            assert expected.count_nonzero() == theirs["edges"].count_nonzero()
            assert expected.count_nonzero() > 0.2 * expected.numel()
            torch.testing.assert_close(graph.edges, expected, rtol=1e-4, atol=1e-14)
            found = torch.tensor(list(graph.scores().values()))
            torch.testing.assert_close(found, theirs["scores"].float(), rtol=1e-4, atol=1e-7)
            for share in (0.5, 0.8):
                kept = graph.prune(share, 0.9).kept
                assert torch.equal(kept.nodes, theirs[f"nodes {share}"])
                links = torch.zeros_like(theirs[f"links {share}"])
                links[rows[kept.rows], kept.sources] = True
                assert torch.equal(links, theirs[f"links {share}"])
                assert links.any()
                cumulative = theirs[f"cumulative {share}"]
                torch.testing.assert_close(kept.cumulative[:sources], cumulative[:sources])
