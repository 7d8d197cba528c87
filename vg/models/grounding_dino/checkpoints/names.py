"""The names of all weights of a variant in a dialect: the rows of the table, repeated for its layers."""

from __future__ import annotations

import re
from collections.abc import Iterator

from vg.models.grounding_dino.checkpoints.table import TABLE, Dialect, Foreign, Section
from vg.models.grounding_dino.config import GroundingDinoConfig, SwinConfig

Loop = list[dict[str, int]]


def tensor_names(config: GroundingDinoConfig, dialect: Foreign) -> dict[tuple[str, ...], list[str]]:
    """Map the names of all weights of a variant to their names in a dialect.

    Returns:
        names in vg -> all names of the same tensor in the dialect, the most common first; empty if the dialect has no
        such weight. Several names in vg are row blocks of one tensor of the dialect, from top to bottom.
    """
    found: dict[tuple[str, ...], list[str]] = {}
    repetitions = repeats(config)
    for section in TABLE:
        for own, theirs in _rows(section, dialect):
            for numbers in repetitions[section.loop]:
                names = found.setdefault(tuple(name.format(**numbers) for name in own), [])
                if theirs is not None:
                    names.append(theirs.format(**numbers))
    return found


def patterns(dialect: Dialect) -> dict[str, str]:
    """Map names in vg to names in the dialect, with placeholders like {stage}; merged tensors by their first name."""
    if dialect == "vg":
        return {name: name for section in TABLE for own, _ in _rows(section, "official") for name in own}
    rows = [row for section in reversed(TABLE) for row in _rows(section, dialect)]
    return {own[0]: theirs for own, theirs in rows if theirs is not None}


def _rows(section: Section, dialect: Foreign) -> Iterator[tuple[tuple[str, ...], str | None]]:
    """Yield (names in vg, name in the dialect or None), with placeholders such as {stage}."""
    for row in section.rows.strip().splitlines():
        vg, *others = row.split()
        word = dict(zip(("official", "transformers", "mmdet"), others or 3 * ["="], strict=True))[dialect]
        for end in {"*": ("weight", "bias"), "+": ("weight", "bias", "running_mean", "running_var")}.get(vg[-1], ("",)):
            own = [section.vg + part for part in _alternatives(vg.rstrip("*+") + end)]
            if word == "-":
                yield tuple(own), None
                continue
            theirs = _alternatives((vg if word == "=" else word).rstrip("*+") + end)
            prefix: str = getattr(section, dialect)
            if len(theirs) == len(own):
                yield from (((name,), prefix + other) for name, other in zip(own, theirs, strict=True))
            else:
                yield tuple(own), prefix + theirs[0]


def _alternatives(word: str) -> list[str]:
    """a.b|c.d -> a.b.d, a.c.d"""
    found = re.search(r"\w+(\|\w+)+", word)
    return [word.replace(found[0], part) for part in found[0].split("|")] if found else [word]


def repeats(config: GroundingDinoConfig) -> dict[str, Loop]:
    """Return, for every loop of the table, the values of its placeholders, one dict per repetition."""
    backbone = config.backbone
    swin = isinstance(backbone, SwinConfig)
    stages = [{"stage": stage, "number": stage + 1} for stage in range(len(backbone.depths))]
    blocks = [{**stage, "block": block} for stage in stages for block in range(backbone.depths[stage["stage"]])]
    heads = [{"head": 0 if config.shared_heads else i, "layer": i} for i in range(config.decoder_layers)]
    text_layers = (config.text.architecture or {}).get("num_hidden_layers", 12)
    own_levels = len(backbone.stages)
    once: Loop = [{"decoder_layers": config.decoder_layers}]
    biased, scaled = config.classes.bias, config.classes.scale == "learned"
    return {
        "model": once,
        "class bias": once if biased else [],
        "class scale": once if scaled else [],
        "box head": heads,
        "class head bias": heads if biased else [],
        "class head scale": heads if scaled else [],
        "denoising": once if config.denoising else [],
        "decoder layer": [{"layer": i} for i in range(config.decoder_layers)],
        "encoder layer": [{"layer": i} for i in range(config.encoder_layers)],
        "text layer": [{"layer": i} for i in range(text_layers)],
        "level": [{"level": i} for i in range(own_levels)],
        "extra level": [{"level": i, "extra": i - own_levels} for i in range(own_levels, config.levels)],
        "swin": once if swin else [],
        "swin block": blocks if swin else [],
        "swin merge": stages[:-1] if swin else [],
        "swin output": [stage for stage in stages if stage["number"] in backbone.stages] if swin else [],
        "resnet": [] if swin else once,
        "resnet block": [] if swin else blocks,
        "resnet stage": [] if swin else stages,
    }
