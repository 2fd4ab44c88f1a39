"""Training of transcoders: of one site, with a skip connection, and across layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from assay.dictionaries import Placed, architecture
from assay.dictionaries.initial import initialise
from assay.dictionaries.problem import Problem
from assay.dictionaries.settings import Training
from assay.dictionaries.training import train
from assay.learn.reading import Reader, rows_of

FEATURES, WIDTH, ROWS = 40, 32, 6000


class Known(nn.Module):
    """A network with a table of superposed features at `x`, and two sites of what is computed from
    them: `first` turns each feature into another direction, `second` into a third; `slope` times a
    linear map of x is added to the first.
    """

    def __init__(self, slope: float = 0.0, scale: float = 1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.truth = [
            directions / directions.norm(dim=1, keepdim=True)
            for directions in torch.randn(3, FEATURES, WIDTH, generator=generator)
        ]
        on = torch.rand(ROWS, FEATURES, generator=generator) < 2 / FEATURES
        strength = on * (torch.rand(ROWS, FEATURES, generator=generator) + 0.5)
        self.skipped = slope * torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
        values = [strength @ truth for truth in self.truth]
        values[1] = values[1] + values[0] @ self.skipped
        tables = [scale**place * value for place, value in enumerate(values)]
        self.x, self.first, self.second = (nn.Embedding.from_pretrained(t) for t in tables)

    def forward(self, input_ids, attention_mask=None):
        return self.x(input_ids) + self.first(input_ids) + self.second(input_ids)


def rows():
    return rows_of(torch.arange(ROWS).reshape(-1, 10))


def similarity(truth: torch.Tensor, found: torch.Tensor) -> float:
    """The mean maximum cosine of true directions with those that were found."""
    unit = found / found.norm(dim=1, keepdim=True).clamp(min=1e-9)
    return float((truth @ unit.T).amax(1).mean())


def explained(model: Known, placed: dict[str, Placed], site: str) -> float:
    reads = [one.reads for one in placed.values()]
    values = Reader(model, [*reads, site])(rows())
    rebuilt = sum(
        one.dictionary(values[one.reads]).split(one.width, -1)[one.writes.index(site)]
        for one in placed.values()
        if site in one.writes
    )
    y = values[site]
    return 1 - float((y - rebuilt).square().sum() / (y - y.mean(0)).square().sum())


def fitted(model: Known, placed: dict[str, Placed], steps: int = 1200) -> dict[str, Placed]:
    return train(model, rows(), placed, Training(steps=steps, batch=500, rate=3e-3))


@pytest.mark.slow
def test_a_transcoder_finds_what_is_read_and_what_is_written():
    model = Known(scale=30.0)
    placed = {"t": Placed(architecture("topk")(WIDTH, FEATURES, WIDTH, k=3), "x", ("first",))}
    found = fitted(model, placed)
    assert similarity(model.truth[1], found["t"].dictionary.W_dec) > 0.95
    assert explained(model, found, "first") > 0.8  # more features than k are active at times


@pytest.mark.slow
def test_a_skip_connection_carries_what_is_linear():
    model = Known(slope=2.0)
    shares = {}
    for skip in (False, True):
        made = architecture("topk")(WIDTH, FEATURES, WIDTH, k=3, skip=skip)
        found = fitted(model, {"t": Placed(made, "x", ("first",))})
        shares[skip] = explained(model, found, "first")
    assert shares[True] > 0.9
    assert shares[True] > shares[False]


@pytest.mark.slow
def test_a_cross_layer_transcoder_finds_what_it_writes_at_every_site():
    model = Known(scale=5.0)
    made = architecture("batchtopk")(WIDTH, FEATURES, 2 * WIDTH, k=2)
    found = fitted(model, {"c": Placed(made, "x", ("first", "second"))})
    decoder = found["c"].dictionary.W_dec
    for place, site in enumerate(("first", "second")):
        part = decoder[:, place * WIDTH : (place + 1) * WIDTH]
        assert similarity(model.truth[place + 1], part) > 0.9
        assert explained(model, found, site) > 0.8


def test_the_loss_of_a_shared_site_is_about_the_sum():
    """Two transcoders that write at one site, and one of them at another too: the loss by dense
    formulas in float64.
    """
    model = Known()
    made = {
        "a": Placed(architecture("topk")(WIDTH, 9, 2 * WIDTH, k=3), "x", ("first", "second")),
        "b": Placed(architecture("relu")(WIDTH, 7, WIDTH, skip=True), "first", ("second",)),
    }
    generator = torch.Generator().manual_seed(1)
    for one in made.values():
        one.dictionary.double()
        initialise(one.dictionary, generator)
        with torch.no_grad():
            one.dictionary.b_enc += 0.1
            if one.dictionary.W_skip is not None:
                one.dictionary.W_skip += 0.1
    scales = {"x": 2.0, "first": 0.5, "second": 3.0}
    values = {
        site: torch.randn(20, WIDTH, generator=generator, dtype=torch.float64) for site in scales
    }
    training = Training(steps=10, batch=20, sparsity=0.7)
    loss, terms = Problem(model, made, scales, training).local(values, 5)
    scaled = {site: value / scales[site] for site, value in values.items()}
    a, b = made["a"].dictionary, made["b"].dictionary
    early, late = a(scaled["x"]).split(WIDTH, -1)
    errors = {
        "first": scaled["first"] - early,
        "second": scaled["second"] - late - b(scaled["first"]),
    }
    expected = sum(error.square().mean() for error in errors.values())
    penalty = (b.encode(scaled["first"]) * b.W_dec.norm(dim=1)).sum(1).mean() / WIDTH**0.5
    torch.testing.assert_close(loss, expected + 0.7 * penalty)
    for site, error in errors.items():
        torch.testing.assert_close(terms[f"losses/{site}"], error.square().mean())


def test_scales_of_what_is_read_and_written_are_folded_apart():
    """A network whose later sites are a thousand and a million times larger: the same features,
    and rebuilt values that many times larger.
    """
    made = architecture("topk")(WIDTH, FEATURES, 2 * WIDTH, k=2, skip=WIDTH)
    found = []
    for scale in (1.0, 1000.0):
        model = Known(scale=scale)
        placed = {"c": Placed(made, "x", ("first", "second"))}
        found.append(fitted(model, placed, steps=6)["c"].dictionary)
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found[0].encode(x), found[1].encode(x), rtol=1e-3, atol=1e-4)
    factors = torch.tensor([1e3, 1e6]).repeat_interleave(WIDTH)
    torch.testing.assert_close(found[0](x), found[1](x) / factors, rtol=1e-3, atol=1e-4)
