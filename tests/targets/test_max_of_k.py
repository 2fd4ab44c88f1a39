"""Max-of-K networks: forward, training, files and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from assay.errors import InputError
from assay.io import files
from assay.learn.max_of_k import train_max_of_k
from assay.targets import max_of_k
from assay.targets.max_of_k import NAMES, MaxOfK


def small() -> MaxOfK:
    return MaxOfK(7, 3, 5, 4, generator=torch.Generator().manual_seed(0))


def test_forward_is_the_written_formula() -> None:
    model = small()
    w = max_of_k.weights_of(model)
    tokens = torch.tensor([[1, 6, 2], [0, 0, 5]])
    x = w.E[tokens] + w.P
    scores = np.einsum("bd,bpd->bp", x[:, -1] @ w.Q, x @ w.K) / np.sqrt(4)
    attention = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    expected = (x[:, -1] + np.einsum("bp,bpd->bd", attention, x @ w.V) @ w.O) @ w.U
    np.testing.assert_allclose(model(tokens).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_training_learns_and_repeats_to_the_bit() -> None:
    first, second = (
        train_max_of_k(6, 2, 8, seed=3, steps=150, rate=1e-2, batch=64) for _ in range(2)
    )
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    tokens = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    with torch.no_grad():
        assert (first(tokens).argmax(-1) == tokens.amax(-1)).float().mean() > 0.9


def test_files_round_trip_with_and_without_a_head_axis(tmp_path: Path) -> None:
    model = small()
    w = max_of_k.weights_of(model)
    again = max_of_k.load(max_of_k.save(tmp_path / "a.safetensors", model))
    np.testing.assert_array_equal(again.Q, w.Q)
    heads = {
        name: tensor[None] if "attn.W" in name else tensor
        for name, tensor in model.state_dict().items()
    }
    heads["blocks.0.attn.b_V"] = torch.ones(1, 4)
    heads["blocks.0.attn.mask"] = torch.ones(3, 3)
    with_heads = max_of_k.from_tensors(heads)
    np.testing.assert_array_equal(with_heads.O, w.O)
    assert with_heads.v_bias.tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("unembed.W_U"), "missing tensor unembed.W_U"),
        (lambda t: t.update({"pos_embed.W_pos": torch.zeros(3, 6)}), "must have shape"),
        (lambda t: t.update({"embed.W_E": torch.zeros(7)}), "must be a matrix"),
        (lambda t: t.update({"embed.W_E": torch.zeros(7, 5, dtype=torch.int64)}), "floating point"),
        (lambda t: t["embed.W_E"].fill_(float("nan")), "NaN"),
        (lambda t: t.update({"ln_final.w": torch.ones(5)}), "normalisation"),
        (lambda t: t.update({"blocks.0.mlp.W_in": torch.ones(5, 5)}), "unknown tensor"),
        (lambda t: t.update({"blocks.0.attn.W_Q": torch.zeros(2, 5, 4)}), "2 heads"),
        (
            lambda t: t.update({"unembed.W_U": torch.full((5, 7), 1e-60, dtype=torch.float64)}),
            "does not fit float32",
        ),
    ],
)
def test_bad_files_are_refused(change, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    tensors = {name: tensor.clone() for name, tensor in small().state_dict().items()}
    change(tensors)
    path = files.save_tensors(tmp_path / "w.safetensors", tensors)
    with pytest.raises(InputError, match=message):
        max_of_k.load(path)


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(InputError, match="positions"):
        MaxOfK(4, 0, generator=torch.Generator())
    with pytest.raises(InputError, match="batch"):
        train_max_of_k(batch=0)
    assert len(NAMES) == 12
