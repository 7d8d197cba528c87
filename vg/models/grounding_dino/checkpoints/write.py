"""Writing weights of vg in the dialects of other implementations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vg.errors import CheckpointError
from vg.models.grounding_dino.checkpoints.layout import to_file
from vg.models.grounding_dino.checkpoints.names import tensor_names
from vg.models.grounding_dino.checkpoints.table import Foreign
from vg.models.grounding_dino.checkpoints.variant import LABELS
from vg.models.grounding_dino.config import GroundingDinoConfig, SwinConfig


def write_checkpoint(
    weights: Mapping[str, Tensor],
    config: GroundingDinoConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    out: Path,
    dialect: Foreign,
) -> None:
    """Write what `read_checkpoint` and the implementation in question can open.

    Args:
        weights: by the names of vg.
        config: as `read_checkpoint` gives it, with the sizes of the text encoder.
        tokenizer: for the transformers dialect; the others keep none.
        out: an existing empty folder for transformers, else the .pth to write (see `vg.checkpoint.replacing`).

    Raises:
        CheckpointError: the dialect cannot express this model, or the weights are not those of `config`.
    """
    reason = _why_not(config, dialect)
    if reason:
        raise CheckpointError(f"the {dialect} dialect has no {reason}")
    tensors: dict[str, Tensor] = {}
    left = set(weights) - {LABELS}  # which is for training alone, and optional everywhere
    for own, names in tensor_names(config, dialect).items():
        if own == (LABELS,) and LABELS not in weights:
            continue
        if not left.issuperset(own) and own != (LABELS,):
            absent = ", ".join(name for name in own if name not in weights)
            raise CheckpointError(f"the weights lack {absent}; was it frozen, and so not saved with the checkpoint?")
        left -= set(own)
        tensor = to_file(own, [weights[name].detach().cpu() for name in own], dialect)
        # transformers ties the copies of shared heads itself; elsewhere a file holds each name.
        tensors |= dict.fromkeys(names[:1] if dialect == "transformers" else names, tensor)
    if left:
        raise CheckpointError(f"the {dialect} dialect has no place for {', '.join(sorted(left))}")
    if dialect == "official":
        torch.save({"model": tensors}, out)
    elif dialect == "mmdet":
        torch.save({"state_dict": tensors, "meta": {}}, out)
    else:
        if tokenizer is None:
            raise CheckpointError("a folder of transformers needs a tokenizer")
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        _write_settings(config, next(iter(tensors.values())).dtype, tokenizer, out)


def _why_not(config: GroundingDinoConfig, dialect: Foreign) -> str | None:
    """What of a model a dialect has no words for."""
    classes = config.classes
    if config.fusion != "bidirectional":
        return f"{config.fusion} fusion (model.fusion)"
    if classes.similarity != "dot":
        return f"{classes.similarity} similarity (model.classes.similarity)"
    known = {"official": [("one", False)], "transformers": [("one", False), ("width", True)]}
    known["mmdet"] = [*known["transformers"], ("learned", False), ("learned", True)]
    if (classes.scale, classes.bias) not in known[dialect]:
        bias = "with a bias" if classes.bias else "without a bias"
        return f"class logits of scale `{classes.scale}` {bias} (model.classes)"
    if dialect == "transformers" and config.position_temperature != int(config.position_temperature):
        return f"position temperature {config.position_temperature} (model.position_temperature), but whole numbers"
    if dialect != "transformers" and (config.points, config.position_temperature) != (4, 20):
        return "place for a number of points or a position temperature, which are always 4 and 20 (model.points)"
    return None


def _write_settings(
    config: GroundingDinoConfig, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase, out: Path
) -> None:
    """config.json, and the files of the processor and the tokenizer."""
    import transformers

    stages = {"depths": config.backbone.depths, "out_features": [f"stage{stage}" for stage in config.backbone.stages]}
    if isinstance(config.backbone, SwinConfig):
        backbone = transformers.SwinConfig(
            embed_dim=config.backbone.width,
            num_heads=config.backbone.heads,
            window_size=config.backbone.window,
            drop_path_rate=config.backbone.drop_path,
            **stages,
        )
    else:
        backbone = transformers.ResNetConfig(hidden_sizes=config.backbone.widths, **stages)
    biased = config.classes.bias
    family = transformers.MMGroundingDinoConfig if biased else transformers.GroundingDinoConfig
    settings = family(
        backbone_config=backbone,
        text_config=transformers.BertConfig(**(config.text.architecture or {})),
        num_queries=config.num_queries,
        encoder_layers=config.encoder_layers,
        encoder_ffn_dim=config.feedforward,
        encoder_attention_heads=config.heads,
        encoder_n_points=config.points,
        decoder_layers=config.decoder_layers,
        decoder_ffn_dim=config.feedforward,
        decoder_attention_heads=config.heads,
        decoder_n_points=config.points,
        d_model=config.width,
        num_feature_levels=config.levels,
        dropout=config.dropout,
        fusion_dropout=config.fusion_dropout,
        fusion_droppath=config.fusion_drop_path,
        max_text_len=config.max_tokens,
        positional_embedding_temperature=int(config.position_temperature),
        decoder_bbox_embed_share=config.shared_heads,
        **({"decoder_cls_embed_share": config.shared_heads} if biased else {}),
        architectures=[("MM" if biased else "") + "GroundingDinoForObjectDetection"],
        dtype=dtype,
    )
    settings.save_pretrained(out)
    image_processor = transformers.GroundingDinoImageProcessorPil(
        size={"shortest_edge": config.image.shortest, "longest_edge": config.image.longest}
    )
    transformers.GroundingDinoProcessor(image_processor, tokenizer).save_pretrained(out)
