"""Crosscoders: encoding, gate rules against float64 brute force, files, bad input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import bound_crosscoder, tiny_batch, tiny_target
from torch import Tensor

import assay
from assay.core.sites import read_sites, run_edited
from assay.errors import InputError
from assay.io.files import read_json, write_json
from assay.mechanisms.crosscoder import (
    ClampedGates,
    Crosscoder,
    EverywhereGates,
    FirstGates,
    hash_of,
    load,
    residual_states,
    save,
)
from assay.mechanisms.crosscoder.training import (
    Training,
    equal_norm_scales,
    fold,
    train,
    unexplained,
)

SITES = ("embed", "blocks.0", "blocks.2")


def states_of(rows: int = 40, layers: int = 3, width: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.relu(torch.randn(rows, 3, generator=generator))
    atoms = torch.randn(3, layers, width, generator=generator)
    return torch.einsum("rf,fld->rld", codes, atoms) * torch.tensor([1.0, 5.0, 0.2])[:, None]


def coder(activation: str = "relu", **options: object) -> Crosscoder:
    return Crosscoder(SITES, 4, 5, activation, **options)  # type: ignore[arg-type]


def test_codes_and_rebuilt_states_are_those_of_the_formula():
    found, states = coder(), states_of()
    with torch.no_grad():
        found.b_enc.fill_(0.1)
        codes = found.encode(states)
        rebuilt = found(states)
    for row in range(3):
        before = sum(states[row, layer] @ found.W_enc[layer] for layer in range(3)) + 0.1
        torch.testing.assert_close(codes[row], before.clamp_min(0), rtol=1e-5, atol=1e-6)
        for layer in range(3):
            expected = codes[row] @ found.W_dec[:, layer] + found.b_dec[layer]
            torch.testing.assert_close(rebuilt[row, layer], expected, rtol=1e-5, atol=1e-6)
    assert (codes >= 0).all()


def test_activations_keep_what_they_say():
    states = states_of()
    jump, batch = coder("jumprelu"), coder("batch_topk", k=2)
    with torch.no_grad():
        jump.threshold.fill_(0.7)
        before = jump.before(states)
        assert torch.equal(jump.eval().encode(states), before * (before > 0.7))
        codes = batch.train().encode(states)
        assert int((codes > 0).sum()) <= 2 * len(states)
        kept = codes[codes > 0].min()
        dropped = batch.before(states)[codes == 0]
        assert (dropped <= kept).all()
        batch.get_buffer("threshold").fill_(1.5)
        batch.eval()
        assert torch.equal(
            batch.encode(states), batch.before(states) * (batch.before(states) > 1.5)
        )


def test_folding_keeps_codes_and_what_they_rebuild():
    found, states = coder(), states_of()
    scales = equal_norm_scales(states)
    with torch.no_grad():
        found.b_dec.copy_(torch.arange(12.0).reshape(3, 4))
        scaled = states * scales[:, None]
        codes, rebuilt = found.encode(scaled), found(scaled) / scales[:, None]
        fold(found, scales)
    torch.testing.assert_close(found.encode(states), codes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found(states), rebuilt, rtol=1e-4, atol=1e-5)
    sizes = (states * scales[:, None]).square().mean((0, 2))
    torch.testing.assert_close(sizes, torch.ones(3))


@pytest.mark.parametrize(
    "activation",
    ["batch_topk", *(pytest.param(name, marks=pytest.mark.slow) for name in ("relu", "jumprelu"))],
)
def test_training_explains_states_that_are_sums_of_features(activation):
    states = states_of(200)
    found = coder(activation, k=3, generator=torch.Generator().manual_seed(1))
    before = (states - found(states)).square().sum()
    train(
        found,
        lambda step, generator: (states, None),
        Training(steps=120, rate=2e-2, sparsity=1e-3),
        generator=torch.Generator().manual_seed(0),
    )
    after = (states - found.eval()(states)).square().sum()
    assert after < 0.1 * before
    if activation == "batch_topk":
        assert float(found.get_buffer("threshold")) > 0


def run_by_hand(mechanisms, change):
    """Return the metric with `change(layer, now)` at the three sites, in plain hooks."""
    edits = {
        site: lambda seen, layer=layer: change(layer, seen.value)
        for layer, site in enumerate(SITES)
    }
    output = run_edited(mechanisms.target.model, mechanisms.batch.inputs, edits)
    return mechanisms.target.metric(output, mechanisms.batch)


@pytest.mark.parametrize("feature", [0, 2, 3])
def test_a_gate_acts_where_its_rule_says(feature):
    for rule, kind in (
        ("first", FirstGates),
        ("everywhere", EverywhereGates),
        ("clamp", ClampedGates),
    ):
        mechanisms = bound_crosscoder(rule=rule)
        assert type(mechanisms) is kind
        states = residual_states(mechanisms.target.model, mechanisms.batch.inputs, SITES)
        decoder = mechanisms.found.W_dec.detach()
        first = {0: 0, 2: 1, 3: 2}[feature]  # the case's decoders that are zero at early layers
        code = mechanisms.codes[..., feature, None]

        def change(
            layer: int,
            now: Tensor,
            rule: str = rule,
            code: Tensor = code,
            states: Tensor = states,
            decoder: Tensor = decoder,
            first: int = first,
        ) -> Tensor:
            part = code * decoder[feature, layer]
            if rule == "first":
                return now - part if layer == first else now
            return now - part if rule == "everywhere" else states[..., layer, :] - part

        gates = mechanisms.ones()
        gates["features"][..., feature] = 0
        torch.testing.assert_close(mechanisms.values(gates), run_by_hand(mechanisms, change))


def test_all_gates_at_zero_leave_the_biases():
    for rule in ("everywhere", "clamp"):
        mechanisms = bound_crosscoder(rule=rule)
        biases = mechanisms.found.b_dec.detach()
        expected = run_by_hand(mechanisms, lambda layer, now, b=biases: b[layer].expand(now.shape))
        found = mechanisms.values(mechanisms.full(0.0))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_new_errors_add_up_to_the_last_error():
    mechanisms = bound_crosscoder()
    seen = read_sites(mechanisms.target.model, mechanisms.batch.inputs, SITES)
    total = sum(mechanisms.error(layer, seen[site]) for layer, site in enumerate(SITES))
    expected = seen[SITES[-1]].value - mechanisms.rebuilt(2)
    torch.testing.assert_close(total, expected)


def test_the_share_moves_where_a_feature_begins():
    found = coder()
    with torch.no_grad():
        found.W_dec.zero_()
        found.W_dec[:, :, 0] = torch.tensor([0.3, 0.6, 1.0])
    assert found.first_layers(0.2).tolist() == [0] * 5
    assert found.first_layers(0.5).tolist() == [1] * 5
    assert found.first_layers(1.0).tolist() == [2] * 5


def test_a_saved_crosscoder_is_the_same(tmp_path):
    found = coder("jumprelu", model_hash="abc")
    with torch.no_grad():
        found.threshold.copy_(torch.rand(5))
    save(tmp_path / "c", found)
    save(tmp_path / "c", found)
    again = load(tmp_path / "c")
    assert (again.sites, again.activation, again.model_hash) == (SITES, "jumprelu", "abc")
    for name, tensor in found.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    with pytest.raises(InputError, match="not the sites"):
        load(tmp_path / "c", ("embed",))


def outside(layers: int = 3, width: int = 4, size: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "encoder.weight": (layers, width, size),
        "encoder.bias": (size,),
        "decoder.weight": (layers, size, width),
        "decoder.bias": (layers, width),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_the_layout_of_dictionary_learning_is_read(tmp_path):
    state = outside()
    torch.save(state, tmp_path / "ae.pt")
    found = load(tmp_path, SITES)
    x = states_of()
    codes = torch.relu(
        torch.einsum("rld,ldf->rf", x, state["encoder.weight"]) + state["encoder.bias"]
    )
    rebuilt = torch.einsum("rf,lfd->rld", codes, state["decoder.weight"]) + state["decoder.bias"]
    torch.testing.assert_close(found(x), rebuilt, rtol=1e-4, atol=1e-4)


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="holds no crosscoder"):
        load(tmp_path)
    path = tmp_path / "ae.pt"
    for state, message in (
        (outside(), "does not say which layers"),
        (outside(layers=2), "with 3 sites it"),
        ({**outside(), "decoder.bias": torch.zeros(3, 5)}, "decoder.bias has shape"),
        ({**outside(), "encoder.bias": torch.full((5,), float("nan"))}, "NaN"),
        ({**outside(), "encoder.bias": torch.ones(5).double() * 1e300}, "b_enc in float32 holds"),
        ({**outside(), "encoder.bias": torch.ones(5).to(torch.complex64)}, "must hold real"),
        ({**outside(), "encoder.bias": torch.ones(5).to_sparse()}, "must be a plain dense tensor"),
        ({**outside(), "encoder.bias": torch.ones(5, device="meta")}, "must be a plain dense"),
        ({"encoder.weight": torch.zeros(3, 4, 5)}, "it is no crosscoder"),
        (tiny_target(), "without unpickling"),
    ):
        torch.save(state if isinstance(state, dict) else torch.nn.Linear(2, 2), path)
        with pytest.raises(InputError, match=message):
            load(tmp_path, None if "does not say" in message else SITES)
    folder = save(tmp_path / "ours", coder())
    weights = folder / "crosscoder.safetensors"
    other = save(tmp_path / "other", coder(generator=torch.Generator().manual_seed(9)))
    weights.write_bytes((other / "crosscoder.safetensors").read_bytes())
    with pytest.raises(InputError, match="not the file that its config"):
        load(folder)
    config = other / "crosscoder.json"
    for size in (4, 10**12):  # refused before room for so many features is asked for
        write_json(config, read_json(config) | {"size": size})
        with pytest.raises(InputError, match="does not fit its config: W_dec must be"):
            load(other)


def test_nothing_that_assay_did_not_write_is_overwritten(tmp_path):
    """Neither file of a folder: both stay as they were, whichever of them is foreign."""
    for name, data in (("crosscoder.json", b"{}"), ("crosscoder.safetensors", b"mine")):
        folder = save(tmp_path / name, coder())
        save(folder, coder(generator=torch.Generator().manual_seed(9)))
        assert load(folder).W_dec.equal(coder(generator=torch.Generator().manual_seed(9)).W_dec)
        (folder / name).write_bytes(data)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(InputError, match=f"{name} exists and is not a file that Assay"):
            save(folder, coder())
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_states_whose_squares_leave_float32_are_scaled_and_measured(size):
    states = states_of()
    torch.testing.assert_close(equal_norm_scales(states * size) * size, equal_norm_scales(states))
    found = coder()
    with torch.no_grad():
        found.W_dec.zero_()
        found.b_dec.copy_(states.mean(0) * size)
    assert unexplained(found, states * size).tolist() == pytest.approx([1, 1, 1], abs=1e-4)


@pytest.mark.parametrize("rule", ["first", "everywhere", "clamp"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codes_of_narrow_networks_keep_the_range_and_precision_of_float32(dtype, rule):
    """Features in units a thousand times smaller, whose codes are beyond float16, change nothing
    but their own size."""
    target, batch = tiny_target(dtype=dtype), tiny_batch(dtype=dtype)
    found = coder("batch_topk").train()
    plain = assay.crosscoder(target, batch, found, rule)
    with torch.no_grad():
        found.W_enc.mul_(2.0**17)
        found.b_enc.mul_(2.0**17)
        found.W_dec.div_(2.0**17)
    scaled = assay.crosscoder(target, batch, found, rule)
    assert found.training
    assert float(scaled.codes.max()) > torch.finfo(torch.float16).max
    assert torch.equal(scaled.codes, plain.codes * 2.0**17)
    again = coder("batch_topk")
    plain = assay.crosscoder(target, batch, again, rule)
    gates = {name: gate * 0.3 for name, gate in plain.ones().items()}
    assert torch.equal(scaled.values(gates), plain.values(gates))
    assert torch.equal(scaled.values(scaled.ones()), target.values(batch))


def test_a_network_in_training_mode_is_read_in_evaluation_mode():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5)).train()
    x = torch.ones(5, 3)
    first, again = (residual_states(model, x, ["1"]) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first[:, 0], model[0](x))
    assert model[1].training


def test_bad_arguments_are_refused():
    target, batch = tiny_target(), tiny_batch()
    found = coder()
    with pytest.raises(InputError, match="unknown gate rule 'firsts'; did you mean first"):
        assay.crosscoder(target, batch, found, "firsts")
    with pytest.raises(InputError, match="share must lie"):
        assay.crosscoder(target, batch, found, share=0)
    with pytest.raises(InputError, match="trained on another network"):
        assay.crosscoder(target, batch, coder(model_hash=hash_of(tiny_target(1).model)))
    assert len(assay.crosscoder(target, batch, coder(model_hash=hash_of(target.model))).batch) == 5
    with pytest.raises(InputError, match="the crosscoder reads"):
        assay.crosscoder(target, batch, Crosscoder(SITES, 3, 5))
    with pytest.raises(InputError, match="states of one shape"):
        residual_states(target.model, batch.inputs, ("embed", "blocks.0.up"))
    with pytest.raises(InputError, match=r"reaches the sites in the order embed, blocks\.0; a"):
        residual_states(target.model, batch.inputs, ("blocks.0", "embed"))
    damaged = coder()
    with torch.no_grad():
        damaged.W_dec[0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="W_dec of the crosscoder holds 1 NaN"):
        assay.crosscoder(target, batch, damaged)
    with pytest.raises(InputError, match="take no reference"):
        found.bind(target, batch, assay.Reference("zero"))
    with pytest.raises(InputError, match="did you mean"):
        coder("jumprelus")
    with pytest.raises(InputError, match="sites must be different"):
        Crosscoder(("embed", "embed"), 4, 5)
    with pytest.raises(InputError, match="all zero"):
        equal_norm_scales(torch.zeros(3, 2, 4))
    with pytest.raises(InputError, match="steps, log_every"):
        replace(Training(), steps=0)
