"""The doctor: looks through data before a run does, and says what will go wrong, where, and how to mend it."""

from __future__ import annotations

from vg.data.doctor.diagnosis import Diagnosis, diagnose
from vg.data.doctor.recognise import recognise
from vg.data.doctor.report import to_json, to_text

__all__ = ["Diagnosis", "diagnose", "recognise", "to_json", "to_text"]
