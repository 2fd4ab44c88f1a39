"""Circuits of parts: which are taken, that a doubtful one is patched first, and what is kept."""

from __future__ import annotations

from dataclasses import replace

import cases
import polars as pl
import pytest
import torch

from assay.attribution import Exact, attribute
from assay.audit import (
    CircuitCurve,
    areas,
    circuit_curve,
    node_masks,
    rank_parts,
    track_counts,
)
from assay.audit.faithfulness import faithfulness
from assay.errors import InputError


@pytest.fixture(scope="module")
def exact():
    return attribute(cases.CASES["features"](), Exact())


def helps(scores):
    mean = scores.mean()
    return {
        (name, tuple(index)): float(values[tuple(index)])
        for name, values in mean.items()
        for index in torch.cartesian_prod(*map(torch.arange, values.shape))
        .reshape(-1, values.ndim)
        .tolist()
    }


def test_the_parts_that_help_most_come_first(exact):
    found, every = rank_parts(exact, 5), helps(exact)
    sizes = [value for value in sorted(every.values(), reverse=True) if value]
    assert [every[node] for node in found.nodes] == sizes
    assert found.patches == found.doubtful == 0
    assert found.circuit == found.nodes[:5]
    some = rank_parts(exact, 3, groups=["blocks.1"])
    assert {name for name, _ in some.nodes} == {"blocks.1"}


def test_where_lower_is_right_the_signs_turn(exact):
    target = replace(exact.mechanisms.target, higher_is_right=False)
    turned = replace(exact, mechanisms=replace(exact.mechanisms, target=target))
    assert rank_parts(turned, 1).nodes[0] == rank_parts(exact, 1).nodes[-1]


def test_a_bar_across_the_bound_is_patched_exactly(exact):
    """Scores with large errors and honest bars give the exact circuit, with bars that are narrow
    far from the bound fewer patches, and without any bar all of them.
    """
    generator = torch.Generator().manual_seed(0)
    noise = {
        name: 0.5 * torch.randn(values.shape[1:], generator=generator, dtype=torch.float64)
        for name, values in exact.values.items()
    }
    rough = replace(
        exact,
        exact=False,
        values={name: values + noise[name] for name, values in exact.values.items()},
    )
    bars = {name: (noise[name].abs() + 1e-9).expand_as(exact.values[name]) for name in noise}
    wanted = rank_parts(exact, 5)
    honest = rank_parts(rough, 5, half_widths=bars)
    assert set(honest.circuit) == set(wanted.circuit)
    assert honest.doubtful == 0
    blind = rank_parts(rough, 5)
    assert set(blind.circuit) == set(wanted.circuit)
    assert 0 < honest.patches < blind.patches
    stopped = rank_parts(rough, 5, patches=2)
    assert stopped.patches == 2
    assert stopped.doubtful > 0
    none = {name: torch.zeros_like(values) for name, values in exact.values.items()}
    assert rank_parts(rough, 5, half_widths=none).patches == 0


def test_a_score_alone_takes_the_wrong_part_and_its_bar_mends_it(exact):
    """Two parts whose scores are in the wrong order: by score alone the weaker is taken, with a bar
    that reaches across the bound both are patched and the stronger is taken.
    """
    wanted = rank_parts(exact, 3)
    taken, left = wanted.nodes[2], wanted.nodes[3]
    values = {name: entry.clone() for name, entry in exact.values.items()}
    bars = {name: torch.zeros_like(entry) for name, entry in values.items()}
    gap = wanted.table["help"][2] - wanted.table["help"][3]
    for node, turn in ((taken, -gap), (left, gap)):
        values[node[0]][(slice(None), *node[1])] += turn
        bars[node[0]][(slice(None), *node[1])] = gap * 1.01
    wrong = replace(exact, exact=False, values=values)
    by_score = rank_parts(wrong, 3, half_widths={name: bar * 0 for name, bar in bars.items()})
    assert left in by_score.circuit
    assert taken not in by_score.circuit
    mended = rank_parts(wrong, 3, half_widths=bars)
    assert mended.patches == 2
    assert mended.circuit == wanted.circuit
    assert mended.table.filter(pl.col("patched"))["bar"].to_list() == [0, 0]
    # A bar that ends before the bound changes nothing and costs nothing.
    short = {name: bar * 0.1 for name, bar in bars.items()}
    assert rank_parts(wrong, 3, half_widths=short).patches == 0


def test_curves_are_faithfulness_by_count(exact):
    bound = exact.mechanisms
    errors = [name for name in bound.groups if name.endswith("error")]
    nodes = rank_parts(exact, 5, groups=set(bound.groups) - set(errors)).nodes
    found = circuit_curve(bound, nodes, [0, 3, 1000], always=errors)
    table = found.table()
    assert table["nodes"].to_list() == [0, 3, len(nodes)]
    assert table["share"].to_list() == [0, 3 / len(nodes), 1]
    masks = node_masks(bound, nodes[:3], errors)
    by_hand = faithfulness(bound, masks)
    for name, value in by_hand.__dict__.items():
        assert table[name][1] == pytest.approx(value)
    kept = sum(int(mask.expand(1, *bound.group(name).axes).sum()) for name, mask in masks.items())
    assert kept == 3 + sum(int(torch.tensor(bound.group(name).axes).prod()) for name in errors)
    whole = circuit_curve(bound, nodes, [0], always=list(bound.groups)).table()
    assert whole["faithfulness"][0] == pytest.approx(1)
    everything = rank_parts(exact, 5).nodes
    ends = circuit_curve(bound, everything, track_counts(len(everything)))
    assert ends.table()["faithfulness"][-1] == pytest.approx(1)
    assert ends.table()["faithfulness"][0] == 0
    measured = ends.areas()
    assert measured == pytest.approx({**measured, **areas(ends.table())})
    copied = bound.take(torch.tensor([0, 0, 1]))
    assert circuit_curve(copied, everything, [1]).unit.tolist() == [0, 0, 1]


def drawn_curve(generator, count, copies=1):
    """Return the curve of a few of many examples, each as often as `copies`, and the truth: its
    faithfulness, CPR and CMD.
    """
    faithful = torch.tensor([[0.0], [0.4], [0.9], [1.1], [1.0]])
    noisy = torch.tensor([[0.0], [1.0], [1.0], [1.0], [0.0]])
    whole = 4 + torch.randn(count, generator=generator, dtype=torch.float64)
    empty = torch.randn(count, generator=generator, dtype=torch.float64)
    noise = 0.8 * torch.randn(5, count, generator=generator, dtype=torch.float64)
    unit = torch.arange(count).repeat_interleave(copies)
    full, empty, kept = (
        values[..., unit]
        for values in (empty + whole, empty, empty + faithful * whole + noisy * noise)
    )
    truth = {"share": [0.0, 0.1, 0.3, 0.6, 1.0], "faithfulness": faithful[:, 0].tolist()}
    curve = CircuitCurve(
        (0, 1, 3, 6, 10), 10, full, empty, kept, full - kept, (0.0,) * 5, unit=unit.numpy()
    )
    return curve, truth["faithfulness"], areas(pl.DataFrame(truth))


@pytest.mark.parametrize("count", [3, 5, 40])
def test_intervals_of_a_curve_hold_however_few_the_examples(count):
    """95 % intervals hold the ratio of the population, CPR and CMD, up to three errors of the 250
    samples; percentiles of a bootstrap hold it in 75, 85 and 94 %.
    """
    generator = torch.Generator().manual_seed(0)
    held, absent = torch.zeros(4), 0
    for _ in range(250):
        curve, truth, both = drawn_curve(generator, count)
        table, found = curve.table(), curve.areas()
        absent += table["low"].null_count() > 0
        ends = [(table["low"][place], truth[place], table["high"][place]) for place in (2, 3)]
        ends += [(found[f"{name}_low"], both[name], found[f"{name}_high"]) for name in both]
        held += torch.tensor([low is None or low <= value <= high for low, value, high in ends])
    assert held.min() / 250 >= 0.91
    assert held[:3].max() / 250 < 1
    assert absent < 250 / 4


def test_without_a_clear_metric_of_the_network_there_is_no_interval():
    curve, _, _ = drawn_curve(torch.Generator().manual_seed(0), 6)
    unclear = replace(curve, full=curve.empty + curve.full - curve.full.mean())
    assert unclear.table()["low"].null_count() == 5
    assert unclear.areas()["cmd_high"] is None
    one, _, _ = drawn_curve(torch.Generator().manual_seed(0), 1)
    assert one.table()["high"].null_count() == 5
    assert one.table().schema == curve.table().schema


def test_copies_of_an_example_narrow_no_interval():
    once, _, _ = drawn_curve(torch.Generator().manual_seed(0), 6)
    often, _, _ = drawn_curve(torch.Generator().manual_seed(0), 6, copies=10)
    assert often.table()["low"].to_list() == pytest.approx(once.table()["low"].to_list())
    alone = replace(often, unit=None).table()
    assert (alone["high"] - alone["low"])[2] < 0.5 * (once.table()["high"] - once.table()["low"])[2]


def test_the_low_end_of_cmd_leaves_out_what_may_be_one(exact):
    """Where every circuit keeps everything but for noise, CMD is that of nothing alone, and the
    estimate is above it by chance.
    """
    generator, held = torch.Generator().manual_seed(0), 0
    for _ in range(100):
        curve, _, _ = drawn_curve(generator, 20)
        noise = torch.randn(5, 20, generator=generator, dtype=torch.float64)
        kept = torch.where(torch.arange(5)[:, None] == 0, curve.empty, curve.full + 0.5 * noise)
        found = replace(curve, kept=kept).areas()
        held += found["cmd_low"] <= 0.05 + 1e-9 <= found["cmd"]
    assert held >= 90
    clear, _, truth = drawn_curve(generator, 40)
    assert 0.5 * truth["cmd"] < clear.areas()["cmd_low"] < truth["cmd"]


def test_bad_input_is_refused(exact):
    with pytest.raises(InputError, match="count must be at least 1"):
        rank_parts(exact, 0)
    shared = attribute(cases.CASES["directions"]())
    with pytest.raises(InputError, match="they are no nodes"):
        rank_parts(shared, 1)
