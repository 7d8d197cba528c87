"""The RefCOCO benchmark: any checkpoint on the official splits, beside published numbers."""
