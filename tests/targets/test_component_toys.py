"""The networks that components are tested on: superposition with its known answer, residual
MLPs."""

from __future__ import annotations

import pytest
import torch

from assay.errors import InputError
from assay.io.files import save_tensors
from assay.learn import toys
from assay.targets.residual import ResidualMLP
from assay.targets.tms import TMS, load_tms, pentagon, untie
from assay.targets.toys import Autoencoder


def test_the_untied_network_is_the_tied_one_with_or_without_identities():
    tied = Autoencoder(7, 3, torch.Generator().manual_seed(0))
    tied.b.data.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.rand(5, 7, generator=torch.Generator().manual_seed(2))
    for identities in (0, 2):
        model = untie(tied, identities)
        torch.testing.assert_close(model(x), tied(x))
        assert torch.equal(model.encoder, tied.W)
        names = [name for name, _ in model.named_parameters()]
        assert len(names) == 3 + identities


def test_weights_come_from_safetensors(tmp_path):
    w, b = torch.randn(2, 5), torch.randn(5)
    save_tensors(tmp_path / "w.safetensors", {"W": w, "b": b})
    model = load_tms(tmp_path / "w.safetensors", 1)
    x = torch.rand(3, 5)
    torch.testing.assert_close(model(x), torch.relu(x @ w.T @ w + b))
    save_tensors(tmp_path / "v.safetensors", {"W": w.T, "b": b})
    with pytest.raises(InputError, match=r"W must be \(hidden, features\)"):
        load_tms(tmp_path / "v.safetensors")


def one_feature_error(model: Autoencoder, count: int = 4000) -> float:
    x = ((torch.arange(count, dtype=torch.float64) + 0.5) / count).unsqueeze(1)
    rows = torch.cat([x * torch.eye(5, dtype=torch.float64)[j] for j in range(5)])
    return float((model(rows) - rows).square().sum(1).mean().detach())


def test_the_pentagon_is_a_minimum_of_the_error_of_one_feature():
    model = pentagon().double()
    angles = torch.atan2(model.W[1], model.W[0]).detach().sort().values
    gaps = angles.diff()
    torch.testing.assert_close(gaps, torch.full_like(gaps, 2 * torch.pi / 5), rtol=1e-5, atol=1e-5)
    best = one_feature_error(model)
    for scale, shift in ((1.01, 0), (0.99, 0), (1, 0.01), (1, -0.01), (1.01, 0.01)):
        moved = pentagon().double()
        with torch.no_grad():
            moved.W.mul_(scale)
            moved.b.add_(shift)
        assert one_feature_error(moved) > best, (scale, shift)
    with pytest.raises(InputError, match="at least 3 features"):
        pentagon(2)


def test_training_finds_the_pentagon():
    toy = toys.tms(5, 2, steps=600, copies=4)
    model, known = toy.model, pentagon()
    angles = torch.atan2(model.W[1], model.W[0]).detach().sort().values
    gaps = angles.diff()
    torch.testing.assert_close(gaps, torch.full_like(gaps, 2 * torch.pi / 5), rtol=0, atol=0.05)
    assert float(model.W.norm(dim=0).mean().detach()) == pytest.approx(
        float(known.W.norm(dim=0).mean().detach()), rel=0.05
    )


def test_a_residual_mlp_is_its_formula():
    model = ResidualMLP(6, 5, 4, 2, torch.Generator().manual_seed(0))
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    h = x @ model.embed
    for layer in model.layers:
        h = h + torch.relu(h @ layer.mlp_in.weight.T) @ layer.mlp_out.weight.T
    torch.testing.assert_close(model(x), h @ model.embed.T)
    torch.testing.assert_close(model.embed.norm(dim=1), torch.ones(6))
    wide = ResidualMLP(6, 9, 4, orthonormal=True).embed
    torch.testing.assert_close(wide @ wide.T, torch.eye(6), rtol=1e-5, atol=1e-5)
    assert "embed" not in dict(model.named_parameters())


def test_a_residual_mlp_learns_more_functions_than_it_has_neurons():
    toy = toys.residual_mlp(12, 16, 6, steps=600, probability=0.03, orthonormal=True, samples=200)
    x = 0.75 * torch.eye(12)
    answers = (toy.model(x) - x).diag().detach()
    assert int((answers > 0.15).sum()) > 8
    assert float((toy.model(-x) + x).diag().detach().abs().max()) < 0.1
    assert toy.loss < 0.7
    assert toy.name == "residual MLP 12-16-6 x 1"


@pytest.mark.parametrize("sizes", [(0, 2), (3, 0), (3, 2, -1)])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(InputError, match="at least"):
        TMS(*sizes)
    with pytest.raises(InputError, match="at least 1"):
        ResidualMLP(3, 3, 0)
    with pytest.raises(InputError, match="width of at least 3"):
        ResidualMLP(3, 2, 4, orthonormal=True)
