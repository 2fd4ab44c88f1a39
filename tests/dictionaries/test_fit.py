"""A dictionary that fits passes; one that was misread is refused with what was misread."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from assay.dictionaries import Placed, make
from assay.dictionaries.fit import check_fit
from assay.dictionaries.fold import fold_scale
from assay.dictionaries.linear import Linear
from assay.dictionaries.readings import explained_variance
from assay.errors import InputError

D, M = 24, 24
SITE = "blocks.1.hook_resid_post"


def sparse_values(count: int = 300, seed: int = 0, size: float = 1.0) -> tuple[Linear, Tensor]:
    """Return values that are sums of few rows of a decoder about a centre, and the dictionary that
    rebuilds them exactly.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, _ = torch.linalg.qr(drawn(D, D))
    centre = 2 * drawn(D)
    codes = drawn(count, M).abs() * (torch.rand(count, M, generator=generator) < 0.2)
    dictionary = make("relu", {"d_in": D, "size": M}).double()
    dictionary.load_state_dict(
        {
            "W_enc": rows.T,
            "b_enc": torch.zeros(M),
            "W_dec": rows,
            "b_dec": centre,
        }
    )
    assert isinstance(dictionary, Linear)
    return fold_scale(dictionary, size), size * (codes @ rows + centre)


def changed(dictionary: Linear, **tensors: Tensor) -> Placed:
    with torch.no_grad():
        for key, tensor in tensors.items():
            getattr(dictionary, key).copy_(tensor)
    return Placed(dictionary, SITE, (SITE,))


def test_what_fits_passes_with_its_numbers():
    dictionary, values = sparse_values()
    found = check_fit(changed(dictionary), values)[SITE]
    codes = dictionary.encode(values)
    assert found.explained_variance == pytest.approx(1, abs=1e-12)
    assert found.positions == 300
    assert found.active == pytest.approx(float((codes > 0).sum() / 300))
    assert found.silent == 0
    assert found.warning is None
    whole = check_fit({"mine": changed(dictionary)}, {SITE: values.reshape(3, 100, D)})
    assert whole["mine"].explained_variance == found.explained_variance


@pytest.mark.parametrize("size", [0.02, 30.0])
def test_a_scale_that_is_not_folded_is_named(size: float):
    dictionary, _ = sparse_values()
    _, values = sparse_values(size=size)
    with pytest.raises(InputError, match="scale of training is not folded") as caught:
        check_fit(changed(dictionary), values)
    assert "values divided by" in str(caught.value)
    assert "multiplied" not in str(caught.value)
    assert SITE in str(caught.value)


def test_a_scale_that_is_folded_on_one_side_is_named():
    dictionary, values = sparse_values(size=30.0)
    placed = changed(dictionary, W_dec=dictionary.W_dec / 30, b_enc=dictionary.b_enc)
    dictionary.subtract = False
    with torch.no_grad():
        dictionary.b_enc.copy_(-(dictionary.b_dec @ dictionary.W_enc))
        dictionary.b_dec.div_(30)
    with pytest.raises(InputError, match=r"divided by .* and what is rebuilt multiplied by"):
        check_fit(placed, values)


def test_a_transposed_encoder_is_named():
    dictionary, values = sparse_values()
    with pytest.raises(InputError, match="W_enc is transposed"):
        check_fit(changed(dictionary, W_enc=dictionary.W_enc.T.clone()), values)


def test_an_encoder_that_was_stored_transposed_is_named():
    wide = make("relu", {"d_in": D, "size": 2 * D}).double()
    dictionary, values = sparse_values()
    both = torch.cat([dictionary.W_enc, -dictionary.W_enc], 1).detach()
    state = {
        "W_enc": both.T.reshape(D, 2 * D),
        "W_dec": both.T,
        "b_enc": torch.zeros(2 * D),
        "b_dec": dictionary.b_dec,
    }
    wide.load_state_dict(state)
    assert isinstance(wide, Linear)
    with pytest.raises(InputError, match="W_enc is transposed"):
        check_fit(changed(wide), values)


def test_a_bias_that_is_wrongly_subtracted_is_named():
    dictionary, values = sparse_values()
    dictionary.subtract = False
    with pytest.raises(InputError, match="b_dec is subtracted"):
        check_fit(changed(dictionary), values)
    shifted = dictionary.b_enc - dictionary.b_dec @ dictionary.W_enc
    dictionary.subtract = True
    with pytest.raises(InputError, match="b_dec is not subtracted"):
        check_fit(changed(dictionary, b_enc=shifted), values)


def test_normalised_values_are_named():
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(D, D, generator=generator, dtype=torch.float64)
    ones = torch.ones(D, 1, dtype=torch.float64)
    rows = torch.linalg.qr(torch.cat([ones, drawn], 1))[0].T[1:D]
    active = torch.rand(300, D - 1, generator=generator, dtype=torch.float64) < 0.2
    normal = active.double() @ rows + 1e-6 * drawn[:1]
    normal = (normal - normal.mean(-1, keepdim=True)) / normal.std(-1, keepdim=True)
    dictionary = make("jumprelu", {"d_in": D, "size": D - 1}).double()
    dictionary.load_state_dict(
        {
            "W_enc": rows.T,
            "W_dec": rows,
            "b_enc": torch.zeros(D - 1),
            "b_dec": torch.zeros(D),
            "threshold": torch.full((D - 1,), 0.5),
        }
    )
    assert isinstance(dictionary, Linear)
    sizes = 0.01 + 0.02 * torch.rand(300, 1, generator=generator, dtype=torch.float64)
    with pytest.raises(InputError, match="normalize_activations = 'layer_norm'"):
        check_fit(changed(dictionary), normal * sizes + 1)


def test_a_first_position_that_stands_apart_is_named():
    dictionary, values = sparse_values()
    values = values.reshape(10, 30, D).clone()
    values[:, 0] = -1000 * dictionary.W_dec[0] * torch.arange(10, dtype=torch.float64)[:, None]
    dictionary.b_enc.data.fill_(0.01)
    dictionary.W_dec.data.mul_(1.01)
    with torch.no_grad():
        dictionary.W_enc[:, 1] -= 2 * dictionary.W_dec[0]
    with pytest.raises(InputError, match="first position alone is not explained"):
        check_fit(changed(dictionary), values)


def test_what_nothing_explains_is_laid_to_the_hook_point():
    dictionary, _ = sparse_values()
    generator = torch.Generator().manual_seed(9)
    others = torch.randn(300, D, generator=generator, dtype=torch.float64)
    with pytest.raises(InputError, match="another hook point or on another model"):
        check_fit(changed(dictionary), others)


def test_a_dead_dictionary_is_named():
    dictionary, values = sparse_values()
    dead = changed(dictionary, b_enc=torch.full((M,), -100.0))
    with pytest.raises(InputError, match="no feature is active at 300 positions"):
        check_fit(dead, values)


def test_another_width_names_both():
    dictionary, values = sparse_values()
    with pytest.raises(InputError, match=f"reads values of width {D}, and those at .* width 7"):
        check_fit(changed(dictionary), values[:, :7])
    transcoder = make("relu", {"d_in": D, "size": M, "d_out": 6}).double()
    placed = Placed(transcoder, "in", ("a", "b"))
    given = {"in": values, "a": values[:, :3], "b": values[:, :4]}
    with pytest.raises(InputError, match="writes values of width 3, and those at 'b' have width 4"):
        check_fit(placed, given)
    with pytest.raises(InputError, match="values must be given by site, for a, b, in"):
        check_fit(placed, values)
    with pytest.raises(InputError, match="values at 'b' are needed"):
        check_fit(placed, {"in": values, "a": values[:, :3]})
    with pytest.raises(InputError, match="NaN or infinite"):
        check_fit(changed(dictionary), values / 0)


def test_the_layers_of_a_cross_layer_transcoder_are_checked_together():
    dictionary, values = sparse_values()
    later = sparse_values(seed=1)[0]
    generator = torch.Generator().manual_seed(2)
    other = torch.randn(300, D, generator=generator, dtype=torch.float64)
    first = make("relu", {"d_in": D, "size": M, "d_out": 2 * D}).double()
    rows = torch.randn(M, D, generator=generator, dtype=torch.float64)
    state = dictionary.state_dict()
    first.load_state_dict(
        {
            "W_enc": state["W_enc"],
            "b_enc": -(state["b_dec"] @ state["W_enc"]),
            "W_dec": torch.cat([rows, rows.flip(0)], 1),
            "b_dec": torch.cat([state["b_dec"], torch.zeros(D)]),
        }
    )
    last = make("relu", {"d_in": D, "size": M, "d_out": D}).double()
    last.load_state_dict(later.state_dict())
    placed = {
        "first": Placed(first, "in 0", ("out 0", "out 1")),
        "last": Placed(last, "in 1", ("out 1",)),
    }
    one, two = first(values).detach().split(D, -1)
    given = {"in 0": values, "in 1": other, "out 0": one, "out 1": two + last(other).detach()}
    found = check_fit(placed, given)
    assert [fit.explained_variance for fit in found.values()] == pytest.approx([1, 1])
    with pytest.raises(InputError, match="'first' does not fit"):
        check_fit(placed, {**given, "out 1": -two})


def test_explained_variance_of_constant_values():
    same = torch.ones(4, 3)
    assert explained_variance(same, same) == 1
    assert explained_variance(same, 0 * same) == float("-inf")
