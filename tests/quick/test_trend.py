"""The endurance run's trends: what grows is found, noise and outliers are not."""

from __future__ import annotations

import random

import pytest

from tests.soak.trend import trend_of

TIMES = [20.0 * index for index in range(150)]


@pytest.mark.parametrize("seed", range(8))
def test_noise_with_outliers_does_not_certainly_grow(seed: int) -> None:
    noise = random.Random(seed)
    values = [100 + noise.gauss(0, 5) + (400 if noise.random() < 0.05 else 0) for _ in TIMES]
    trend = trend_of(TIMES, values)
    assert trend.low <= 0 <= trend.high
    assert abs(trend.growth) < 0.03


@pytest.mark.parametrize("per_hour", [10.0, -10.0])
def test_a_slow_leak_under_noise_is_found_with_its_size(per_hour: float) -> None:
    noise = random.Random(1)
    values = [100 + per_hour * at / 3600 + noise.gauss(0, 1) + (50 if noise.random() < 0.05 else 0) for at in TIMES]
    trend = trend_of(TIMES, values)
    assert trend.low < per_hour < trend.high
    assert abs(trend.per_hour - per_hour) < 0.1 * abs(per_hour)
    assert (trend.sure_growth > 0) == (per_hour > 0)


def test_a_count_that_never_changes_has_no_trend() -> None:
    trend = trend_of(TIMES, [17] * len(TIMES))
    assert (trend.per_hour, trend.low, trend.high, trend.growth) == (0.0, 0.0, 0.0, 0.0)
