"""Each architecture against a loop over its formula in float64, under every transform and
precision, with its scale folded, and what is refused.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from assay.dictionaries import ARCHITECTURES, Dictionary, Placed, architecture, make
from assay.dictionaries.fold import as_jumprelu, fold_norms, fold_scale
from assay.dictionaries.initial import initialise
from assay.dictionaries.linear import Linear
from assay.errors import InputError

D, M = 5, 12
MORE = {
    "batchtopk": {"k": 3},
    "matryoshka": {"k": 3, "nested": [4, 7, 12]},
    "topk": {"k": 3},
}
LINEAR = sorted(set(ARCHITECTURES) - {"identity", "normalised"})
SHAPES = {
    "autoencoder": {},
    "transcoder": {"d_out": D},
    "narrow": {"d_out": 3, "skip": True},
    "cross-layer": {"d_out": 2 * D, "skip": D},
    "no subtraction": {"subtract": False},
}


def random_dictionary(name: str, seed: int = 0, **shape) -> Linear:
    """Return a dictionary in float64 with every tensor drawn at random."""
    config = {"d_in": D, "size": M, **MORE.get(name, {}), **shape}
    dictionary = make(name, config).double()
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in dictionary.state_dict().items():
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.copy_(drawn.abs() if key == "threshold" else drawn)
    assert isinstance(dictionary, Linear)
    return dictionary


def any_dictionary(name: str, **shape) -> Dictionary:
    """Return a dictionary of any architecture in float64."""
    if name == "identity":
        return make(name, {"d_in": D}).double()
    if name == "normalised":
        inner = random_dictionary("topk")
        config = {"norm": "layer_norm", "inner": "topk", "config": inner.config()}
        made = make(name, config).double()
        made.load_state_dict({f"inner.{key}": value for key, value in inner.state_dict().items()})
        return made
    return random_dictionary(name, **shape)


def values(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, D, generator=generator, dtype=torch.float64)


def features_by_hand(dictionary: Linear, x: np.ndarray) -> np.ndarray:
    """Return the features of one vector, one at a time."""
    state = {key: tensor.numpy() for key, tensor in dictionary.state_dict().items()}
    centred = x - state["b_dec"] if dictionary.subtract else x
    plain = [
        sum(centred[i] * state["W_enc"][i, j] for i in range(len(centred)))
        for j in range(dictionary.size)
    ]
    before = np.array(plain) + state["b_enc"]
    sizes = np.maximum(before, 0)
    if getattr(dictionary, "by_norm", False):
        sizes = sizes * np.sqrt((state["W_dec"] ** 2).sum(1))
    match dictionary.architecture:
        case "relu":
            keep = before > 0
        case "topk":
            keep = np.isin(np.arange(len(sizes)), np.argsort(-sizes)[: dictionary.k])
        case "batchtopk" | "matryoshka" | "jumprelu":
            keep = sizes > state["threshold"]
        case "gated":
            strength = np.maximum(np.array(plain) * np.exp(state["r_mag"]) + state["b_mag"], 0)
            return np.where(before > 0, strength, 0)
    return np.where(keep & (before > 0), before, 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LINEAR)
def test_features_and_what_they_rebuild_follow_the_formula(name, shape):
    dictionary = random_dictionary(name, **SHAPES[shape])
    x = values(7)
    codes, rebuilt = dictionary.encode(x), dictionary(x)
    assert 0 < (codes > 0).sum() < codes.numel()
    state = {key: tensor.numpy() for key, tensor in dictionary.state_dict().items()}
    for row, vector in enumerate(x.numpy()):
        expected = features_by_hand(dictionary, vector)
        np.testing.assert_allclose(codes[row].detach(), expected, atol=1e-12)
        out = expected @ state["W_dec"] + state["b_dec"]
        if dictionary.W_skip is not None:
            out[: state["W_skip"].shape[1]] += vector @ state["W_skip"]
        np.testing.assert_allclose(rebuilt[row].detach(), out, atol=1e-12)


@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka"])
def test_features_can_be_chosen_by_what_they_add(name):
    dictionary = random_dictionary(name, by_norm=True)
    plain = random_dictionary(name)
    x = values(20)
    found = dictionary.encode(x)
    expected = np.stack([features_by_hand(dictionary, vector) for vector in x.numpy()])
    np.testing.assert_allclose(found.detach(), expected, atol=1e-12)
    assert not torch.equal(found > 0, plain.encode(x) > 0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_dictionary_is_rebuilt_from_its_config_and_state(name):
    made = any_dictionary(name)
    config = json.loads(json.dumps(made.config()))
    again = architecture(name)(**config)
    again.load_state_dict(made.state_dict())
    assert again.config() == made.config()
    assert (again.d_in, again.d_out) == (D, D)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transforms_and_precisions(name):
    dictionary = any_dictionary(name, skip=True)
    x, tangent = values(4, 3), values(4, 3, seed=2)
    whole = dictionary(x)
    torch.testing.assert_close(torch.vmap(torch.vmap(dictionary))(x), whole)
    out, moved = torch.func.jvp(dictionary, (x,), (tangent,))
    torch.testing.assert_close(out, whole)
    step = 1e-7
    by_hand = (dictionary(x + step * tangent) - dictionary(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(moved, by_hand, atol=1e-5, rtol=1e-5)
    _, pull = torch.func.vjp(dictionary, x)
    cotangent = values(4, 3, seed=3)
    torch.testing.assert_close((pull(cotangent)[0] * tangent).sum(), (cotangent * moved).sum())
    rows = torch.vmap(lambda t: torch.func.jvp(dictionary, (x,), (t,))[1])(torch.stack([tangent]))
    torch.testing.assert_close(rows[0], moved)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.5)):
        low = make(name, dictionary.config()).to(dtype)
        low.load_state_dict(dictionary.state_dict())
        small = low(x.to(dtype))
        assert small.dtype == dtype
        # A feature near its threshold may switch; the mean difference stays at the precision.
        assert (small.double() - whole).abs().mean() < tolerance


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka"])
@pytest.mark.parametrize("by_norm", [False, True])
def test_training_keeps_the_largest_of_the_whole_batch(name, by_norm):
    dictionary = random_dictionary(name, by_norm=by_norm)
    x = values(4, 5)
    codes = dictionary.encode_training(x)
    before = torch.relu(dictionary.before(x))
    sizes = dictionary.sizes(before).reshape(-1)
    smallest = sizes.sort(descending=True).values[3 * 20 - 1]
    kept = (sizes >= smallest).reshape(before.shape)
    torch.testing.assert_close(codes, torch.where(kept, before, 0.0), rtol=0, atol=0)
    dictionary.threshold.zero_()
    dictionary.follow(codes)
    torch.testing.assert_close(dictionary.threshold, smallest)
    dictionary.follow(2 * codes, rate=0.25)
    torch.testing.assert_close(dictionary.threshold, 1.25 * smallest)
    dictionary.follow(torch.zeros_like(codes))
    torch.testing.assert_close(dictionary.threshold, 1.25 * smallest)


def test_nested_dictionaries_are_the_first_features():
    dictionary = random_dictionary("matryoshka", d_out=D, skip=True)
    x = values(6)
    codes = dictionary.encode(x)
    nested = dictionary.decode_nested(codes, x)
    for rebuilt, count in zip(nested, dictionary.nested, strict=True):
        first = codes * (torch.arange(M) < count)
        torch.testing.assert_close(rebuilt, dictionary.decode(first, x))
    torch.testing.assert_close(nested[-1], dictionary(x))


def test_jumprelu_has_the_derivatives_of_its_rectangle():
    dictionary = random_dictionary("jumprelu")
    x, width = values(50), 0.5
    codes = dictionary.encode_training(x, width)
    assert torch.equal(codes, dictionary.encode(x))
    counts = dictionary.count_active(x, width)
    assert torch.equal(counts, (codes > 0).sum(-1).double())
    before = dictionary.before(x)
    near = ((before - dictionary.threshold).abs() < width / 2).double() / width
    cotangent = values(50, seed=4)[:, :1] * torch.ones(M)
    (found,) = torch.autograd.grad((codes * cotangent).sum(), dictionary.threshold)
    torch.testing.assert_close(found, (-dictionary.threshold * near * cotangent).sum(0))
    (found,) = torch.autograd.grad(counts.sum(), dictionary.threshold)
    torch.testing.assert_close(found, -near.sum(0))
    assert (near.sum(0) > 0).any()


def test_gates_are_open_where_features_may_be_active():
    dictionary = random_dictionary("gated")
    x = values(30)
    closed = dictionary.open_gates(x) == 0
    assert closed.any()
    assert not dictionary.encode(x)[closed].any()


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(LINEAR),
    st.sampled_from(sorted(SHAPES)),
    st.floats(1e-3, 1e3),
    st.integers(0, 99),
    st.booleans(),
)
def test_a_folded_scale_rebuilds_values_as_they_are(name, shape, scale, seed, by_norm):
    more = {"by_norm": by_norm} if name in MORE else {}
    dictionary = random_dictionary(name, seed, **SHAPES[shape], **more)
    x = values(9, seed=seed)
    folded = fold_scale(dictionary, scale)
    torch.testing.assert_close(folded.encode(scale * x), dictionary.encode(x))
    torch.testing.assert_close(folded(scale * x), scale * dictionary(x))
    if not dictionary.subtract:
        written = 1 + torch.rand(dictionary.d_out, dtype=torch.float64)
        out = 3.0 if by_norm and name in MORE else written
        folded = fold_scale(dictionary, scale, out)
        torch.testing.assert_close(folded(scale * x), out * dictionary(x))


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(LINEAR), st.sampled_from(sorted(SHAPES)), st.integers(0, 99))
def test_folded_norms_rebuild_the_same(name, shape, seed):
    more = {"by_norm": True} if name in MORE else {}
    dictionary = random_dictionary(name, seed, **SHAPES[shape], **more)
    x = values(9, seed=seed)
    folded = fold_norms(dictionary)
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(M, dtype=torch.float64))
    torch.testing.assert_close(folded(x), dictionary(x))
    norms = dictionary.W_dec.norm(dim=1)
    torch.testing.assert_close(folded.encode(x), dictionary.encode(x) * norms)


@pytest.mark.parametrize("by_norm", [False, True])
def test_batchtopk_becomes_jumprelu(by_norm):
    dictionary = random_dictionary("batchtopk", d_out=3, skip=True, by_norm=by_norm)
    x = values(40)
    made = as_jumprelu(dictionary)
    torch.testing.assert_close(made.encode(x), dictionary.encode(x), rtol=0, atol=0)
    torch.testing.assert_close(made(x), dictionary(x), rtol=0, atol=0)
    assert made.architecture == "jumprelu"


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_start_has_rows_of_length_one_and_a_transposed_encoder(name, shape):
    dictionary = random_dictionary(name, **SHAPES[shape])
    initialise(dictionary, torch.Generator().manual_seed(5))
    rows = dictionary.W_dec
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(M, dtype=torch.float64))
    if dictionary.d_out == D:
        assert torch.equal(dictionary.W_enc, rows.T)
    torch.testing.assert_close(dictionary.W_enc.norm(dim=0), torch.ones(M, dtype=torch.float64))
    others = set(dictionary.state_dict()) - {"W_enc", "W_dec"}
    assert not any(dictionary.state_dict()[key].any() for key in others)
    low = make(name, dictionary.config())
    initialise(low, torch.Generator().manual_seed(5))
    assert torch.equal(low.W_dec, rows.float())


def test_the_start_takes_a_centre_and_thresholds():
    dictionary = random_dictionary("jumprelu")
    centre = values()
    initialise(dictionary, torch.Generator(), centre=centre, threshold=0.25)
    assert torch.equal(dictionary.b_dec, centre)
    assert (dictionary.threshold == 0.25).all()
    with pytest.raises(InputError, match=r"centre must have shape \(5,\), got \(2,\)"):
        initialise(dictionary, torch.Generator(), centre=torch.zeros(2))
    with pytest.raises(InputError, match="relu dictionary has no threshold"):
        initialise(random_dictionary("relu"), torch.Generator(), threshold=1.0)


REFUSED = {
    "no feature": ("relu", {"size": 0}, "size of a dictionary must be at least 1, got 0"),
    "no width": ("relu", {"d_in": 0}, "d_in of a dictionary"),
    "subtraction": ("gated", {"d_out": 3, "subtract": True}, "needs d_out = d_in, got d_in = 5"),
    "skip": ("relu", {"skip": 6}, "skip must be between 0 and d_out = 5"),
    "k": ("topk", {"k": 13}, "k must be between 1 and the 12 features, got 13"),
    "k of a batch": ("batchtopk", {"k": 0}, "k must be above 0"),
    "nested": ("matryoshka", {"k": 3, "nested": [4, 4, 12]}, "increasing sizes"),
    "nested end": ("matryoshka", {"k": 3, "nested": [4, 7]}, "end with all 12 features"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_sizes_are_refused(case):
    name, change, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        make(name, {"d_in": D, "size": M, **MORE.get(name, {}), **change})


def test_what_cannot_be_folded_is_refused():
    autoencoder, transcoder = random_dictionary("topk"), random_dictionary("topk", d_out=3)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="scale must be above 0 and finite"):
            fold_scale(autoencoder, scale)
    with pytest.raises(InputError, match="at the scale at which it reads"):
        fold_scale(autoencoder, 2.0, 3.0)
    with pytest.raises(InputError, match=r"have shape \(3,\), got \(2,\)"):
        fold_scale(transcoder, 2.0, torch.ones(2))
    with pytest.raises(InputError, match="written must hold scales"):
        fold_scale(transcoder, 2.0, torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(InputError, match="by_norm"):
        fold_scale(random_dictionary("topk", d_out=3, by_norm=True), 2.0, torch.ones(3))
    with pytest.raises(InputError, match="norms differ"):
        fold_norms(autoencoder)
    identity = make("identity", {"d_in": D})
    assert torch.equal(fold_scale(identity, 3.0)(values().float()), values().float())
    with pytest.raises(
        InputError, match="norms cannot be folded into a dictionary of architecture identity"
    ):
        fold_norms(identity)
    with pytest.raises(InputError, match="unknown architecture of a dictionary 'topkk'"):
        make("topkk", {})


def test_a_decoder_divides_over_the_sites_that_it_writes():
    dictionary = random_dictionary("relu", d_out=2 * D)
    assert Placed(dictionary, "a", ("b", "c")).width == D
    with pytest.raises(InputError, match="width 10 does not divide over 3 sites"):
        Placed(dictionary, "a", ("b", "c", "d"))
