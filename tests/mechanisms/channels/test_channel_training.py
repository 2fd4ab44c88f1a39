"""The data, the training objective and its monitoring."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from channel_oracle import batch, derivatives, network
from torch.nn import functional as f

from assay.errors import InputError
from assay.io.files import save_tensors
from assay.io.runs import Run
from assay.learn import fit
from assay.mechanisms.channels.clean import run_clean
from assay.mechanisms.channels.objective import (
    Training,
    channel_losses,
    make_objective,
    make_optimizer,
    monitor,
)
from assay.mechanisms.channels.weights import read_weights
from assay.targets.bilinear import BilinearNetwork
from assay.targets.data import Data, load_arrays, load_digits, split_data


def _data(examples: int = 60) -> Data:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, 6, generator=generator)
    return split_data(x, (x[:, 0] * x[:, 1] > 0).long())


def test_digits_are_split_the_same_way_every_time() -> None:
    first, second = load_digits(), load_digits()
    assert first.train_x.shape == (1297, 64)
    assert first.test_x.shape == (500, 64)
    assert first.image == (8, 8)
    assert first.classes == 10
    assert torch.equal(first.test_x, second.test_x)
    assert float(first.train_x.min()) == 0
    assert float(first.train_x.max()) == 1
    assert not torch.equal(first.test_y, load_digits(1).test_y)


def test_tables_are_scaled_by_their_training_part_and_get_a_constant() -> None:
    x = torch.tensor([5.0, 100.0, 7.0]) + torch.tensor([1.0, 1000.0, 0.0]) * torch.randn(
        40, 3, generator=torch.Generator().manual_seed(1)
    )
    data = split_data(x, torch.arange(40) % 3 + 5)
    assert data.inputs == 4
    assert data.names == ("5", "6", "7")
    assert torch.allclose(data.train_x[:, :2].mean(0), torch.zeros(2), atol=1e-5)
    assert torch.allclose(data.train_x[:, :2].std(0, correction=0), torch.ones(2), atol=1e-5)
    assert torch.equal(data.train_x[:, 2], torch.zeros(30))
    assert torch.equal(data.test_x[:, 3], torch.ones(10))


def test_arrays_of_the_user_are_read_from_npz_and_safetensors(tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).random((20, 4, 4)), np.arange(20) % 2
    np.savez(tmp_path / "data.npz", x=x, y=y)
    save_tensors(
        tmp_path / "data.safetensors", {"x": torch.from_numpy(x), "y": torch.from_numpy(y)}
    )
    first, second = load_arrays(tmp_path / "data.npz"), load_arrays(tmp_path / "data.safetensors")
    assert first.image == (4, 4)
    assert len(first.train_y) == 15
    assert torch.equal(first.test_x, second.test_x)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.ones((4, 2))}, "y missing"),
        ({"x": np.ones((4, 2)), "y": np.zeros(3, int)}, r"y must be \(4,\)"),
        ({"x": np.ones((0, 2)), "y": np.zeros(0, int)}, "not empty"),
        ({"x": np.ones(4), "y": np.zeros(4, int)}, "columns"),
        ({"x": np.ones((4, 2)), "y": np.zeros(4, int)}, "one class only"),
        ({"x": np.full((4, 2), np.nan), "y": np.arange(4)}, "NaN"),
        ({"x": np.full((4, 2), np.inf), "y": np.arange(4)}, "infinite"),
        ({"x": np.ones((4, 2)), "y": np.array([0.5, 1, 2, 3])}, "integer classes"),
        ({"x": np.eye(4), "y": np.arange(4)}, "no training example"),
        ({"x": np.ones((4, 2)), "y": np.arange(4)}, "1 distinct examples cannot be split"),
        ({"x": np.ones((1, 2)), "y": np.zeros(1, int)}, "one class only"),
    ],
)
def test_bad_arrays_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(InputError, match=message):
        load_arrays(tmp_path / "data.npz")


def test_a_bad_share_is_refused() -> None:
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="train"):
            split_data(torch.ones(4, 2), torch.arange(4) % 2, train=share)


def test_losses_are_the_means_of_their_definitions() -> None:
    model = network(1)
    x, y = batch(1)
    clean = run_clean(read_weights(model), x, y)
    losses = {name: loss.detach() for name, loss in channel_losses(clean, tau=0.05).items()}
    scores = derivatives(model, x, y, "logit")[0]
    root = scores.shape[-1] ** 0.5
    sparsity = (root - scores.abs().sum(-1) / scores.norm(dim=-1)) / (root - 1)
    assert float(losses["losses/sparsity"]) == pytest.approx(1 - float(sparsity.mean(0).mean()))
    steps = [
        h.abs() * layer.down.norm(dim=0)
        for h, layer in zip(clean.hidden, clean.weights.layers, strict=True)
    ]
    excess = torch.stack([(s - 0.05).relu().square().mean() for s in steps]).mean()
    assert float(losses["losses/delta"]) == pytest.approx(float(excess.detach()))
    assert float(losses["losses/cross_entropy"]) == pytest.approx(
        float(f.cross_entropy(model(x), y).detach())
    )


def test_examples_without_any_attribution_are_left_out_of_the_mean() -> None:
    model = network(2)
    x, y = batch(2)
    x[1] = 0
    clean = run_clean(read_weights(model), x, y)
    without = run_clean(read_weights(model), x[[0, 2, 3]], y[[0, 2, 3]])
    loss, expected = (channel_losses(passed, 0.1)["losses/sparsity"] for passed in (clean, without))
    assert float(loss.detach()) == pytest.approx(float(expected.detach()))
    loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("options", [{}, {"norm": True}, {"gate": "silu"}], ids=str)
def test_training_lowers_the_loss_logs_its_monitors_and_repeats(
    tmp_path: Path, options: dict[str, object]
) -> None:
    data, config = _data(), Training(steps=40, batch=16, log_every=20, lam_delta=1.0, rate=1e-2)
    weights = []
    for name in ("a", "b"):
        generator = torch.Generator().manual_seed(0)
        model = BilinearNetwork(
            data.inputs, data.classes, width=5, hidden=6, blocks=2, generator=generator, **options
        )  # type: ignore[arg-type]
        run = Run(tmp_path / name)
        fit(
            model,
            make_objective(model, data, config, generator),
            make_optimizer(model, config),
            steps=40,
            generator=generator,
            run=run,
            log_every=20,
        )
        weights.append(
            torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        )
    assert torch.equal(*weights)
    logged = run.metrics()
    assert logged["step"].to_list() == [0, 20, 39]
    assert {
        "metrics/accuracy",
        "metrics/agreement",
        "sparsity/hoyer_1",
        "details/delta_q99",
        "losses/delta",
    } <= set(logged.columns)
    assert logged["losses/cross_entropy"][-1] < logged["losses/cross_entropy"][0]


def test_the_ramp_keeps_sparsity_out_of_the_beginning() -> None:
    data = _data()
    model = BilinearNetwork(
        data.inputs,
        data.classes,
        width=5,
        hidden=6,
        blocks=2,
        generator=torch.Generator().manual_seed(0),
    )
    config = Training(steps=100, batch=8, lam_delta=0.0, lam_sparse=2.0)
    for step, share in ((0, 0.0), (20, 0.0), (35, 0.5), (50, 1.0), (99, 1.0)):
        objective = make_objective(model, data, config, torch.Generator().manual_seed(step))
        loss, terms = objective(step)
        assert float(loss.detach()) == pytest.approx(
            float(terms["losses/cross_entropy"] + 2 * share * terms["losses/sparsity"])
        )


def test_monitoring_agrees_with_itself_when_attribution_is_exact() -> None:
    data = _data()
    model = BilinearNetwork(
        data.inputs,
        data.classes,
        width=5,
        hidden=6,
        blocks=1,
        generator=torch.Generator().manual_seed(0),
    )
    found = monitor(model, data)
    assert float(found["metrics/agreement"]) == pytest.approx(1)
    assert float(found["metrics/accuracy"]) == pytest.approx(
        float((model(data.train_x).argmax(-1) == data.train_y).double().mean())
    )


@pytest.mark.parametrize(
    "change",
    [{"steps": 0}, {"rate": 0.0}, {"tau": -1.0}, {"lam_sparse": float("nan")}, {"ramp_begin": 0.6}],
)
def test_bad_configs_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Training(**change)  # type: ignore[arg-type]
