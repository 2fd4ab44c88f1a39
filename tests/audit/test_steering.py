"""Steering: the change is that of the gates, the prediction that of derivatives, and continuations
are those of a loop with a plain hook.
"""

from __future__ import annotations

import cases
import node_models
import pytest
import torch
from cases import random_dictionary

from assay.attribution import every
from assay.audit.setting import setting_of
from assay.audit.steering import continue_steered, steer
from assay.core.target import Batch, Target
from assay.dictionaries import Placed
from assay.dictionaries.load import load_dictionaries
from assay.dictionaries.save import save_dictionaries
from assay.errors import InputError
from assay.mechanisms.crosscoder import Crosscoder, crosscoder
from assay.mechanisms.features import features
from assay.mechanisms.nodes import nodes
from assay.targets.metrics import loss

SITE = "blocks.1.hook_mlp_out"


@pytest.mark.parametrize("case", list(cases.CASES))
def test_changes_are_those_of_gates_and_predictions_those_of_derivatives(case):
    bound = cases.CASES[case]()
    name = next(iter(bound.groups))
    index = every(bound, name)
    place = tuple(int(entry) for entry in index[len(index) // 2])
    gates = {(name, place): 1.7, (name, (None,) * len(place)): -0.3}
    found = steer(bound, gates)
    full = bound.ones([name])[name] * 0 - 0.3
    assert torch.equal(setting_of(bound, gates, {}).gates[name], full)
    expected = bound.values({name: full}) - bound.values()
    torch.testing.assert_close(found.measured, expected.double(), rtol=1e-9, atol=1e-12)

    # Reverse mode twice, where steering goes forward twice.
    step = torch.zeros((), dtype=full.dtype, requires_grad=True)
    values = bound.values({name: 1 + step * (full - 1)})
    for example, value in enumerate(values):
        (slope,) = torch.autograd.grad(value, step, create_graph=True)
        curve = torch.zeros(())
        if slope.requires_grad:
            (curve,) = torch.autograd.grad(slope, step, retain_graph=True)
        torch.testing.assert_close(found.first[example], slope.double(), rtol=1e-6, atol=1e-9)
        half = curve.double() / 2
        torch.testing.assert_close(found.second[example], half, rtol=1e-5, atol=1e-7)


def test_dictionaries_read_from_their_files_are_steered_like_those_in_memory(tmp_path):
    target = Target(node_models.build("gpt2", torch.float32), loss)
    placed = {SITE: Placed(random_dictionary(16, 12, 3).float(), SITE, (SITE,))}
    save_dictionaries(tmp_path / "saved", placed)
    gates, to = {(SITE, (None, 4)): -2.0}, {(SITE, (1, 3)): 5.0}
    streamed, held = (
        features(
            target, load_dictionaries(tmp_path / "saved", stream=stream), prompts(), None, "zero"
        )
        for stream in (True, False)
    )
    found, expected = (steer(bound, gates, to=to) for bound in (streamed, held))
    assert torch.equal(found.measured, expected.measured)
    assert torch.equal(found.predicted, expected.predicted)
    assert found.second.abs().max() > 0
    for given in ({"gates": {(SITE, (None, 4)): 1e300}}, {"to": {(SITE, (None, 4)): -1e300}}):
        with pytest.raises(InputError, match="too large for the network's"):
            steer(held, **given)
    with pytest.raises(InputError, match="NaN or infinite under this setting"):
        steer(held, to={(SITE, (None, 4)): 3e38})


def prompts(length=5, count=3) -> Batch:
    ids = torch.randint(1, 31, (count, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    last = mask.sum(1) - 1
    return Batch({"input_ids": ids * mask, "attention_mask": mask}, {"last": last})


def bound_features(reference="zero", kind="relu"):
    target = Target(node_models.build("gpt2"), loss)
    options = {"k": 4} if kind == "topk" else {}
    dictionary = random_dictionary(16, 12, 3, kind, **options).double()
    return features(target, {SITE: Placed(dictionary, SITE, (SITE,))}, prompts(), None, reference)


def by_hand(bound, example, count, *, gate, feature, position=None):
    """Return the greedy continuation with feature * gate, everywhere or at one position."""
    model = bound.target.model
    dictionary = bound.dictionaries[SITE].dictionary
    mask = bound.batch.inputs["attention_mask"][example].bool()
    tokens = bound.batch.inputs["input_ids"][example][mask].tolist()
    start = len(tokens)

    def act(module, args, out):
        codes = dictionary.encode(out)[..., feature]
        if position is not None:
            codes = codes * (torch.arange(out.shape[1]) == position)
        return out + (gate - 1) * codes[..., None] * dictionary.W_dec[feature]

    for _ in range(count):
        hook = model.transformer.h[1].mlp.register_forward_hook(act)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens])).logits[0, -1]
        hook.remove()
        tokens.append(int(logits.argmax()))
    return tokens[start:]


@pytest.mark.parametrize("kind", ["relu", "jumprelu"])
def test_continuations_are_those_of_a_loop_with_a_hook(kind):
    bound = bound_features(kind=kind)
    codes = bound.dictionaries[SITE].dictionary
    for example in range(3):
        for feature in (0, 4, 7):
            gates = {(SITE, (None, feature)): -9.0}
            (found,) = continue_steered(bound, gates, examples=[example], count=8)
            assert found.steered == str(by_hand(bound, example, 8, gate=-9.0, feature=feature))
            assert found.without == str(by_hand(bound, example, 8, gate=1.0, feature=feature))
            gates = {(SITE, (1, feature)): 40.0}
            (once,) = continue_steered(bound, gates, examples=[example], count=8)
            expected = by_hand(bound, example, 8, gate=40.0, feature=feature, position=1)
            assert once.steered == str(expected)
    assert codes.size == 12
    gates = {(SITE, (None, feature)): -9.0 for feature in range(12)}
    said = continue_steered(bound, gates, examples=range(3), count=8)
    assert any(one.steered != one.without for one in said)


def test_drawn_tokens_follow_the_seed_and_gates_of_one_change_nothing():
    bound = bound_features()
    one = {(SITE, (None, 3)): 1.0}

    def draw(seed, **more):
        return continue_steered(bound, one, count=12, temperature=2.0, seed=seed, **more)[0]

    assert draw(0) == draw(0)
    assert draw(0).steered == draw(0).without
    assert draw(0).without != draw(1).without
    greedy = continue_steered(bound, one, count=12)[0]
    assert greedy.without != draw(0).without
    cold = continue_steered(bound, one, count=12, temperature=1e-320)[0]
    assert cold == greedy


def test_other_kinds_and_references_are_continued():
    patch = bound_features("mean")
    gates = {(SITE, (None, 3)): 5.0}
    (found,) = continue_steered(patch, gates, count=6)
    assert found.steered.count(",") == 5
    whole = nodes(patch.target, prompts(), None, [SITE], "zero")
    plain = random_dictionary(16, 12, 3).double()
    plain.W_dec.data.zero_()
    plain.b_dec.data.zero_()
    error = features(whole.target, {SITE: Placed(plain, SITE, (SITE,))}, prompts(), None, "zero")
    for gate in (0.0, 3.0):
        first = continue_steered(whole, {(SITE, (None,)): gate}, count=6, examples=range(3))
        second = continue_steered(
            error, {(f"{SITE} error", (None,)): gate}, count=6, examples=range(3)
        )
        assert first == second
    torch.manual_seed(0)
    made = Crosscoder([f"transformer.h.{layer}" for layer in range(2)], 16, 10)
    coder = crosscoder(whole.target, prompts(), made.double())
    (one,) = continue_steered(coder, {("features", (None, 2)): 1.0}, count=4)
    assert one.steered == one.without


def test_bars_hold_the_change_of_new_examples():
    target = Target(node_models.build("gpt2"), loss)
    ids = torch.randint(1, 31, (60, 5), generator=torch.Generator().manual_seed(0))
    batch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {})
    dictionary = random_dictionary(16, 12, 3).double()
    bound = features(target, {SITE: Placed(dictionary, SITE, (SITE,))}, batch, None, "zero")
    found = steer(bound, {(SITE, (None, feature)): 3.0 for feature in range(12)})
    table = found.table()
    assert table["inside"].null_count() == 0
    assert 0.75 <= table["inside"].mean() < 1
    summary = found.summary()
    assert "at least 90% of the bars" in summary["promise"]
    assert summary["change_measured"] == pytest.approx(table["measured"].mean())
    few = steer(bound.take(slice(0, 4)), {(SITE, (None, feature)): 3.0 for feature in range(12)})
    assert few.table()["bar"].null_count() == 4
    assert "needs at least 18 distinct examples" in few.summary()["promise"]


def test_copies_of_an_example_calibrate_no_bar():
    """Copies are one observation: they give no bar that their originals do not give, and where
    there is one no copy is calibrated by another."""
    target = Target(node_models.build("gpt2"), loss)
    ids = torch.randint(1, 31, (20, 4), generator=torch.Generator().manual_seed(0))
    batch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {})
    dictionary = random_dictionary(16, 12, 3).double()
    bound = features(target, {SITE: Placed(dictionary, SITE, (SITE,))}, batch, None, "zero")
    gates = {(SITE, (None, feature)): 3.0 for feature in range(12)}
    for distinct, bars in ((17, False), (20, True)):
        copied = bound.take(torch.arange(distinct).repeat_interleave(3))
        found = steer(copied, gates)
        assert found.inputs == distinct
        assert found.bar.isfinite().unique().tolist() == [bars]
        assert ("no bar" in found.summary()["promise"]) != bars
        each = found.bar.reshape(distinct, 3)
        assert (each == each[:, :1]).all()
        alone = steer(bound.take(torch.arange(distinct)), gates)
        assert alone.bar.tolist() == pytest.approx(each[:, 0].tolist())


def plainly_set(bound, dictionary, values, read=None):
    """Return the metric with features at values everywhere, by a plain hook on the second MLP."""
    model = bound.target.model

    def act(module, args, out):
        codes = dictionary.encode(out if read is None else args[0])
        for feature, value in values.items():
            out = out + (value - codes[..., feature, None]) * dictionary.W_dec[feature]
        return out

    hook = model.transformer.h[1].mlp.register_forward_hook(act)
    with torch.no_grad():
        found = bound.target.values(bound.batch)
    hook.remove()
    return found


@pytest.mark.parametrize("reference", ["zero", "mean"])
@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_a_feature_is_set_to_a_value_where_it_is_active_and_where_not(kind, reference):
    bound = bound_features(reference, kind)
    dictionary = bound.dictionaries[SITE].dictionary
    values = {3: 2.5, 7: 0.0}
    found = steer(bound, to={(SITE, (None, feature)): v for feature, v in values.items()})
    expected = plainly_set(bound, dictionary, values)
    torch.testing.assert_close(found.after, expected.double(), rtol=1e-9, atol=1e-12)
    assert not torch.equal(found.after, found.before)
    assert found.table()["measured"].to_list() == pytest.approx(found.measured.tolist())
    summary = found.summary()
    assert summary["set_to"] == {f"{SITE}[*, 3]": 2.5, f"{SITE}[*, 7]": 0.0}
    assert "gates" not in summary
    with torch.no_grad():
        sites = bound.target.model.transformer.h[1].mlp
        seen = []
        hook = sites.register_forward_hook(lambda module, args, out: seen.append(out))
        bound.target.values(bound.batch)
        hook.remove()
        codes = dictionary.encode(seen[0])[..., 3]
    assert summary["activity"][f"{SITE}[*, 3]"] == {
        "share": pytest.approx(float((codes > 0).double().mean())),
        "mean": pytest.approx(float(codes[codes > 0].mean())),
    }


def test_setting_to_a_value_is_predicted_by_its_derivatives():
    bound = bound_features()
    dictionary = bound.dictionaries[SITE].dictionary
    found = steer(bound, to={(SITE, (None, 3)): 1.25, (SITE, (2, 4)): -0.5})

    # The feature moves along a straight line from where it is; so do both at once.
    def at(step):
        model = bound.target.model

        def act(module, args, out):
            codes = dictionary.encode(out)
            there = (torch.arange(out.shape[1]) == 2)[:, None]
            first = (1.25 - codes[..., 3, None]) * dictionary.W_dec[3]
            second = (-0.5 - codes[..., 4, None]) * dictionary.W_dec[4] * there
            return out + step * (first + second)

        hook = model.transformer.h[1].mlp.register_forward_hook(act)
        with torch.no_grad():
            values = bound.target.values(bound.batch)
        hook.remove()
        return values

    step = 1e-4
    slope = (at(step) - at(-step)) / (2 * step)
    curvature = (at(step) - 2 * at(0.0) + at(-step)) / step**2
    torch.testing.assert_close(found.first, slope.double(), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found.second, curvature.double() / 2, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.after, at(1.0).double(), rtol=1e-9, atol=1e-12)


def test_a_transcoder_is_set_by_what_it_reads():
    target = Target(node_models.build("gpt2"), loss)
    dictionary = random_dictionary(16, 12, 3, d_out=16).double()
    placed = Placed(dictionary, "blocks.1.mlp.hook_in", (SITE,))
    bound = features(target, {"t": placed}, prompts(), None, "zero")
    found = steer(bound, to={("t", (None, 5)): 3.0})
    expected = plainly_set(bound, dictionary, {5: 3.0}, read=True)
    torch.testing.assert_close(found.after, expected.double(), rtol=1e-9, atol=1e-12)


def test_gates_and_values_act_together_in_one_pass():
    target = Target(node_models.build("gpt2"), loss)
    made = {
        f"blocks.{layer}.hook_mlp_out": random_dictionary(16, 12, layer).double()
        for layer in (0, 1)
    }
    placed = {site: Placed(dictionary, site, (site,)) for site, dictionary in made.items()}
    bound = features(target, placed, prompts(), None, "zero")
    first, second = made
    gates, to = {(first, (None, 2)): -3.0}, {(second, (None, 3)): 2.0, (second, (None, 4)): 0.0}
    found = steer(bound, gates, to=to)
    model = target.model

    def early(module, args, out):
        return out - 4 * made[first].encode(out)[..., 2, None] * made[first].W_dec[2]

    hook = model.transformer.h[0].mlp.register_forward_hook(early)
    expected = plainly_set(bound, made[second], {3: 2.0, 4: 0.0})
    hook.remove()
    torch.testing.assert_close(found.after, expected.double(), rtol=1e-9, atol=1e-12)
    both = {(second, (None, 3)): 2.0}
    with pytest.raises(InputError, match="both a gate and a value"):
        steer(bound, {(second, (0, 3)): 2.0}, to=both)
    assert steer(bound, {(second, (0, 5)): 1.0}, to=both).to == both


@pytest.mark.parametrize("rule", ["first", "everywhere", "clamp"])
def test_a_crosscoder_feature_is_set_to_what_a_gate_would_make_of_it(rule):
    target = Target(node_models.build("gpt2"), loss)
    torch.manual_seed(0)
    made = Crosscoder([f"transformer.h.{layer}" for layer in range(2)], 16, 10).double()
    coder = crosscoder(target, prompts(), made, rule=rule)
    always = (coder.codes > 0).all(0).nonzero()
    place, feature = always[0].tolist()
    gates = torch.ones(coder.group("features").shape, dtype=torch.float64)
    gates[:, place, feature] = 4.0 / coder.codes[:, place, feature]
    expected = coder.values({"features": gates})
    found = steer(coder, to={("features", (place, feature)): 4.0})
    torch.testing.assert_close(found.after, expected.double(), rtol=1e-9, atol=1e-12)
    assert not torch.equal(found.after, found.before)


def test_continuations_with_values_are_those_of_a_loop_with_a_hook():
    bound = bound_features()
    dictionary = bound.dictionaries[SITE].dictionary
    model = bound.target.model
    (found,) = continue_steered(bound, to={(SITE, (None, 4)): 30.0}, examples=[1], count=6)
    (once,) = continue_steered(bound, to={(SITE, (1, 4)): 30.0}, examples=[1], count=6)
    assert found.without == once.without
    for said, position in ((found.steered, None), (once.steered, 1)):
        tokens = bound.batch.inputs["input_ids"][1].tolist()

        def act(module, args, out, position=position):
            shift = (30.0 - dictionary.encode(out)[..., 4, None]) * dictionary.W_dec[4]
            if position is not None:
                shift = shift * (torch.arange(out.shape[1]) == position)[:, None]
            return out + shift

        for _ in range(6):
            hook = model.transformer.h[1].mlp.register_forward_hook(act)
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            hook.remove()
        assert said == str(tokens[5:])


def test_values_that_cannot_be_are_refused():
    bound = bound_features()
    dead = next(
        feature for feature in range(12) if not bool((bound.norms()[SITE][:, 0, feature] > 0).any())
    )
    with pytest.raises(InputError, match=r"not active in any of the 3 examples, .* set it to"):
        steer(bound, {(SITE, (0, dead)): 2.0})
    assert float(steer(bound, to={(SITE, (0, dead)): 2.0}).measured.abs().max()) > 0
    some = steer(bound, {(SITE, (0, dead)): 2.0, (SITE, (None, None)): 1.5})
    assert some.summary()["activity"][f"{SITE}[pos 0, feature {dead}]"]["share"] == 0
    for to, words in (
        ({(SITE, (0, 1)): float("inf")}, "is set to inf; give a finite number"),
        ({(SITE, (9, 1)): 1.0}, "is none of them"),
        ({(f"{SITE} error", (0,)): 1.0}, "have no activation"),
        ({("elsewhere", (0,)): 1.0}, "unknown gate group"),
    ):
        with pytest.raises(InputError, match=words):
            steer(bound, to=to)
    whole = nodes(bound.target, prompts(), None, [SITE], "zero")
    with pytest.raises(InputError, match="have no activation that could be set"):
        steer(whole, to={(SITE, (0,)): 1.0})


BAD = {
    "no gate": ({}, "no gate was given"),
    "not finite": ({(SITE, (0, 1)): float("nan")}, "is nan; give a finite"),
    "another group": ({("blocks.1.hook_mlp_oat", (0, 1)): 2.0}, "unknown gate group"),
    "out of range": ({(SITE, (0, 99)): 2.0}, "is none of them"),
    "another index": ({(SITE, (0,)): 2.0}, "is none of them"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_gates_are_refused(case):
    gates, words = BAD[case]
    with pytest.raises(InputError, match=words):
        steer(bound_features(), gates)


def test_bad_continuations_are_refused():
    bound = bound_features()
    gates = {(SITE, (None, 3)): 2.0}
    for given, words in (
        ({"examples": [7]}, "no example 7"),
        ({"count": 0}, "count must be at least 1"),
        ({"temperature": -1.0}, "temperature a number from 0"),
        ({"count": 40}, "do not fit the model's context of 32"),
    ):
        with pytest.raises(InputError, match=words):
            continue_steered(bound, gates, **given)
    with pytest.raises(InputError, match="only language models are continued"):
        continue_steered(cases.bound_features(), {("blocks.0", (0, 1)): 2.0})
