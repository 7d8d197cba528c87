"""Settings of encoders from transformers, shared by all families."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vg.settings import Settings

TINY_BERT: dict[str, Any] = {  # text encoder of the `tiny()` presets, for vg's small vocabulary
    **{"model_type": "bert", "vocab_size": 400, "max_position_embeddings": 64},
    **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
    **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


@dataclass
class EncoderConfig(Settings):
    """Source of an encoder: a Hub id or a local folder, or (with ``architecture``) random weights."""

    id: str | None = None
    """Hub id or local folder of a pretrained model."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    architecture: dict[str, Any] | None = None
    """Arguments of the transformers configuration including `model_type`: random weights instead of those of `id`."""
    frozen: bool = True
    """Frozen encoders run in evaluation mode without gradients; in rec, one with an `id` is not saved with checkpoints
    and loads its weights when it is first used."""

    def __post_init__(self) -> None:
        if self.architecture is None:
            if self.id is None:
                raise ValueError("give `id` (pretrained weights) or `architecture` (random weights)")
            return
        if "model_type" not in self.architecture:
            raise ValueError("`architecture` needs `model_type`, for example dinov3_vit or bert")
        if self.id not in (None, type(self).id):
            raise ValueError("give `id` (pretrained weights) or `architecture` (random weights), not both")
        self.id = None


@dataclass
class TextEncoderConfig(EncoderConfig):
    tokenizer: str | None = None
    """Hub id, local folder, tokenizer.json or vocab.txt; by default that of `id`, or vg's own small vocabulary."""
