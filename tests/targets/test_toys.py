from pathlib import Path

import pytest
import torch

from assay.errors import InputError
from assay.io.files import save_tensors
from assay.io.runs import Run
from assay.learn import toys
from assay.targets.toys import draw_sparse


def test_sparse_inputs_are_never_empty_and_active_in_groups() -> None:
    x = draw_sparse(500, 6, 0.1, torch.Generator().manual_seed(0), group=3)
    assert x.shape == (500, 6)
    assert bool(x.any(1).all())
    active = x.reshape(500, 2, 3) > 0
    assert bool((active.all(2) == active.any(2)).all())


@pytest.mark.slow
def test_superposed_features_are_all_represented() -> None:
    toy = toys.tms()
    norms = toy.model.W.detach().norm(dim=0)
    assert float(norms.min()) > 0.5
    assert toy.loss < 0.2
    assert toy.count == 5


def test_circuits_of_a_group_share_an_index() -> None:
    toy = toys.superposed_circuits(6, 3, group=3, steps=5)
    assert toy.count == 2
    assert toy.circuits["W_in"][0].tolist() == [0, 0, 0, 1, 1, 1]
    assert toy.coefficients is not None
    torch.testing.assert_close(toy.labels, toy.inputs @ toy.coefficients.T)


@pytest.mark.slow
def test_xor_squares_and_digits_learn() -> None:
    xor = toys.xor()
    assert xor.model(xor.inputs).argmax(1).tolist() == xor.labels.tolist()
    assert toys.squares(4, 10, 2, steps=300).loss < 0.5
    digits = toys.digits(steps=150)
    accuracy = (digits.model(digits.inputs).argmax(1) == digits.labels).double().mean()
    assert float(accuracy) > 0.85


def test_the_same_seed_gives_the_same_bytes_and_a_run_resumes(tmp_path: Path) -> None:
    first, again = (
        toys.superposed_circuits(steps=20),
        toys.superposed_circuits(steps=20, run=Run(tmp_path)),
    )
    assert torch.equal(first.model.W_in, again.model.W_in)
    resumed = toys.superposed_circuits(steps=20, run=Run(tmp_path))
    assert torch.equal(first.model.W_in, resumed.model.W_in)
    assert torch.equal(first.inputs, resumed.inputs)


def test_weights_load_from_a_file(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    w, b = torch.randn(3, 7, generator=generator), torch.randn(7, generator=generator)
    save_tensors(tmp_path / "w.safetensors", {"W": w, "b": b})
    toy = toys.tms(weights=tmp_path / "w.safetensors", samples=50)
    assert torch.equal(toy.model.W, w)
    assert toy.inputs.shape == (50, 7)
    x = toy.inputs
    torch.testing.assert_close(toy.model(x), torch.relu(x @ w.T @ w + b))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"W": torch.ones(2, 3)}, "lacks b"),
        ({"W": torch.ones(2, 3), "b": torch.ones(2)}, r"got \(2, 3\) and \(2,\)"),
        ({"W": torch.full((2, 3), torch.nan), "b": torch.ones(3)}, "NaN"),
    ],
)
def test_bad_weight_files_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    save_tensors(tmp_path / "w.safetensors", tensors)
    with pytest.raises(InputError, match=message):
        toys.tms(weights=tmp_path / "w.safetensors")
