"""The tokenizer of a checkpoint; a .pth contains none."""

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


def open_tokenizer(checkpoint: Checkpoint, path: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer at `path` (folder, vocab.txt, tokenizer.json or Hub id), else the checkpoint's, else BERT's.

    Raises:
        CheckpointError: it cannot be loaded, or does not fit the text encoder of the checkpoint.
    """
    path = path or checkpoint.tokenizer or str(BertConfig().id)
    advice = "pass the folder or Hub id of the BERT that the model was trained with: --tokenizer"
    try:
        tokenizer = load_tokenizer(replace(checkpoint.config.text, tokenizer=path))
    except Exception as error:  # no such file, no network, no vocabulary in it: each has its own exception class
        raise CheckpointError(f"cannot load a tokenizer from {path}; {advice}\n({error})") from error
    rows = (checkpoint.config.text.architecture or {})["vocab_size"]
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) > rows or not {"[CLS]", "[SEP]", "."} <= vocabulary.keys():
        raise CheckpointError(
            f"the tokenizer of {path} has {len(vocabulary)} tokens and does not fit this checkpoint, whose text "
            f"encoder has {rows}; {advice}"
        )
    return tokenizer


def bert_settings(path: str | None) -> dict[str, Any]:
    """Read the config.json of BERT in the folder of its tokenizer; empty if there is none."""
    file = Path(path or "") / "config.json"
    return json.loads(file.read_text(encoding="utf-8")) if path and file.exists() else {}
