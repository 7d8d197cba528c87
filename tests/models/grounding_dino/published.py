"""Tiny random transformers models with the architecture of the published ones, and one input for them and vg."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from vg.models.grounding_dino.config import BertConfig
from vg.models.grounding_dino.model import GroundingDino
from vg.types import Batch, PromptTargets, Text

WORDS = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?", 1030: "cat"}
SWIN = {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 3}
BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 1040,
    "max_position_embeddings": 64,
}
TEXT = BertConfig(architecture={"model_type": "bert", "type_vocab_size": 2} | BERT)
SIZE = (128, 192)  # pixels
IDS = torch.tensor([[101, 1030, 1012, 1031, 1032, 1012, 102]])  # two phrases


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose special tokens have the ids of BERT."""
    words = [WORDS.get(number, f"word{number}") for number in range(BERT["vocab_size"])]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    transformers.BertConfig(**BERT).save_pretrained(folder)


def bert_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Write the tokenizer into a new folder and load it."""
    folder.mkdir()
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def random_model(mm: bool = False, backbone: str = "swin", stages: tuple[int, ...] = (2, 3, 4), **settings: Any) -> Any:
    """GroundingDino, or MMGroundingDino with one head per layer; weights initialized to zero are random, too."""
    torch.manual_seed(0)
    names = [f"stage{stage}" for stage in stages]
    if backbone == "swin":
        vision: Any = transformers.SwinConfig(**SWIN, out_features=names)
    else:
        widths = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 2, 1, 1]}
        vision = transformers.ResNetConfig(**widths, out_features=names)
    values = {
        "backbone_config": vision,
        "text_config": transformers.BertConfig(**BERT),
        "num_queries": 9,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "d_model": 32,
        "num_feature_levels": len(stages) + 1,
    }
    if mm:
        values |= {"decoder_bbox_embed_share": False, "decoder_cls_embed_share": False}
        config: Any = transformers.MMGroundingDinoConfig(**values | settings)
        model: PreTrainedModel = transformers.MMGroundingDinoForObjectDetection(config)
    else:
        model = transformers.GroundingDinoForObjectDetection(transformers.GroundingDinoConfig(**values | settings))
    for weights in model.parameters():
        if weights.dim() > 1:
            nn.init.xavier_uniform_(weights)
        else:
            nn.init.uniform_(weights, 0.5, 1.0) if (weights == 1).all() else nn.init.uniform_(weights, -0.3, 0.3)
    for name, statistics in model.named_buffers():
        if "running_" in name:
            nn.init.uniform_(statistics, 0.5, 1.5)
    return model.eval()


def pixels() -> Tensor:
    return torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def output_of_transformers(model: Any) -> tuple[Tensor, Tensor]:
    """Logits [1, Q, T] and boxes [1, Q, 4]."""
    output = model(pixel_values=pixels(), input_ids=IDS, attention_mask=torch.ones_like(IDS))
    return output.logits[..., : IDS.shape[1]], output.pred_boxes


@torch.no_grad()
def output_of_vg(model: GroundingDino) -> tuple[Tensor, Tensor]:
    """Logits [1, Q, T] and boxes [1, Q, 4]."""
    mask = torch.ones_like(IDS, dtype=torch.bool)
    text = Text(IDS, mask, mask.unsqueeze(1), torch.zeros(1, dtype=torch.int64))
    output = model(Batch(pixels(), (SIZE,), text, [], PromptTargets.without_boxes(text), torch.arange(1)))
    return output.logits[-1], output.boxes[-1]
