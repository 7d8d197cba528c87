"""How certain a number is: what it would have been on other pictures of the same kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

DRAWS = 1000
LEVEL = 0.95
SEED = 0


def intervals(values: Mapping[str, np.ndarray], pictures: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Bootstrap intervals of means (percentiles, Efron 1979) that hold the true value in 95 of 100 cases.

    Whole pictures are drawn: the expressions of one picture are no independent observations, and drawing them one by
    one would give intervals that are too narrow.

    Args:
        values: name -> [E], whose mean is the number; NaN counts in neither way.
        pictures: E keys.

    Returns:
        name -> (low, high); nothing where all values are of one picture, which tells nothing about others.
    """
    _, picture = np.unique(np.asarray(pictures), return_inverse=True)  # [E] -> 0..I-1
    count = int(picture.max()) + 1
    generator = np.random.default_rng(SEED)
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=DRAWS).astype(np.float64)  # [DRAWS, I]
    found = {}
    for name, each in values.items():
        known = ~np.isnan(each)
        if len(np.unique(picture[known])) > 1:
            sums = np.bincount(picture[known], each[known], minlength=count)  # [I]
            sizes = np.bincount(picture[known], minlength=count)
            weight = drawn @ sizes
            means = (drawn @ sums)[weight > 0] / weight[weight > 0]
            low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
            found[name] = (float(low), float(high))
    return found
