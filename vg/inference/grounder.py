"""Inference: images and phrases in, results out, for one image, a list, or a stream of any length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from vg.errors import ConfigError
from vg.inference.arguments import check_count, check_fraction, checked_phrases
from vg.inference.images import ImageLike, NamedImage, check_single, is_single, named_images
from vg.inference.read_ahead import Failed, read_ahead
from vg.inference.result import Boxes, Result
from vg.inference.tiles import predict_tiled

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase
    from typing_extensions import Self

    from vg.config import SavedConfig
    from vg.inference.masks import Segmenter
    from vg.inference.onnx_backend import OnnxBackend
    from vg.inference.torch_backend import TorchBackend
    from vg.models.base import GroundingModel

THRESHOLD, PROBABLE = 0.3, 0.5  # minimum scores for many phrases, and for expressions of any number of objects


class Grounder:
    """Finds what phrases name in images. Threads may share one; a process that is spawned creates its own.

        grounder = vg.Grounder("runs/demo")
        result = grounder("street.jpg", ["dog", "traffic light"])
        for phrase, score, box in result: ...  # box: (left, top, right, bottom) in pixels

    Args:
        model: a model, or a path for `load_model`: the folder of a run or checkpoint, or a published Grounding DINO; or
            an .onnx file of `vg export`, which runs without torch.
        device: "cpu", "cuda" or "mps"; by default the fastest one available. The model is moved there.
        tokenizer, overrides, revision: see `load_model`.
        dtype: "fp32", "bf16", "fp16", or such a dtype of torch: precision of the network; the weights stay float32.
        cuda_graphs: on CUDA, record the network for each input size and replay it: for videos. Not run on a GPU yet.

    Raises:
        ConfigError: not a model, no such device on this machine, no such dtype, or CUDA graphs on another device.
        CheckpointError: see `load_model`.
    """

    def __init__(
        self,
        model: str | Path | GroundingModel,
        device: str | None = None,
        tokenizer: str | None = None,
        overrides: Sequence[str] = (),
        *,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        cuda_graphs: bool = False,
    ):
        self.backend: TorchBackend | OnnxBackend
        self.config: SavedConfig | None = None
        self.results: dict[str, Any] | None = None
        self._segmenters: dict[str, Segmenter] = {}
        if isinstance(model, (str, Path)) and Path(model).suffix == ".onnx":
            from vg.inference.onnx_backend import OnnxBackend

            if any((tokenizer, overrides, dtype, revision, cuda_graphs)):
                raise ConfigError(
                    f"{model} takes no tokenizer, overrides, dtype, revision or cuda_graphs; apply them in `vg export`"
                )
            self.backend = OnnxBackend(model, device)
            return
        from vg.inference.load import open_model
        from vg.inference.torch_backend import TorchBackend, best_device, checked_device

        device = checked_device(device or best_device())
        if isinstance(model, (str, Path)):
            loaded = open_model(model, tokenizer, overrides, revision)
            model, self.config, self.results = loaded.model, loaded.training, loaded.results
        elif not hasattr(model, "text_spec"):
            raise ConfigError(f"a Grounder needs a model or its path, not a {type(model).__name__}")
        elif tokenizer or overrides or revision:
            raise ConfigError("a model that is loaded takes no tokenizer, overrides or revision; give its path")
        self.backend = TorchBackend(model, device, dtype, cuda_graphs)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        tokenizer: str | None = None,
        overrides: Sequence[str] = (),
        cuda_graphs: bool = False,
    ) -> Self:
        """Load a model of either family and any format from a path or Hub id; arguments as in `Grounder`."""
        return cls(path, device, tokenizer, overrides, dtype=dtype, revision=revision, cuda_graphs=cuda_graphs)

    @property
    def model(self) -> GroundingModel:
        """The network; raises ConfigError for an ONNX model."""
        from vg.inference.onnx_backend import OnnxBackend

        if isinstance(self.backend, OnnxBackend):
            raise ConfigError("an ONNX model has no network of torch; use the model that it was exported from")
        return self.backend.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.backend.tokenizer

    @property
    def takes_many(self) -> bool:
        """Whether the model takes any number of phrases with any number of boxes, not one expression with one box."""
        return self.backend.takes_many

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes on which the model was trained, as phrases; empty if its data had expressions, or is unknown."""
        return self.backend.classes

    def to(self, device: str) -> Self:
        """Move the model; raises ConfigError if this machine does not have the device."""
        self.backend.to(device)
        return self

    def compile(self) -> Self:
        """Compile the network at the next call."""
        self.backend.compile()
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a checkpoint with a model card; one is replaced, a folder with other files raises CheckpointError."""
        from vg.inference.publish import save_model

        save_model(Path(folder), self.model, self._saved_config(), self.results, str(folder))

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload what `save_pretrained` writes; return the URL. Raises CheckpointError if that fails."""
        from vg.inference.publish import push_model

        return push_model(repo_id, self.model, self._saved_config(), self.results, private, token)

    def _saved_config(self) -> SavedConfig:
        from vg.config import ModelOnlyConfig

        return self.config or ModelOnlyConfig(self.model.config)  # type: ignore[arg-type]

    def __call__(
        self,
        images: ImageLike | Iterable[ImageLike],
        phrases: str | Sequence[str] | None = None,
        threshold: float | None = None,
        *,
        nms: float | None = None,
        tile: int | None = None,
        overlap: float = 0.2,
        masks: bool | str = False,
        batch_size: int = 8,
    ) -> Any:
        """Find phrases in one or more images.

        Args:
            images: a path, http(s) URL, PIL image, array [H, W, 3] uint8 in RGB (of OpenCV: image[..., ::-1]), bytes,
                an open file; or a list of them; or a folder, a pattern such as "photos/*.jpg", a video, or a generator.
            phrases: one or several, by default `classes`; a model of one expression (rec) answers each by itself.
            threshold: minimum score of a box, 0..1. By default 0.3 for a model of many phrases; for a model of one
                expression the best box of each phrase, or 0.5 if it may name no object or several.
            nms: drop a box if its IoU with a better one of the same phrase is above this, 0..1; by default none.
            tile: also search tiles of this side in pixels, to find what is too small in the resized image. In an image
                that is larger, boxes with a score below 0.02 are left out, and of boxes of a phrase with an IoU above
                0.5 all but the best one.
            overlap: least fraction of a tile that its neighbors share with it, 0..0.9.
            masks: also segment every box, with the SAM or SAM 2 of a folder or Hub id; True for `masks.DEFAULT_ID`.
            batch_size: images in a pass of the network.

        Returns:
            A `Result` for one image, a list of them for a list, and an iterator for a folder, pattern, video or
            generator, whose images are read while the network runs.

        Raises:
            DataError: an unreadable image, no image, no phrase, or a phrase the model cannot process (blank, too long).
            ConfigError: an argument is out of range, no such model for masks, or tiles for a model of one expression.
            PredictionError: the model predicts NaN or Inf.
        """
        options: Any = {"nms": nms, "tile": tile, "overlap": overlap, "masks": masks, "batch_size": batch_size}
        results = self.stream(images, phrases, threshold, **options)
        if is_single(images):
            return next(results)
        return list(results) if isinstance(images, (list, tuple)) else results

    def predict(
        self, image: ImageLike, phrases: str | Sequence[str] | None = None, threshold: float | None = None
    ) -> Result:
        """Find phrases in one image; like a call, but by default all boxes of the model are returned."""
        return next(self.stream([check_single(image)], phrases, threshold or 0.0))

    def predict_batch(
        self, images: Sequence[ImageLike], phrases: Sequence[str | Sequence[str]], threshold: float | None = None
    ) -> list[Result]:
        """Like `predict`, by default with all boxes, for several images with own phrases, in one pass of the network.

        Raises:
            ValueError: images or phrases that are not a list, or another number of phrases than of images.
            DataError, ConfigError, PredictionError: as in a call.
        """
        if isinstance(phrases, str) or not isinstance(phrases, Iterable):
            raise ValueError("phrases needs one entry per image; use [phrases] * len(images) to repeat one")
        if isinstance(images, (str, Path)) or is_single(images) or not isinstance(images, Iterable):
            raise ValueError("images needs a list of images, such as [image]; a call takes one image, or a folder")
        check_fraction(threshold or 0.0, "threshold")
        named = list(named_images(list(map(check_single, images)))[0])
        wanted = list(map(checked_phrases, phrases))
        pixels = [image.read() for image in named]
        if len(wanted) != len(pixels):
            raise ValueError(f"{len(wanted)} entries in phrases for {len(pixels)} images: give one per image")
        prepared: Any = self.backend.prepare(pixels, wanted) if pixels else None
        found = self.backend.predict(prepared) if pixels else []
        parts = zip(named, pixels, wanted, found, strict=True)
        return [Result(image.name, x, prompt, *boxes).above(threshold or 0.0) for image, x, prompt, boxes in parts]

    def stream(
        self,
        images: ImageLike | Iterable[ImageLike],
        phrases: str | Sequence[str] | None = None,
        threshold: float | None = None,
        *,
        nms: float | None = None,
        tile: int | None = None,
        overlap: float = 0.2,
        masks: bool | str = False,
        batch_size: int = 8,
        every: int = 1,
        progress: bool = False,
        total: int | None = None,
        failed: Failed | None = None,
    ) -> Iterator[Result]:
        """Find phrases in any number of images, one result after the other; arguments and errors as in a call.

        Args:
            every: of a video, take each `every`-th frame.
            progress: show a progress bar with the remaining time on standard error.
            total: number of images of a generator, for the remaining time.
            failed: called for an image that cannot be read; such an image is left out. By default it is an error.
        """
        wanted = checked_phrases(phrases, self.classes)
        for name, value in (("threshold", threshold), ("nms", nms)):
            if value is not None:
                check_fraction(value, name)
        for name, number in (("batch_size", batch_size), ("tile", 1 if tile is None else tile)):
            check_count(number, name)
        check_fraction(overlap, "overlap", 0.9, "a fraction of a tile")
        if tile is not None and not self.takes_many:
            raise ConfigError("tile: the model answers one expression of an image, and cannot compare boxes of tiles")
        if masks:
            self._segmenter(masks)  # raises ConfigError before images are read
        named, count = named_images(images, every)
        results = tqdm(
            self._run(named, wanted, batch_size, tile, overlap, failed),
            total=count if total is None else total,
            unit="image",
            dynamic_ncols=True,
            disable=not progress,
        )
        selected = (self.select(result, threshold, nms) for result in results)
        return (self.with_masks(result, masks) if masks else result for result in selected)

    def with_masks(self, result: Result, model: bool | str = True) -> Result:
        """Return a result with the mask of every box, see the argument `masks` of a call."""
        return replace(result, masks=self._segmenter(model)(result.image, result.boxes))

    def _segmenter(self, model: bool | str) -> Segmenter:
        try:
            from vg.inference.masks import DEFAULT_ID, Segmenter
        except ImportError as error:  # an ONNX model runs without torch
            raise ConfigError("masks need torch: pip install torch") from error
        path = DEFAULT_ID if model is True else str(model)
        if path not in self._segmenters:
            self._segmenters = {path: Segmenter(path, self.backend.device)}
        return self._segmenters[path]

    def select(self, result: Result, threshold: float | None = None, nms: float | None = None) -> Result:
        """Return the boxes of a result that a call with these arguments returns."""
        best_only = threshold is None and not self.threshold(None)
        result = result.best() if best_only else result.above(self.threshold(threshold))
        return result if nms is None else result.nms(nms)

    def threshold(self, threshold: float | None) -> float:
        """Return the minimum score of a box; None stands for the default of the model, 0 if that is the best box."""
        default = THRESHOLD if self.takes_many else PROBABLE * self.backend.generalized
        return default if threshold is None else threshold

    def _run(
        self,
        images: Iterator[NamedImage],
        phrases: tuple[str, ...],
        batch_size: int,
        tile: int | None,
        overlap: float,
        failed: Failed | None,
    ) -> Iterator[Result]:
        def prepare(images: Sequence[np.ndarray]) -> Any:
            return self.backend.prepare(images, [phrases] * len(images))

        def predict(images: Sequence[np.ndarray]) -> list[Boxes]:
            return self.backend.predict(prepare(images))

        for ready in read_ahead(images, batch_size, None if tile else prepare, failed):
            if tile is None:
                found = self.backend.predict(ready.prepared)
            else:
                found = [predict_tiled(predict, image, tile, overlap, batch_size) for image in ready.pixels]
            yield from (Result(name, x, phrases, *boxes) for (name, x), boxes in zip(ready, found, strict=True))
