"""`vg predict`: ground phrases in an image."""

from __future__ import annotations

import argparse

THRESHOLD = 0.3  # boxes with a lower score are not drawn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="folder of a run or checkpoint")
    parser.add_argument("image", help="path or http(s) URL")
    parser.add_argument("phrases", nargs="+", metavar="PHRASE", help='such as "the man in the red shirt"')
    parser.add_argument("--threshold", type=float, help="drop boxes with a lower score, 0..1 (default: 0.3)")
    parser.add_argument("--output", default="prediction.png", help="image file to write (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda or mps (default: the fastest available)")


def run(options: argparse.Namespace) -> None:
    from PIL import Image

    from vg.inference.draw import COLORS, draw_boxes
    from vg.inference.grounder import Grounder, above, check_threshold, to_array

    if options.threshold is not None:
        check_threshold(options.threshold, "--threshold")
    grounder, image = Grounder(options.checkpoint, options.device), to_array(options.image)
    prediction = grounder.predict(image, options.phrases)
    threshold = options.threshold if options.threshold is not None else THRESHOLD * grounder.takes_many
    shown = above(prediction, threshold)
    if not grounder.takes_many:  # one expression names one object
        shown = shown.map(lambda values: values[:1])
    labels, colors = [], []
    for box, score, id in zip(shown.boxes.tolist(), shown.scores.tolist(), shown.phrase_ids.tolist(), strict=True):
        name, (left, top, right, bottom) = shown.phrases[id], box
        print(f"{name}: left {left:.1f}, top {top:.1f}, right {right:.1f}, bottom {bottom:.1f}, score {score:.2f}")
        labels.append(f"{name} {score:.2f}")
        colors.append(COLORS[id % len(COLORS)])
    if not labels:
        best = f"best: {prediction.scores[0]:.3g}" if len(prediction.scores) else "no box was predicted"
        print(f"no box scores >= {threshold} ({best}); lower --threshold")
    Image.fromarray(draw_boxes(image, shown.boxes, labels, colors or COLORS)).save(options.output)
    print(f"drawn in {options.output}")
