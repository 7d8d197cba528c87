"""Comparisons of positions and sizes in scenes, with margins under which they are ambiguous."""

from __future__ import annotations

import math

from vg.data.synthetic.layout import AnyScene, Object

DIRECTIONS = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis (x, y) and sign
POSITION_LEAD = 0.10  # "leftmost": minimum distance to the runner-up, as a fraction of the image side
SIZE_LEAD = math.log(1.25)  # "largest": at least 1.25 times the runner-up (per side)
RELATION_LEAD = 0.12  # "left of": minimum distance of the target from the anchor on that side ...
RELATION_REFUSAL = 0.04  # ... and of all other candidates on the opposite side, as fractions of the image side
NEAR_RATIO = 1.75  # "closest to": the runner-up is at least this many times further away


def precedes(order: str, item: Object, other: Object, scene: AnyScene[Object]) -> bool:
    """Whether an object precedes another with a sufficient margin, and its outer edge does so too."""
    lead = lead_of(order, item, other, scene)
    if order not in DIRECTIONS:
        return lead >= SIZE_LEAD * scene.margin
    axis, sign = DIRECTIONS[order]
    edge = axis if sign < 0 else axis + 2  # its index in a box
    return lead >= POSITION_LEAD * scene.margin and sign * (item.box[edge] - other.box[edge]) >= 0


def lead_of(order: str, item: Object, other: Object, scene: AnyScene[Object]) -> float:
    """Return how far an object precedes another: a fraction of the image side, or the log ratio of sizes
    (side lengths of squares with the same area), the least one of all areas."""
    if order in DIRECTIONS:
        axis, sign = DIRECTIONS[order]
        return sign * (item.center[axis] - other.center[axis]) / scene.size
    larger = [math.log(own / area) / 2 for own, area in zip(item.areas, other.areas, strict=True)]
    return min(larger) if order == "larger" else -max(larger)


def related(relation: str, candidates: list[Object], anchor: Object, scene: AnyScene[Object]) -> Object | None:
    """Return the only candidate in the relation to the anchor; None if that is ambiguous for any candidate."""
    if relation == "near":
        first, second = sorted(candidates, key=anchor.distance)[:2]
        ratio = anchor.distance(second) / anchor.distance(first)
        return first if ratio >= NEAR_RATIO**scene.margin else None
    leads = {item: lead_of(relation, item, anchor, scene) for item in candidates}
    first = max(candidates, key=leads.__getitem__)
    clear = all(lead <= -RELATION_REFUSAL * scene.margin for item, lead in leads.items() if item is not first)
    return first if clear and leads[first] >= RELATION_LEAD * scene.margin else None


def all_opposite(relation: str, candidates: list[Object], anchor: Object, scene: AnyScene[Object]) -> bool:
    """Whether all candidates are clearly on the other side of the anchor."""
    return all(lead_of(relation, item, anchor, scene) <= -RELATION_LEAD * scene.margin for item in candidates)
