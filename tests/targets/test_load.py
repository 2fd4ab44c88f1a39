"""Loading a language model as a target, and pairs as its batches."""

from __future__ import annotations

import pytest
import torch

import assay
from assay.errors import InputError
from assay.io.pair_files import write_pairs
from assay.targets.agreement import agreement_pairs, build_model, build_tokenizer
from assay.targets.language import save_language_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = build_tokenizer()
    model = build_model(
        len(tokenizer), layers=2, width=16, heads=2, context=16, seed=0, stop=tokenizer.eos_token_id
    )
    path = save_language_model(tmp_path_factory.mktemp("model") / "tiny", model, tokenizer)
    write_pairs(path / "pairs.jsonl", agreement_pairs("simple", 12, seed=0))
    return path


@pytest.mark.parametrize("metric", ["logit_difference", "probability", "answer_loss", "kl"])
def test_a_model_and_pairs_go_through_the_core(folder, metric):
    target = assay.load(folder, metric)
    clean, patch = assay.pairs(target, folder / "pairs.jsonl")
    sites = ["blocks.0.attn.hook_z", "blocks.1.hook_mlp_out"]
    mechanisms = assay.nodes(target, clean, patch, sites)
    with torch.no_grad():
        assert torch.equal(mechanisms.values(mechanisms.ones()), target.values(clean))
    scores = assay.attribute(mechanisms, assay.Exact())
    assert set(scores.values) == set(sites)


def test_pairs_as_text_equal_pairs_in_a_file(folder):
    target = assay.load(folder)
    listed = [
        (p.clean_prefix, p.patch_prefix, p.clean_answer, p.patch_answer)
        for p in agreement_pairs("simple", 12, seed=0)
    ]
    first, second = assay.pairs(target, listed)[0], assay.pairs(target, folder / "pairs.jsonl")[0]
    assert torch.equal(first.inputs["input_ids"], second.inputs["input_ids"])


def test_bad_input(folder, tmp_path):
    with pytest.raises(InputError, match="did you mean logit_difference"):
        assay.load(folder, "logit_diff")
    with pytest.raises(InputError):
        assay.load(tmp_path)
    bare = assay.target(torch.nn.Linear(2, 2), lambda output, batch: output[:, 0])
    long = " ".join(["The teacher"] + ["near the desk"] * 8)
    with pytest.raises(InputError, match="do not fit the model's context of 16"):
        assay.pairs(
            assay.load(folder), [(long, long.replace("teacher", "teachers"), " is", " are")]
        )
    with pytest.raises(InputError, match="no tokenizer"):
        assay.pairs(bare, folder / "pairs.jsonl")
