"""Every rule of traced graphs, fuzzed in ball arithmetic; and with an error planted in it."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from rule_cases import RULES, violations

from assay.bounds.levels import LEVELS

FAST, SLOW = 150, 1600
NO_FLOAT32 = {"softplus", "inverse root", "jump by norm", "largest by norm"}


def seeded(name: str, level: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(f"{name} {level}".encode()))


def levels(name: str) -> list[str]:
    return [level for level in LEVELS if level != "float32" or name not in NO_FLOAT32]


@pytest.mark.parametrize("name", RULES)
def test_a_rule_holds_at_random_points(name: str) -> None:
    for level in levels(name):
        failed, made = violations(name, seeded(name, level), level, FAST)
        assert made >= FAST
        assert failed == 0, level


@pytest.mark.parametrize("name", RULES)
def test_an_error_planted_in_a_rule_is_caught(name: str) -> None:
    failed, _ = violations(name, seeded(name, "real"), "real", 4 * FAST, planted=1e-6)
    assert failed > 0


@pytest.mark.slow
def test_a_hundred_thousand_cases_without_a_violation() -> None:
    total = 0
    for name in RULES:
        for level in levels(name):
            failed, made = violations(name, np.random.default_rng(7), level, SLOW)
            assert failed == 0, (name, level)
            total += made
    assert total >= 100_000
