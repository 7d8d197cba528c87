"""ODVG json lines: an image per line, with boxes of numbered classes or with a caption and boxes of its phrases."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from vg.data.detection.annotations import Annotations, to_size, without_gc
from vg.data.detection.issues import Issues, RaiseFirstError
from vg.data.detection.line_files import LineFiles, label_map_of
from vg.data.detection.odvg_lines import LabelMap, LineParser, read_categories, read_label_map
from vg.data.detection.source import check_image_root, clip_boxes, read_annotated_image
from vg.data.detection.vocabulary import Vocabulary, VocabularyConfig
from vg.data.image_files import image_files, image_key, image_root
from vg.data.images import find_size
from vg.data.source import Provenance, Source
from vg.data.synthetic.shapes import write_scenes
from vg.errors import BadSampleError
from vg.settings import Settings
from vg.types import Sample

_NUM_LOCATED = 8  # lines whose images are looked for, to find the folder of the images
_NUM_CHECKED = 1000  # lines whose boxes are checked before training


@dataclass
class OdvgConfig(Settings):
    """Which lines to read, and where their images are.

    A line has `filename`, `height`, `width` and one of

    - `detection`: {instances: [{bbox, label, category}]}, labels from 0 on;
    - `grounding`: {caption, regions: [{bbox, phrase, tokens_positive}]}: `bbox` is one box or a list of them, empty if
      nothing in the image fits, and `tokens_positive` [[begin, end], ...] are the characters of the caption that name
      them; see `captions`.

    All boxes are left, top, right, bottom in pixels.
    """

    name: Literal["odvg"] = "odvg"
    path: str = field(kw_only=True)
    """The .jsonl file, such as instances_train.jsonl, or a folder of them, such as vg label writes."""
    label_map: str | None = None
    """Json file {"0": "person", ...}, for lines with numbered classes; in a folder by default its label_map.json.
    Without one, the `category` of every instance names its class."""
    classes: list[str] | None = None
    """Names of the classes without a label_map; by default the categories of all lines, in the order of the labels."""
    image_root: str | None = None
    """Folder of the images; by default as for coco, and that of the files for a folder of them."""
    upright: bool | None = None
    """See the setting of coco."""
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    """For lines with numbered classes; captions have no sampled negatives."""
    captions: Literal["phrases", "whole"] = "phrases"
    """Prompt of a line with a caption. "phrases": the phrases of its regions, separated by full stops; equal ones are
    one with all their boxes, and the words at `tokens_positive` are used where `phrase` is missing. "whole": the
    caption as it stands, as MM-Grounding-DINO is trained on GoldG, Flickr and GRIT; every region needs
    `tokens_positive`, whose words are its phrase; equal spans are one phrase, equal words elsewhere another one."""

    def __post_init__(self) -> None:
        if self.label_map is not None and self.classes:
            raise ValueError("classes is for lines without a label_map, which has the classes: leave one of them out")

    @classmethod
    def miniature(cls, folder: Path) -> OdvgConfig:
        """Write a tiny dataset of captions with regions and return its settings, for tests."""
        rows = write_scenes(folder, "detection")
        regions = [[{"phrase": name, "bbox": box} for image, name, box in rows if image == i] for i in range(4)]
        lines = [
            {"filename": f"{i}.png", "height": 64, "width": 64, "grounding": {"caption": "shapes", "regions": boxes}}
            for i, boxes in enumerate(regions)
        ]
        (folder / "val.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return cls(path=str(folder / "val.jsonl"))

    def build(self) -> OdvgSource:
        return OdvgSource(self)

    def image_folder(self, lines: LineFiles) -> Path:
        if self.image_root is not None:
            return Path(self.image_root)
        if (path := Path(self.path)).is_dir():
            return path.resolve()
        parser = LineParser(None, Issues())  # invalid lines are errors when they are loaded
        rows = (parser.row(*lines[index]) for index in range(min(len(lines), _NUM_LOCATED)))
        return image_root(path, [str(row["filename"]) for row in rows if row and "filename" in row])

    @property
    def label_map_file(self) -> str | None:
        return self.label_map or label_map_of(Path(self.path))

    def read_labels(self, lines: LineFiles, issues: Issues) -> LabelMap | None:
        """Read the label map, or make one of the categories in the lines if the first line has numbered classes."""
        if self.label_map_file is None and len(lines) and b'"detection"' in lines[0][0]:
            return read_categories(lines, issues, self.classes)
        return read_label_map(self.label_map_file, issues)

    @without_gc()
    def read(self, issues: Issues) -> Annotations:
        """Parse all lines.

        Raises:
            DataError: the file cannot be read.
        """
        files = LineFiles(Path(self.path))
        parser = LineParser(self.read_labels(files, issues), issues, self.captions == "whole")
        lines = (parser.parse(text, location) for text, location in files)
        images = [image for image in lines if image is not None]
        fields = {"image_root": self.image_folder(files), "upright": self.upright}
        return Annotations.of(images, parser.names, parser.num_classes, **fields)


class OdvgSource(Source[Sample]):
    """The lines of ODVG files; a line is parsed when its sample is loaded.

    Boxes are clipped or left out as in vg.data.detection.source.

    Raises:
        DataError: a file is missing or empty, or its first line is not ODVG.
    """

    def __init__(self, config: OdvgConfig) -> None:
        self._path = Path(config.path)
        self._lines = LineFiles(self._path)
        self._root = config.image_folder(self._lines)
        check_image_root(self._root)
        self._label_map = config.read_labels(self._lines, RaiseFirstError(self._path))
        self._whole = config.captions == "whole"
        self._upright = config.upright
        self.vocabulary: Vocabulary | None = None
        if self._label_map is not None:
            names = [name for _, name in self._label_map.values()]
            self.vocabulary = Vocabulary(names, config.vocabulary, str(config.label_map_file or self._path))
        self.provenance = Provenance(self._path.resolve().parent.name, self._path.stem, "detection")
        if self.vocabulary is None and config.vocabulary != VocabularyConfig():
            unused = "vocabulary is not used: it is for lines with numbered classes, which need a label_map"
            warnings.warn(f"{self._path}: {unused}", stacklevel=3)
        if len(self):
            text, location = self._lines[0]
            parser = self._parser()
            parser.items(parser.row(text, location) or {}, location)
            self._check_boxes()

    def __len__(self) -> int:
        return len(self._lines)

    def load(self, index: int, epoch: int) -> Sample:
        """Return the sample of one line; the epoch matters where the vocabulary samples phrases.

        Raises:
            BadSampleError: the message names the file, the line and the key.
        """
        parser = self._parser()
        text, location = self._lines[index]
        line = parser.parse(text, location)
        assert line is not None, "an invalid line has raised"
        boxes = np.array([box.values for box in line.boxes], np.float32).reshape(-1, 4)
        labels = np.array([box.label for box in line.boxes], np.int64)
        try:
            image = read_annotated_image(line.file, self._root, line.size, self._upright)
            boxes, kept = clip_boxes(boxes, image)
        except BadSampleError as error:
            raise BadSampleError(f"{self._path}, {location}: {error}") from error
        phrases, phrase_ids, kept = line_prompt(parser, self.vocabulary, labels, kept, epoch, index)
        caption = line.caption and line.caption._replace(location=f"{self._path}, {location}")
        return Sample(f"{index + 1}/{line.file}", image, phrases, boxes[kept], phrase_ids, caption=caption)

    def image_sizes(self, epoch: int) -> np.ndarray:
        """[lines, 2] (height, width); the first call parses every line."""
        return self._files_and_sizes[1]

    def image_keys(self) -> list[str]:
        return [image_key(name, self._root) for name in self._files_and_sizes[0]]

    def image_files(self) -> list[Path | None]:
        return image_files(self._files_and_sizes[0], self._root)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps([*(self._label_map or {}).items()]).encode())
        for text, _ in self._lines:
            digest.update(text)
        return digest.hexdigest()

    @cached_property
    def _files_and_sizes(self) -> tuple[list[str], np.ndarray]:
        """The image file of every line, or its location where it names none, and [lines, 2] height and width."""
        files, sizes = [], []
        parser = LineParser(None, Issues())  # invalid lines are errors when they are loaded
        for text, location in self._lines:
            row = parser.row(text, location) or {}
            files.append(str(row.get("filename", f"{self._path}, {location}")))
            size = to_size(row.get("height"), row.get("width"))
            sizes.append(size if min(size) > 0 else find_size(files[-1], self._root, self._upright))
        return files, np.array(sizes, np.int64).reshape(-1, 2)

    def _check_boxes(self) -> None:
        """Raise DataError if many boxes of up to `_NUM_CHECKED` lines, evenly spaced, would be left out."""
        parser = LineParser(self._label_map, Issues(), self._whole)  # invalid lines are errors when they are loaded
        indices = np.linspace(0, len(self) - 1, min(len(self), _NUM_CHECKED)).astype(int).tolist()
        images = [image for index in indices if (image := parser.parse(*self._lines[index])) is not None]
        Annotations.of(images, parser.names, parser.num_classes).report_lost(RaiseFirstError(self._path))

    def _parser(self) -> LineParser:
        return LineParser(self._label_map, RaiseFirstError(self._path, BadSampleError), self._whole)


def line_prompt(
    parser: LineParser, vocabulary: Vocabulary | None, labels: np.ndarray, kept: np.ndarray, epoch: int, index: int
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Return the phrases of the line that `parser` has parsed, or those of a vocabulary if the line has classes.

    Args:
        labels: [N] int, those of the boxes of the line.
        kept: [N] bool, which boxes are used.

    Returns:
        P phrases, phrase_ids [K] int64 of the K boxes that are used, and [N] bool, which ones these are: a vocabulary
        may leave out classes.
    """
    if phrases := tuple(parser.names[parser.num_classes :]):
        return phrases, labels[kept] - parser.num_classes, kept
    assert vocabulary is not None, "a line of classes without a label map has raised"
    labels = vocabulary.labels[labels]
    kept = kept & (labels >= 0)
    return *vocabulary.prompt(labels[kept], epoch, index), kept
