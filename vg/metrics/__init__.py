"""What the answers of a model are worth."""

from vg.metrics.coco import CocoMetric
from vg.metrics.grec import GrecMetric
from vg.metrics.rec import RecMetric

__all__ = ["CocoMetric", "GrecMetric", "RecMetric"]
