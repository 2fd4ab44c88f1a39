"""Training of crosscoders: resumed to the same bits, together with a network too; JumpReLU's
thresholds; what is measured on a language model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from assay.errors import InputError
from assay.io import runs
from assay.learn.reading import Reader, rows_of
from assay.mechanisms.crosscoder import (
    Block,
    Cotraining,
    Crosscoder,
    Hinge,
    Training,
    cotrain,
    hash_of,
    train,
)
from assay.mechanisms.crosscoder.evaluation import evaluate, stack_states
from assay.targets.agreement import build_model
from assay.targets.residual_relu import ResidualReLU

SITES = ("embed", "blocks.0")
QUICK = Training(steps=6, rate=1e-2, save_every=2, log_every=2)


class Killed(Exception):  # noqa: N818
    pass


def coder(activation: str = "relu", size: int = 6) -> Crosscoder:
    generator = torch.Generator().manual_seed(3)
    return Crosscoder(SITES, 4, size, activation, k=2, generator=generator)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["batch_topk", "jumprelu"])
def test_a_killed_training_goes_on_to_the_same_bits(activation: str, tmp_path: Path) -> None:
    drawn = torch.randn(6, 16, 2, 4, generator=torch.Generator().manual_seed(0))

    def trained(folder: Path, kill_at: int) -> Crosscoder:
        found = coder(activation)

        def draw(step: int, generator: torch.Generator) -> tuple[Tensor, None]:
            if step == kill_at:
                raise Killed
            noise = torch.randn(16, 2, 4, generator=generator)
            return drawn[step] + 0.1 * noise, None

        saved = {"recipe": "r", "study": "s", "config": {}, "overrides": {}}
        with runs.start(folder, saved, resume=folder.exists()) as run:
            train(
                found, draw, QUICK, scales=torch.ones(2),
                generator=torch.Generator().manual_seed(1), run=run,
            )  # fmt: skip
        return found

    whole = trained(tmp_path / "whole", -1)
    with pytest.raises(Killed):
        trained(tmp_path / "parts", 5)
    again = trained(tmp_path / "parts", -1)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert any(not torch.equal(whole.state_dict()[n], t) for n, t in coder().state_dict().items())


def cotrained(folder: Path, kill_at: int = -1) -> tuple[ResidualReLU, Crosscoder]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, 5, generator=generator)
    y = (x[:, 0] > x[:, 1]).long()
    model = ResidualReLU(5, 4, 6, 2, 1, generator)
    found = Crosscoder(SITES, 4, 8, model_hash="before", generator=generator)
    steps = iter(range(100))

    def terms() -> list[Hinge]:
        if next(steps) == kill_at:
            raise Killed
        block = Block.of(model.blocks[0], 0, live=True)
        return [Hinge(block, model.unembed.weight, model.unembed.bias, y)]

    saved = {"recipe": "r", "study": "s", "config": {}, "overrides": {}}
    with runs.start(folder, saved, resume=folder.exists()) as run:
        cotrain(
            model, found, x, y, QUICK, terms=terms, generator=generator,
            cotraining=Cotraining(0.01, 16), run=run,
        )  # fmt: skip
    return model, found


def test_a_killed_co_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    model, found = cotrained(tmp_path / "whole")
    with pytest.raises(Killed):
        cotrained(tmp_path / "parts", 5)
    other, again = cotrained(tmp_path / "parts")
    assert found.model_hash == hash_of(model) == hash_of(other) == again.model_hash
    for name, tensor in found.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_the_network_learns_from_the_hinge() -> None:
    model = ResidualReLU(5, 4, 6, 2, 1)
    for live in (True, False):
        block = Block.of(model.blocks[0], 0, live=live)
        assert block.W_in.requires_grad is live


def test_thresholds_are_learned_by_their_pseudo_derivative() -> None:
    found = coder("jumprelu")
    with torch.no_grad():
        found.threshold.fill_(0.3)
        found.b_enc.copy_(torch.tensor([0.31, 0.29, 0.5, 0.1, -1.0, 0.34]))
        found.W_enc.zero_()
    codes = found.train().encode(torch.zeros(1, 2, 4))
    expected = torch.tensor([[0.31, 0.0, 0.5, 0.0, 0.0, 0.34]])
    torch.testing.assert_close(codes, expected)
    codes.sum().backward()
    # -z / bandwidth within half a bandwidth of the threshold, nothing elsewhere.
    assert found.threshold.grad is not None
    torch.testing.assert_close(
        found.threshold.grad, torch.tensor([-3.1, -2.9, 0.0, 0.0, 0.0, -3.4])
    )
    assert torch.equal(found.eval().encode(torch.zeros(1, 2, 4)), codes)


def test_what_is_measured_on_a_language_model() -> None:
    model = build_model(30, layers=2, width=8, heads=2, context=12, seed=0, stop=1)
    ids = torch.randint(3, 30, (6, 10), generator=torch.Generator().manual_seed(0))
    rows = rows_of(ids, constant=1)
    names = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    reader = Reader(model, names)
    sites = [reader.refs[name].site for name in names]
    whole = Crosscoder(sites, 8, 40)
    states = stack_states(Reader(model, sites)(rows), whole)
    shift = 100.0
    with torch.no_grad():  # every coordinate of every layer as a feature: nothing is lost
        whole.W_enc.zero_()
        whole.W_dec.zero_()
        for layer in range(2):
            for i in range(8):
                whole.W_enc[layer, i, 8 * layer + i] = 1
                whole.W_dec[8 * layer + i, layer, i] = 1
        whole.b_enc[:16] = shift
        whole.b_dec.fill_(-shift)
        whole.b_enc[16:] = -1
    found = evaluate(model, whole, rows)
    assert found.positions == len(states) == 6 * 9
    assert found.l0 == 16
    assert found.dead == pytest.approx(24 / 40)
    assert found.to_polars()["site"].to_list() == sites
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits.double(), ids[:, 1:].flatten())
    assert found.loss == pytest.approx(loss.detach().item())
    for layer in found.layers:
        assert layer.unexplained < 1e-6
        assert layer.loss_rebuilt == pytest.approx(found.loss, abs=1e-4)
        assert layer.loss_mean != pytest.approx(found.loss, abs=1e-4)
        assert layer.recovered == pytest.approx(1, abs=1e-2)
    with torch.no_grad():  # features that write nothing leave the biases
        whole.W_dec.zero_()
        whole.b_dec.copy_(states.mean(0))
    empty = evaluate(model, whole, rows)
    for layer in empty.layers:
        assert layer.unexplained == pytest.approx(1, abs=1e-5)
        assert layer.recovered == pytest.approx(0, abs=1e-3)
    with pytest.raises(InputError, match="have width 8, the crosscoder reads width 4"):
        evaluate(model, Crosscoder(sites, 4, 5), rows)
