"""Whether a series of measurements grows: a slope that outliers don't move, and how sure it is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Trend", "trend_of"]

_Z = 2.58  # 99 %


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """The trend of a series.

    Attributes:
        median: of the values.
        per_hour: Theil-Sen slope, the median of the slopes between all pairs of points.
        low: lower end of its 99 % confidence interval (Sen 1968).
        high: upper end.
        growth: change over the whole series, by the slope, as a share of the median.
        sure_growth: the same by the lower end; above 0 only if the series certainly grows.
    """

    median: float
    per_hour: float
    low: float
    high: float
    growth: float
    sure_growth: float


def trend_of(times_s: Sequence[float], values: Sequence[float]) -> Trend:
    """The trend of ``values`` at ``times_s``, at least two of them, in order of time.

    Examples:
        >>> flat = trend_of(range(8), [5, 5, 9, 5, 5, 5, 1, 5])
        >>> flat.median, flat.growth
        (5.0, 0.0)
        >>> round(trend_of(range(11), [100 + each for each in range(11)]).growth, 3)
        0.095
    """
    points = list(zip(times_s, values, strict=True))
    slopes = sorted(
        (later[1] - earlier[1]) / (later[0] - earlier[0])
        for index, earlier in enumerate(points)
        for later in points[index + 1 :]
        if later[0] > earlier[0]
    )
    n = len(points)
    spread = _Z * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    low = slopes[max(0, round((len(slopes) - spread) / 2))]
    high = slopes[min(len(slopes) - 1, round((len(slopes) + spread) / 2))]
    slope, median = statistics.median(slopes), statistics.median(map(float, values))
    duration_s = times_s[-1] - times_s[0]
    scale = duration_s / median if median else 0.0
    return Trend(
        median=median,
        per_hour=slope * 3600,
        low=low * 3600,
        high=high * 3600,
        growth=slope * scale,
        sure_growth=low * scale,
    )
