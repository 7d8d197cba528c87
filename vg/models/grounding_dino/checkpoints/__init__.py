"""Checkpoints of Grounding DINO in the dialects they are published in: official, transformers, mmdetection and vg.

table.py holds every name, layout.py the few tensors that are also laid out differently. Reading recognises dialect and
variant from the tensors themselves and fails unless each of them is accounted for.
"""

from vg.models.grounding_dino.checkpoints.load import load_into, open_model
from vg.models.grounding_dino.checkpoints.read import Checkpoint, read_checkpoint
from vg.models.grounding_dino.checkpoints.table import Dialect
from vg.models.grounding_dino.checkpoints.tokenizer import bert_settings, open_tokenizer
from vg.models.grounding_dino.checkpoints.write import write_checkpoint

__all__ = [
    "Checkpoint",
    "Dialect",
    "bert_settings",
    "load_into",
    "open_model",
    "open_tokenizer",
    "read_checkpoint",
    "write_checkpoint",
]
