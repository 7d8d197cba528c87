"""Write weights of vg in the formats of other implementations."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import fields
from itertools import chain
from operator import attrgetter
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vg.errors import CheckpointError
from vg.models.grounding_dino.checkpoints.names import CheckpointFormat, Foreign, on_meta, tensor_names, to_file
from vg.models.grounding_dino.checkpoints.variant import LABELS, LOGIT_EPS
from vg.models.grounding_dino.config import GroundingDinoConfig, PredictConfig
from vg.types import ImageSpec

# Ids of [CLS], [SEP], "." and "?" in bert-base-uncased: constants of transformers, which splits prompts at them.
DELIMITER_IDS = [101, 102, 1012, 1029]


def write_checkpoint(
    weights: Mapping[str, Tensor],
    config: GroundingDinoConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    out: Path,
    format: Foreign,
) -> None:
    """Write a checkpoint that the other implementation, and `read_checkpoint`, can load.

    Args:
        weights: by their names in vg.
        config: as from `read_checkpoint`, with the sizes of the text encoder.
        tokenizer: for the transformers format; the other formats contain none.
        out: an existing empty folder for transformers, else the .pth to write (see `vg.files.replacing`).

    Raises:
        CheckpointError: the format does not support this model or tokenizer, or the weights do not fit `config`.
    """
    names = tensor_names(on_meta(config), format)
    if LABELS not in weights:  # needed in training only, and optional everywhere
        names.pop((LABELS,), None)
    absent = [name for own in names for name in own if name not in weights]
    surplus = weights.keys() - set(chain((LABELS,), *names))
    unsupported = _unsupported(config, format) or ", ".join(sorted(surplus))
    if unsupported:
        raise CheckpointError(f"the {format} format does not support {unsupported}")
    if absent:
        raise CheckpointError(f"the weights lack {absent[0]}; frozen encoders are not saved with a checkpoint")
    if format == "transformers":
        _check_tokenizer(tokenizer)
    tensors: dict[str, Tensor] = {}
    for own, foreign in names.items():
        tensor = to_file(own, [weights[name].detach().cpu() for name in own], format)
        # transformers ties shared heads when it loads them; files of the other formats contain every name.
        tensors |= dict.fromkeys(foreign[:1] if format == "transformers" else foreign, tensor)
    if format == "official":
        torch.save({"model": tensors}, out)
    elif format == "mmdet":
        torch.save({"state_dict": tensors, "meta": {}}, out)
    else:
        assert tokenizer is not None
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        _write_settings(config, next(iter(tensors.values())).dtype, tokenizer, out)
        shutil.copymode(out / "config.json", out / "model.safetensors")  # safetensors ignores the umask


def _unsupported(config: GroundingDinoConfig, format: Foreign) -> str | None:
    """Return the first feature of a model that the format does not support, or None."""
    classes = config.classes
    if config.fusion != "bidirectional":
        return f"{config.fusion} fusion (model.fusion)"
    if classes.similarity != "dot":
        return f"{classes.similarity} similarity (model.classes.similarity)"
    known = {"official": [("one", False)], "transformers": [("one", False), ("width", True)]}
    known["mmdet"] = [*known["transformers"], ("learned", False), ("learned", True)]
    if (classes.scale, classes.bias) not in known[format]:
        bias = "with a bias" if classes.bias else "without a bias"
        return f"class logits of scale `{classes.scale}` {bias} (model.classes)"
    if format == "transformers" and config.position_temperature != int(config.position_temperature):
        return f"position temperature {config.position_temperature} (model.position_temperature): it must be an integer"
    image = config.image
    if format != "transformers" and (image.mean, image.std) != (ImageSpec.mean, ImageSpec.std):
        return "model.image.mean or std other than those of ImageNet"
    if format != "transformers" and (config.points, config.position_temperature) != (4, 20):
        return "model.points other than 4 or model.position_temperature other than 20"
    return None


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raise CheckpointError unless transformers would split the prompts of this tokenizer where vg does."""
    if tokenizer is None:
        raise CheckpointError("a transformers folder needs a tokenizer")
    ids = tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]", ".", "?"])
    if ids != DELIMITER_IDS:
        raise CheckpointError(
            f"the transformers format does not support this vocabulary: transformers splits prompts at the token ids "
            f"{DELIMITER_IDS} of bert-base-uncased, but [CLS], [SEP], '.' and '?' of the tokenizer are {ids}, so its "
            "predictions would be wrong. Write another format: official and mmdetection read the ids from the "
            "tokenizer of their text encoder"
        )


def not_stored(config: GroundingDinoConfig, format: CheckpointFormat) -> list[str]:
    """List the settings of predictions that are lost in this format, because they differ from what vg assumes.

    Those of training, such as dropout and denoising, are of a recipe and not of the model.
    """
    if format == "vg":
        return []
    assumed = GroundingDinoConfig(logit_eps=LOGIT_EPS[format])
    names = ["logit_eps", "image.mix_sizes", *(f"predict.{setting.name}" for setting in fields(PredictConfig))]
    if format != "transformers":
        names += ["image.shortest", "image.longest", "max_tokens"]
    pairs = ((name, attrgetter(name)(config), attrgetter(name)(assumed)) for name in names)
    return [f"model.{name}={own} (vg assumes {other})" for name, own, other in pairs if own != other]


def _write_settings(
    config: GroundingDinoConfig, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase, out: Path
) -> None:
    """Write config.json, and the files of the processor and the tokenizer."""
    import transformers

    biased = config.classes.bias
    family = transformers.MMGroundingDinoConfig if biased else transformers.GroundingDinoConfig
    settings = family(
        backbone_config=config.backbone.transformers_config(),
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
        size={"shortest_edge": config.image.shortest, "longest_edge": config.image.longest},
        image_mean=config.image.mean,
        image_std=config.image.std,
    )
    transformers.GroundingDinoProcessor(image_processor, tokenizer).save_pretrained(out)
