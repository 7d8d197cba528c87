"""RefCOCO, RefCOCO+ and RefCOCOg: every referring expression is one sample."""

from vg.data.refcoco_rows import samples_of

__all__ = ["samples_of"]
