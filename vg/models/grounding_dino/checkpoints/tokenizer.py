"""The vocabulary that belongs to a checkpoint, which a .pth does not hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from vg.errors import CheckpointError
from vg.models.encoders import load_tokenizer
from vg.models.grounding_dino.checkpoints.read import Checkpoint
from vg.models.grounding_dino.config import BertConfig


def open_tokenizer(checkpoint: Checkpoint, place: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer at `place` (folder, vocab.txt, tokenizer.json or Hub id), or else the checkpoint's, or BERT's.

    Raises:
        CheckpointError: there is none, or it is not that of the checkpoint's text encoder.
    """
    place = place or checkpoint.tokenizer or str(BertConfig().id)
    advice = "name the folder or Hub id of the BERT that the model was trained with: --tokenizer"
    try:
        tokenizer = load_tokenizer(replace(checkpoint.config.text, tokenizer=place))
    except Exception as error:  # no such file, no network, no vocabulary in it: each has a class of its own
        raise CheckpointError(f"no tokenizer can be loaded from {place}; {advice}\n({error})") from error
    rows = (checkpoint.config.text.architecture or {})["vocab_size"]
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) > rows or not {"[CLS]", "[SEP]", "."} <= vocabulary.keys():
        raise CheckpointError(
            f"the tokenizer of {place} has {len(vocabulary)} words and is not that of this checkpoint, whose text "
            f"encoder knows {rows}; {advice}"
        )
    return tokenizer


def bert_settings(place: str | None) -> dict[str, Any]:
    """The configuration of BERT that lies beside its tokenizer, if there is one."""
    path = Path(place or "") / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if place and path.exists() else {}
