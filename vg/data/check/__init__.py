"""`vg check`: validates datasets before training and reports what is wrong, where, and how to fix it."""

from __future__ import annotations

from vg.data.check.diagnosis import Diagnosis, diagnose
from vg.data.check.formats import detect_format
from vg.data.check.report import to_json, to_text

__all__ = ["Diagnosis", "detect_format", "diagnose", "to_json", "to_text"]
