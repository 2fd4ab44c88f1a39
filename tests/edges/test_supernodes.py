"""Suggested supernodes on planted twins, companions and impostors; their file."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from cases import random_dictionary, tiny_batch, tiny_target

from assay.dictionaries import Placed
from assay.edges import measure_likeness, part_edges, suggest_supernodes
from assay.edges.supernodes import Likeness, join_alike, part_activations
from assay.errors import InputError
from assay.io.supernodes import Supernode, read_supernodes, write_supernodes
from assay.mechanisms.features import features

TWIN, COMPANION, IMPOSTOR = 5, 6, 7


@pytest.fixture(scope="module")
def edges():
    """Feature 0 has a twin, a companion (active together, another effect) and an impostor (the same
    effect, active at other times).
    """
    model = tiny_target()
    clean, patch = (tiny_batch(40, positions=2, seed=seed) for seed in (1, 2))
    first, second = (random_dictionary(4, 8, seed).double() for seed in (0, 1))
    encoder, decoder = first.W_enc.data, first.W_dec.data
    encoder[:, [TWIN, COMPANION]] = 1.5 * encoder[:, [0, 0]]
    first.b_enc.data[[TWIN, COMPANION]] = 1.5 * first.b_enc.data[0]
    decoder[TWIN], decoder[IMPOSTOR] = 0.8 * decoder[0], decoder[0]
    placed = {
        site: Placed(made, site, (site,))
        for site, made in (("blocks.0", first), ("blocks.1", second))
    }
    bound = features(model, placed, clean, patch)
    nodes = [("blocks.0", (1, feature)) for feature in range(8)]
    return part_edges(bound, [("blocks.1", (1, feature)) for feature in range(8)], nodes)


def test_only_the_twin_is_merged(edges):
    likeness = measure_likeness(edges)
    together, effect = likeness.coactivation[0], likeness.effect[0]
    assert together[TWIN] == pytest.approx(1)
    assert together[COMPANION] == pytest.approx(1)
    assert together[IMPOSTOR] < 0.7
    assert effect[TWIN] == pytest.approx(1)
    assert effect[COMPANION] < 0.7
    # In four dimensions other random features may be alike too; exact twins alone are above 0.99.
    (found,) = suggest_supernodes(edges, coactivation=0.99, effect=0.99)
    (loose,) = (one for one in suggest_supernodes(edges) if ("blocks.0", (1, 0)) in one.nodes)
    assert loose.nodes == found.nodes
    assert found.nodes == (("blocks.0", (1, 0)), ("blocks.0", (1, TWIN)))
    assert found.name == "blocks.0[pos 1, feature 0] and like"
    # One receiver, the metric alone, tells no two effects apart.
    assert not suggest_supernodes(edges, least=10)


def test_activations_are_coefficients_up_to_a_scale(edges):
    bound = edges.mechanisms
    active = part_activations(bound, [("blocks.0", (1, 0)), ("blocks.0 error", (1,))])
    dictionary = bound.dictionaries["blocks.0"].dictionary
    network = bound.target.model
    now, other = (
        dictionary.encode(network.blocks[0](network.embed(batch.inputs)))[:, 1, 0]
        for batch in (bound.batch, tiny_batch(40, positions=2, seed=2))
    )
    ratio = active[:, 0] / (now - other).detach()
    assert ratio[ratio.isfinite()].std() < 1e-9
    assert ratio[ratio.isfinite()].mean() > 0
    assert active[:, 1].mean() >= 0


def test_groups_hold_only_parts_that_are_all_alike():
    """A chain, 0 like 1 and 1 like 2 but 0 unlike 2, is no group of three."""
    size = torch.eye(4, dtype=torch.float64)
    for one, other, value in ((0, 1, 0.95), (1, 2, 0.9), (0, 2, 0.1), (2, 3, 0.8)):
        size[one, other] = size[other, one] = value
    assert join_alike(Likeness(size, size), 0.7, 0.7) == [[0, 1], [2, 3]]
    assert join_alike(Likeness(size, torch.ones_like(size)), 0.92, 0.7) == [[0, 1]]
    assert join_alike(Likeness(torch.ones_like(size), size), 0.7, 0.97) == []


def test_parts_that_do_not_vary_are_left_alone(edges):
    same = replace(edges, mechanisms=edges.mechanisms.take(torch.zeros(5, dtype=torch.long)))
    assert not measure_likeness(same).coactivation.any()


@pytest.mark.parametrize("value", [0, 1.2, float("nan")])
def test_bad_thresholds(edges, value):
    with pytest.raises(InputError, match="must lie above 0"):
        suggest_supernodes(edges, effect=value)


def test_supernodes_come_back_from_their_file(tmp_path):
    path = tmp_path / "supernodes.json"
    one = Supernode("number", (("blocks.0", (1, 0)), ("blocks.0 error", (1,))))
    given = {"6": [one, Supernode("other", (("blocks.1", (0, 2)),))], "7": []}
    write_supernodes(path, given)
    assert read_supernodes(path) == given
    with pytest.raises(InputError, match=r"the part 'blocks.0\[1, 0\]' is there twice"):
        write_supernodes(tmp_path / "no.json", {"6": [one, replace(one, name="again")]})
    assert not (tmp_path / "no.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(format="other"), "holds no supernodes"),
        (lambda data: data.update(circuits={"\ud800": []}), "holds a lone surrogate"),
        (lambda data: data.update(circuits=[]), "must map circuits"),
        (lambda data: data["circuits"].update({"6": 3}), "must be a list of supernodes"),
        (lambda data: data["circuits"]["6"][0].update(name=" "), "needs a name"),
        (lambda data: data["circuits"]["6"][0].update(parts=[]), "needs a name"),
        (
            lambda data: data["circuits"]["6"][0]["parts"][0].update(index=[1.0, 0]),
            "an index of whole numbers",
        ),
        (
            lambda data: data["circuits"]["6"].append(data["circuits"]["6"][0]),
            "the name 'number' is there twice",
        ),
    ],
)
def test_bad_files_are_named(tmp_path, change, message):
    path = write_supernodes(
        tmp_path / "given.json", {"6": [Supernode("number", (("blocks.0", (1, 0)),))]}
    )
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=message):
        read_supernodes(path)
