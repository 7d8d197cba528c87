"""Opens every picture of a data set, several at a time: is it there, whole, and as large as its annotation says?"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm

from vg.data.check.findings import Findings, Reading
from vg.data.images import find_image
from vg.errors import BadSampleError

_THREADS = 8
_RATIO = 0.02  # how far the scales of width and height may differ in a picture that was resized as a whole


class Look(NamedTuple):
    """What the file of a picture is like."""

    stored: tuple[int, int] = (0, 0)  # (height, width) in pixels; 0, 0 where it cannot be read
    turned: bool = False  # its EXIF orientation swaps height and width for whoever heeds it
    digest: bytes = b""  # of the file
    missing: str = ""
    damaged: str = ""


def look(name: str, reading: Reading) -> Look:
    """Read and decode one picture; never raises."""
    try:
        data = find_image(name, reading.root).read_bytes()
    except (BadSampleError, OSError, ValueError) as error:  # a name may hold what no name can
        return Look(missing=str(error))
    digest = hashlib.blake2b(data, digest_size=16).digest()
    try:
        with warnings.catch_warnings(), Image.open(BytesIO(data)) as image:
            warnings.simplefilter("ignore")
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            image.convert("RGB")
            return Look((image.height, image.width), turned, digest)
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, ... alike
        return Look(digest=digest, damaged=str(error))


def look_through(reading: Reading, chosen: Sequence[int], findings: Findings) -> dict[int, Look]:
    """Look at the chosen pictures, and note what is wrong with them."""
    names = [reading.pictures[number].file for number in chosen]
    with ThreadPoolExecutor(_THREADS) as threads:
        looking = threads.map(lambda name: look(name, reading), names)
        bar = tqdm(looking, desc=f"{reading.set}: pictures", total=len(names), unit=" pictures", mininterval=1)
        looks = dict(zip(chosen, bar, strict=True))
    for what, mend, of in (
        ("pictures that are missing", "put them there, or set image_root to the folder that holds them", "missing"),
        ("pictures that cannot be read", "replace them by intact copies", "damaged"),
    ):
        bad = [number for number, each in looks.items() if getattr(each, of)]
        examples = [f"{reading.pictures[number].file}: {getattr(looks[number], of)}" for number in bad]
        findings.add("error", reading.set, what, mend, examples)
    if reading.form != "yolo":  # whose boxes are relative, to the upright picture
        _compare_sizes(reading, looks, findings)
    return looks


def _compare_sizes(reading: Reading, looks: dict[int, Look], findings: Findings) -> None:
    for number, each in looks.items():
        (height, width), (noted_height, noted_width) = each.stored, reading.pictures[number].size
        if not all(each.stored):
            continue
        picture = reading.pictures[number]
        example = [f"{picture.where} ({picture.file}): {width} x {height}, annotation {noted_width} x {noted_height}"]
        if (height, width) == picture.size or not all(picture.size):
            if each.turned:
                what = "pictures that viewers turn by their EXIF orientation, but training does not"
                mend = "look at them in pictures.png: where boxes are wrong, store them upright"
                findings.add(
                    "warning", reading.set, what, mend, [f"{picture.file}: stored {width} x {height}"], [number]
                )
            continue
        ratio = (height / noted_height) / (width / noted_width)
        if each.turned and (width, height) == picture.size:
            what = "pictures annotated upright, but stored turned by their EXIF orientation"
            mend = "store them upright (for instance `mogrify -auto-orient`)"
        elif abs(ratio - 1) < _RATIO:
            what = "pictures resized after they were annotated"
            mend = "take the pictures that were annotated, or scale boxes, width and height as well"
        else:
            what = "pictures of another size than their annotation says"
            mend = "take the pictures that were annotated, or correct width and height"
        findings.add("error", reading.set, what, mend, example, [number])


def sizes_of(reading: Reading, looks: dict[int, Look]) -> np.ndarray:
    """[I, 2] (height, width) that boxes are measured in, as annotated or else as found; 0 where nobody knows."""
    sizes = np.array([picture.size for picture in reading.pictures], np.int64).reshape(-1, 2)
    for number, each in looks.items():
        if not sizes[number].all():
            sizes[number] = each.stored[::-1] if each.turned and reading.form == "yolo" else each.stored
    return sizes
