"""`vg predict`: find what phrases name in images, and draw, crop or list it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from vg.cli.arguments import (
    MODEL_HELP,
    WordsAction,
    add_model_overrides,
    add_prediction,
    add_runtime,
    check_prediction,
    open_grounder,
)
from vg.errors import ConfigError, printable

if TYPE_CHECKING:
    from vg.inference.grounder import Grounder
    from vg.inference.result import Result

SOME_FAILED = 3  # exit status: images were left out, the results of the others are written
SETTINGS = (  # that determine the results, beside model and phrases
    *("overrides", "tokenizer", "threshold", "nms", "tile", "overlap", "masks", "dtype", "every", "crops"),
    "no_draw",
)
EPILOG = """
INPUT is an image, a folder, a pattern such as 'photos/*.jpg', a video, a URL, a COCO json file, a dataset of the Hub
(hf://datasets/ORG/NAME:SPLIT), or - for a list of them on standard input. One image is drawn in prediction.png; the
results of several go to the folder predictions/, which a repeated command completes. Exit status: 0 done, 1 error,
2 wrong usage, 3 some images were unusable.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from vg.inference.formats import FORMATS

    parser.epilog = EPILOG
    parser.add_argument("checkpoint", metavar="MODEL", help=f"{MODEL_HELP}, or .onnx file of vg export")
    words = "images; without -p images to search for the classes of the model, or one image and then the phrases"
    parser.add_argument("words", nargs="+", action=WordsAction, metavar="INPUT", help=words)
    add_model_overrides(parser)
    add = parser.add_argument
    add("-p", "--phrases", nargs="+", action=WordsAction, metavar="PHRASE", help='such as "the man in the red shirt"')
    add_prediction(parser)
    add("--tile", type=int, metavar="PIXELS", help="also search tiles of this side, for small objects in large images")
    add("--overlap", type=float, default=0.2, help="minimum fraction that neighboring tiles share (default: 0.2)")
    add("--masks", action="store_true", help="also segment every box with SAM")
    add("--mask-model", metavar="ID", help="segment with this SAM or SAM 2")
    add("--output", help="image file for one image (default: prediction.png), else folder (default: predictions)")
    add("--format", choices=FORMATS, action="append", help="also write the results in this format; may be repeated")
    add("--crops", action="store_true", help="also write every box as an image")
    add("--no-draw", action="store_true", help="do not write images with boxes")
    add("--json", action="store_true", help="print one JSON record per image on standard output, and nothing else")
    add("--every", type=int, default=1, metavar="N", help="use every N-th frame of a video")
    add("--overwrite", action="store_true", help="replace the results in the output folder")
    add_runtime(parser)


def run(options: argparse.Namespace) -> None:
    from vg.inference.arguments import checked_phrases
    from vg.inference.images import is_single

    words = options.words
    options.masks = options.mask_model or options.masks
    inputs, phrases = (words, options.phrases) if options.phrases else _taken_apart(words)
    if phrases:
        checked_phrases(phrases)  # before a model is loaded
    check_prediction(options)
    to_folder = options.crops or options.format or (options.output and not _is_file(options.output))
    if inputs == ["-"]:
        inputs = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    elif len(inputs) == 1 and is_single(inputs[0]) and not (to_folder or options.json):
        return _draw_one(inputs[0], phrases, options)
    if options.output and _is_file(options.output):
        needing = "several images, --json, --crops and --format need a folder"
        raise ConfigError(f"--output {options.output}: {needing}, such as predictions")
    grounder, wanted = _opened(options, phrases)
    num_failed = (_print_records if options.json and not to_folder else _fill_folder)(grounder, inputs, wanted, options)
    if num_failed:
        print(f"{num_failed} image{'s' * (num_failed > 1)} could not be used, see above", file=sys.stderr)
        sys.exit(SOME_FAILED)


def _opened(options: argparse.Namespace, phrases: Sequence[str]) -> tuple[Grounder, tuple[str, ...]]:
    """Load the model; return it, and the phrases or its classes."""
    grounder = open_grounder(options)
    if not (wanted := tuple(phrases) or grounder.classes):
        raise ConfigError(f"{options.checkpoint} was not trained on classes; give phrases to find, after -p")
    return grounder, wanted


def _draw_one(image: str, given: Sequence[str], options: argparse.Namespace) -> None:
    """Print the boxes of one image and draw them."""
    from PIL import Image

    from vg.inference.draw import save_image
    from vg.inference.result import READABLE_SIDE

    output = Path(options.output or "prediction.png")
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder: name a file in it, such as prediction.png")
    if not _is_image(str(output)):
        raise ConfigError(f"--output {output} has no suffix of an image format: use .png or .jpg")
    grounder, phrases = _opened(options, given)
    result = grounder(image, phrases, 0.0, tile=options.tile, overlap=options.overlap)
    shown = grounder.select(result, options.threshold, options.nms)
    if options.masks:
        shown = grounder.with_masks(shown, options.masks)
    for phrase, score, box in shown:
        left, top, right, bottom = (f"{side:.1f}" for side in box)
        print(f"{printable(phrase)}: left {left}, top {top}, right {right}, bottom {bottom}, score {score:.2f}")
    minimum = grounder.threshold(options.threshold)
    if grounder.backend.generalized:
        for index in sorted(set(range(len(phrases))) - set(shown.phrase_ids.tolist())):
            best_score = result.scores[result.phrase_ids == index].max(initial=0)
            print(f"{printable(phrases[index])}: nothing here, no box scores >= {minimum} (best: {best_score:.3g})")
    elif not len(shown):
        best = f"best: {result.scores[0]:.3g}" if len(result) else "no box was predicted"
        print(f"no box scores >= {minimum} ({best}); lower --threshold")
    save_image(Image.fromarray(shown.draw(max(READABLE_SIDE, *shown.size), legend=None)), output)
    print(f"drawn in {output}")


def _print_records(
    grounder: Grounder, inputs: Sequence[str], phrases: tuple[str, ...], options: argparse.Namespace
) -> int:
    """Print a record per image on standard output; return how many images could not be used."""
    failed = _Failed()
    for result in _stream(grounder, inputs, phrases, options, failed):
        print(result.to_json(), flush=True)
    return failed.count


def _fill_folder(
    grounder: Grounder, inputs: Sequence[str], phrases: tuple[str, ...], options: argparse.Namespace
) -> int:
    """Complete the folder of results; return how many images could not be used."""
    from vg.inference.images import named_images
    from vg.inference.results_folder import ResultsFolder, in_use

    settings = {"checkpoint": options.checkpoint, "weights": grounder.backend.digest(), "phrases": list(phrases)}
    settings |= {name: getattr(options, name) for name in SETTINGS}
    path, failed = Path(options.output or "predictions"), _Failed()
    with in_use(path):
        folder = ResultsFolder(path, settings, options.overwrite)
        images, total = named_images(list(inputs), options.every)
        missing = (image for image in images if folder.lacks(image.name))
        if folder.done:
            print(f"{path}: {len(folder.done)} images are done, continuing", file=sys.stderr)
        left = None if total is None else total - len(folder.done)
        for result in _stream(grounder, missing, phrases, options, failed, left):
            folder.add(result, draw=not options.no_draw, crops=options.crops)
            if options.json:
                print(result.to_json(), flush=True)
        for written in folder.finish(options.format or []):
            print(f"written: {written}", file=sys.stderr if options.json else sys.stdout)
    return failed.count


def _stream(
    grounder: Grounder,
    images: Any,
    phrases: tuple[str, ...],
    options: argparse.Namespace,
    failed: _Failed,
    total: int | None = None,
) -> Iterator[Result]:
    names = ("threshold", "nms", "tile", "overlap", "masks", "batch_size", "every")
    settings: dict[str, Any] = {name: getattr(options, name) for name in names}
    return grounder.stream(images, phrases, **settings, progress=True, total=total, failed=failed)


class _Failed:
    """Reports images that cannot be used, and counts them."""

    count = 0

    def __call__(self, name: str, error: Exception) -> None:
        self.count += 1
        tqdm.write(printable(f"error: {error}"), file=sys.stderr)


def _taken_apart(words: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Return images and phrases of the short form; raises ConfigError if it has several images and a phrase."""
    is_image = [x.startswith(("http://", "https://")) or (_is_image(x) and os.path.isfile(x)) for x in words[1:]]
    if all(is_image):
        return words, []
    if any(is_image):
        raise ConfigError(
            f"{words[1 + is_image.index(True)]} is an image file, not a phrase: without -p, vg predict takes one image "
            "and then phrases; for several images: vg predict MODEL IMAGE... -p PHRASE..."
        )
    return words[:1], words[1:]


def _is_file(name: str) -> bool:
    """Whether a name has a suffix, such as .png, unlike the folders preds_0.3 and exp_v1.2."""
    return Path(name).suffix[1:2].isalpha()


def _is_image(name: str) -> bool:
    """Whether a file name has the suffix of an image format that can be written."""
    from PIL import Image

    return Image.registered_extensions().get(Path(name).suffix.lower()) in Image.SAVE
