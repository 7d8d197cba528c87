"""Images that visitors upload or link to, checked before anything is decoded."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vg.data.images import image_size, max_pixels, read_image
from vg.errors import DataError
from vg.inference.download import PrivateAddressError, download, is_url

MAX_PIXELS = max_pixels(25_000_000)  # less than for files of one's own: strangers upload
MAX_BYTES = 30_000_000


@contextmanager
def folder_of_server() -> Iterator[None]:
    """Keep the uploads of a page that is built and served inside in a folder that is deleted in the end.

    By default, all Gradio servers of a machine share one folder, and each that stops deletes files of the others.
    """
    shared = os.environ.get(variable := "GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="vg_web_") as folder:
        os.environ[variable] = folder
        try:
            yield
        finally:
            os.environ.pop(variable)
            if shared is not None:
                os.environ[variable] = shared


def check_image(source: Path | bytes, name: str) -> None:
    """Raise DataError unless the header is that of an image with at most MAX_PIXELS."""
    height, width = image_size(source, name)
    if height * width > MAX_PIXELS:
        raise DataError(f"image {name} has {width} x {height} pixels, more than {MAX_PIXELS:,}; resize it")


def named_upload(upload: Any, folder: Path) -> tuple[Path, str]:
    """Return file and original name of what an image field of the page contains.

    Args:
        folder: of all uploads; a request may name any other file of this machine.

    Raises:
        DataError: the field is empty, or the file is not below `folder`, whether it exists or not.
    """
    path = upload.get("path") if isinstance(upload, dict) else None
    if not isinstance(path, str) or "\0" in path or not _is_below(path, folder):
        raise DataError("no image; upload, paste or take one, or enter its URL")
    name = Path(str(upload.get("orig_name") or path)).name
    return Path(path), name[:100]


def _is_below(path: str, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def read_upload(upload: Any, folder: Path) -> tuple[np.ndarray, str]:
    """Return the pixels [H, W, 3] uint8, RGB, of an upload and its name; raises as `named_upload` and `check_image`."""
    path, name = named_upload(upload, folder)
    check_image(path, name)
    return read_image(path, name, upright=True), name


def fetch(url: str, folder: Path) -> Path:
    """Download an image from a public address into a new folder below `folder`; return the file.

    Raises:
        DataError: not an http(s) URL, see `vg.inference.download`, or not an image that can be used.
    """
    url = url.strip()
    if not is_url(url):
        raise DataError("a URL of an image begins with http:// or https://")
    try:
        content = download(url)
    except PrivateAddressError as error:  # whose message has the address and is for the owner of this machine
        raise DataError(f"{url} has no public address") from error
    check_image(content, url)
    with Image.open(BytesIO(content)) as image:
        suffix = f".{(image.format or 'png').lower()}"
    folder.mkdir(parents=True, exist_ok=True)
    file = Path(tempfile.mkdtemp(dir=folder), f"image{suffix}")
    file.write_bytes(content)
    return file
