"""`vg predict`: ground phrases in an image."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

THRESHOLD = 0.3  # boxes with a lower score are not drawn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="folder of a run or checkpoint")
    parser.add_argument("image", help="path or http(s) URL")
    parser.add_argument("phrases", nargs="+", metavar="PHRASE", help='such as "the man in the red shirt"')
    parser.epilog = "KEY=VALUE after the phrases overrides a setting, such as model.vision.id=/new/folder."
    parser.set_defaults(overrides=[])  # filled with those after the options
    parser.add_argument("--threshold", type=float, help="drop boxes with a lower score, 0..1 (default: 0.3)")
    parser.add_argument("--output", default="prediction.png", help="image file to write (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda or mps (default: the fastest available)")


def run(options: argparse.Namespace) -> None:
    from PIL import Image

    from vg.errors import ConfigError, printable
    from vg.inference.draw import COLORS, draw_boxes, save_image
    from vg.inference.grounder import Grounder, above, check_threshold, to_array

    settings = [word for word in options.phrases if re.match(r"model\.[\w.]+=", word)]
    phrases = [word for word in options.phrases if word not in settings]
    for phrase in phrases:
        if phrase.startswith(("http://", "https://")) or (_is_image(phrase) and os.path.isfile(phrase)):
            raise ConfigError(
                f"{phrase} is an image file, not a phrase: vg predict takes one image and then phrases; for several "
                'images, run it in a loop: for image in *.jpg; do vg predict CHECKPOINT "$image" PHRASE; done'
            )
    if os.path.isdir(options.output):
        raise ConfigError(f"--output {options.output} is a folder: name a file in it, such as prediction.png")
    if not _is_image(options.output):
        raise ConfigError(f"--output {options.output} has no suffix of an image format: use .png or .jpg")
    if options.threshold is not None:
        check_threshold(options.threshold, "--threshold")
    grounder = Grounder(options.checkpoint, options.device, overrides=settings + options.overrides)
    image = to_array(options.image)
    prediction = grounder.predict(image, phrases)
    threshold = options.threshold if options.threshold is not None else THRESHOLD * grounder.takes_many
    shown = above(prediction, threshold)
    if not grounder.takes_many:  # one expression names one object
        shown = shown.map(lambda values: values[:1])
    labels, colors = [], []
    for box, score, id in zip(shown.boxes.tolist(), shown.scores.tolist(), shown.phrase_ids.tolist(), strict=True):
        name, (left, top, right, bottom) = printable(shown.phrases[id]), box
        print(f"{name}: left {left:.1f}, top {top:.1f}, right {right:.1f}, bottom {bottom:.1f}, score {score:.2f}")
        labels.append(f"{name} {score:.2f}")
        colors.append(COLORS[id % len(COLORS)])
    if not labels:
        best = f"best: {prediction.scores[0]:.3g}" if len(prediction.scores) else "no box was predicted"
        print(f"no box scores >= {threshold} ({best}); lower --threshold")
    save_image(Image.fromarray(draw_boxes(image, shown.boxes, labels, colors or COLORS)), options.output)
    print(f"drawn in {options.output}")


def _is_image(name: str) -> bool:
    """Whether a file name has the suffix of an image format that can be written."""
    from PIL import Image

    return Image.registered_extensions().get(Path(name).suffix.lower()) in Image.SAVE
