"""Checkpoints of Grounding DINO in four formats: official, transformers, mmdetection and vg.

names.py lists the name of every weight in all formats. Reading detects format and variant from the tensors, and
raises if a tensor is missing or unknown.
"""

from vg.models.grounding_dino.checkpoints.load import bert_settings, load_into, open_tokenizer
from vg.models.grounding_dino.checkpoints.names import CheckpointFormat
from vg.models.grounding_dino.checkpoints.read import Checkpoint, read_checkpoint
from vg.models.grounding_dino.checkpoints.write import not_stored, write_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointFormat",
    "bert_settings",
    "load_into",
    "not_stored",
    "open_tokenizer",
    "read_checkpoint",
    "write_checkpoint",
]
