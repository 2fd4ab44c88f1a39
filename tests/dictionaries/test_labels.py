"""Labels of features against all activations at once, and what a stream costs."""

from __future__ import annotations

import node_models
import pytest
import torch
from cases import random_dictionary

from assay.dictionaries import Placed
from assay.dictionaries.labels import _Held, label_features
from assay.errors import InputError
from assay.learn.reading import Reader, Rows, rows_of
from assay.targets.promoted import promoted_tokens

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def scene():
    model = node_models.build("gpt2", torch.float32)
    dictionary = random_dictionary(16, 12, 3)
    dictionary.b_enc.data[7] = -1e3  # never active
    placed = {SITE: Placed(dictionary, SITE, (SITE,))}
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (30, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[::3, 6:] = False
    return model, placed, rows_of(ids, mask)


def test_labels_are_those_of_all_activations(scene):
    model, placed, rows = scene
    found = label_features(model, rows, placed, {SITE: [2, 7, 5]}, contexts=4, around=2, bins=16)
    codes = placed[SITE].dictionary.encode(Reader(model, [SITE])(rows)[SITE])
    whole = torch.zeros(*rows.ids.shape, 12)
    whole[rows.mask] = codes.detach()
    for label, feature in zip(found, (2, 7, 5), strict=True):
        here = whole[..., feature]
        assert (label.feature, label.positions) == (feature, int(rows.mask.sum()))
        assert label.active == int((here > 0).sum()) == sum(label.counts)
        if feature == 7:
            assert label.contexts == ()
            assert label.reason == f"never active on {label.positions} positions"
            continue
        assert label.reason == ""
        best = here.amax(1).topk(4)
        assert [one.activation for one in label.contexts] == pytest.approx(best.values.tolist())
        for one, window in zip(label.contexts, best.indices.tolist(), strict=True):
            place = int(here[window].argmax())
            length = int(rows.mask[window].sum())
            text = rows.ids[window, max(0, place - 2) : min(place + 3, length)]
            assert one.tokens == tuple(text.tolist())
            assert one.tokens[one.place] == int(rows.ids[window, place])
        assert here.max() <= label.top <= 2 * here.max()
        counts = torch.histc(here[here > 0], 16, 0, label.top)
        assert list(label.counts) == counts.long().tolist()


def test_a_stream_gives_the_same_and_keeps_nothing(scene):
    """Windows one at a time, of which none is held: the state is that of one window."""
    model, placed, rows = scene
    wanted = {SITE: [2, 7, 5]}
    alive = []

    def stream():
        for place in range(len(rows)):
            some = rows.take(slice(place, place + 1))
            alive.append(place)
            yield some

    together, single = (label_features(model, texts, placed, wanted) for texts in (rows, stream()))
    assert len(alive) == len(rows)
    for one, other in zip(together, single, strict=True):
        assert (one.active, one.top, one.counts) == (other.active, other.top, other.counts)
        firsts, seconds = ([c.activation for c in label.contexts] for label in (one, other))
        assert firsts == pytest.approx(seconds)
    held = _Held(3, 4, 2, 16)
    sizes = [value.shape for value in vars(held).values() if isinstance(value, torch.Tensor)]
    for power in range(-20, 20):
        codes = torch.rand(int(rows.mask.sum()), 3) * 2.0**power
        held.add(rows, codes)
    assert sizes == [v.shape for v in vars(held).values() if isinstance(v, torch.Tensor)]
    assert held.counts.sum(1).tolist() == held.active.tolist()


def test_what_is_wrong_is_named(scene):
    model, placed, rows = scene
    with pytest.raises(InputError, match="there is none 12"):
        label_features(model, rows, placed, {SITE: [12]})
    with pytest.raises(InputError, match="unknown dictionary 'blocks'"):
        label_features(model, rows, placed, {"blocks": [0]})
    with pytest.raises(InputError, match="no window"):
        label_features(model, iter(()), placed, {SITE: [0]})
    broken = random_dictionary(16, 12, 3)
    broken.W_enc.data[:, 4] = torch.nan
    with pytest.raises(InputError, match="the dictionary's own"):
        label_features(model, rows, {SITE: Placed(broken, SITE, (SITE,))}, {SITE: [0, 4]})


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_promoted_tokens_are_read_through_the_final_norm(family):
    model = node_models.build(family, torch.float64)
    rows = torch.randn(5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids, values = promoted_tokens(model, rows, 3)
    again = promoted_tokens(model, 7 * rows, 3)
    assert torch.equal(ids, again[0])
    torch.testing.assert_close(values, again[1])
    norm = {"gpt2": "transformer.ln_f"}.get(family, "model.norm")
    gain = model.get_submodule(norm).weight
    gain = 1 + gain if family == "gemma2" else gain
    centred = rows - rows.mean(1, keepdim=True) if family == "gpt2" else rows
    unit = centred / centred.square().mean(1, keepdim=True).sqrt()
    by_hand = (unit * gain) @ model.get_output_embeddings().weight.T
    best = by_hand.topk(3, dim=1)
    assert torch.equal(ids, best.indices)
    torch.testing.assert_close(values, best.values, rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match="must be"):
        promoted_tokens(model, rows[:, :3], 3)


def test_a_model_without_a_known_norm_has_no_promoted_tokens():
    with pytest.raises(InputError, match="promoted tokens need a final norm"):
        promoted_tokens(torch.nn.Linear(3, 3), torch.zeros(1, 3), 1)


def test_rows_are_read_at_kept_positions_alone(scene):
    model, placed, rows = scene
    later = Rows(rows.ids, rows.mask, constant=2)
    (label,) = label_features(model, later, placed, {SITE: [2]})
    assert label.positions == int(later.kept.sum())
