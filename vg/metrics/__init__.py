"""Metrics of referring expressions, generalized expressions and detection."""

from vg.metrics.coco import CocoMetric
from vg.metrics.federated import FederatedMetric
from vg.metrics.grec import GrecMetric
from vg.metrics.rec import RecMetric

__all__ = ["CocoMetric", "FederatedMetric", "GrecMetric", "RecMetric"]
