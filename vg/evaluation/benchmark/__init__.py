"""The RefCOCO benchmark: any checkpoint on the official splits, next to published results."""
