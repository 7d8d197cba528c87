"""vg: train models that find what a sentence names in a picture."""
