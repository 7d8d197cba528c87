"""Correct the text positions of Grounding DINO in transformers 5.17 and others before 5.23, to compare equal models.

There the delimiter that ends a phrase has position 0, and the sines of text positions are rounded to integers, so all
outputs differ from those of the published models.
"""

from __future__ import annotations

import functools
import inspect
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

FUNCTION, SINES = "generate_masks_with_special_tokens_and_transfer_map", "encode_sinusoidal_position_embedding"
PROMPT = (101, 2000, 2001, 1012, 2002, 1012, 102)  # [CLS] two words . one word . [SEP]
POSITIONS = [0, 0, 1, 2, 0, 1, 0]


def correct_text_positions(module: ModuleType) -> bool:
    """Replace both functions of `modeling_grounding_dino` if its positions are wrong; return whether they were."""
    original, sines = getattr(module, FUNCTION), getattr(module, SINES)
    special = torch.tensor([101, 102, 1012, 1029])
    arguments = (torch.tensor([PROMPT]), special)[: len(inspect.signature(original).parameters)]
    if original(*arguments)[1].tolist() == [POSITIONS]:
        return False

    @functools.wraps(original)
    def corrected(*inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
        mask, _ = original(*inputs, **options)  # [B, T, T] bool: tokens of the same phrase
        return mask, mask.tril(-1).sum(dim=-1)  # [B, T]: tokens of the phrase before this one

    @functools.wraps(sines)
    def corrected_sines(positions: Tensor, *inputs: Any, **options: Any) -> Tensor:
        # The result has the dtype of the positions, and those of text are integers.
        return sines(positions if positions.is_floating_point() else positions.float(), *inputs, **options)

    setattr(module, FUNCTION, corrected)
    setattr(module, SINES, corrected_sines)
    print("corrected the text positions of this version of transformers, which are wrong before 5.23", flush=True)
    return True
