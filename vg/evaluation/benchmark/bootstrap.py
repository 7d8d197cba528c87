"""Bootstrap confidence intervals of metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

DRAWS = 1000
LEVEL = 0.95
SEED = 0


def intervals(values: Mapping[str, np.ndarray], image_keys: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Compute 95 % bootstrap confidence intervals of means (percentile method, Efron 1979).

    Whole images are drawn: expressions of one image are not independent, and drawing single expressions would give
    intervals that are too narrow.

    Args:
        values: name -> [E], whose mean is the metric; NaN values are ignored.
        image_keys: E keys; expressions of one image have the same key.

    Returns:
        name -> (low, high), without the metrics whose values are all of one image.
    """
    _, image = np.unique(np.asarray(image_keys), return_inverse=True)  # [E] -> 0..I-1
    count = int(image.max()) + 1
    generator = np.random.default_rng(SEED)
    draws = generator.multinomial(count, np.full(count, 1 / count), size=DRAWS).astype(np.float64)  # [DRAWS, I]
    found = {}
    for name, column in values.items():
        known = ~np.isnan(column)
        if len(np.unique(image[known])) > 1:
            sums = np.bincount(image[known], column[known], minlength=count)  # [I]
            counts = np.bincount(image[known], minlength=count)  # [I]
            weight = draws @ counts  # [DRAWS]
            means = (draws @ sums)[weight > 0] / weight[weight > 0]
            low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
            found[name] = (float(low), float(high))
    return found
