"""A served page whose model finds bright rectangles, and requests to it as a browser sends them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.inference.bright import Bright, Output
from vg.inference.grounder import Grounder
from vg.models.base import GroundingModel
from vg.types import Batch, Prediction, TextSpec
from vg.web.uploads import folder_of_server

web_page = pytest.importorskip("vg.web.page", reason="gradio is not installed: pip install gradio")
httpx = pytest.importorskip("httpx")

BOXES = [(20, 10, 60, 40), (100, 50, 180, 90)]  # of the scene, xyxy
BRIGHTNESS = (255, 160)


class OneBox(Bright):
    """Takes one phrase at a time, like the rec family."""

    text_spec = TextSpec(Bright.text_spec.tokenizer, 64)

    def predict(self, output: Output, batch: Batch) -> list[Prediction]:
        return [self._found(output.images[0], batch.sizes[0], target) for target in batch.targets]  # of one image


def scene() -> Image.Image:
    pixels = np.zeros((100, 200, 3), np.uint8)
    for (left, top, right, bottom), value in zip(BOXES, BRIGHTNESS, strict=True):
        pixels[top:bottom, left:right] = value
    return Image.fromarray(pixels)


def as_png(image: Image.Image) -> bytes:
    image.save(buffer := BytesIO(), "PNG")
    return buffer.getvalue()


class Server:
    def __init__(self, url: str, page: Any):
        self.url, self.page = url.rstrip("/"), page

    def get(self, path: str) -> Any:
        return httpx.get(f"{self.url}/{path}", timeout=60)

    def upload(self, name: str, content: bytes) -> Any:
        return httpx.post(f"{self.url}/gradio_api/upload", files={"files": (name, content)}, timeout=60)

    def find(self, path: Any, phrases: Any, name: str = "image.png") -> dict[str, Any]:
        """Run the model on an uploaded file; return the last message of the server: output and success."""
        file = path and {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}
        return self.call("find", [file, phrases, 0.3, 0.7])

    def call(self, function: str, data: list[Any]) -> dict[str, Any]:
        index = next(key for key, value in self.page.fns.items() if value.name == function)
        session = uuid.uuid4().hex
        body = {"data": data, "fn_index": index, "session_hash": session}
        joined = httpx.post(f"{self.url}/gradio_api/queue/join", json=body, timeout=60)
        if joined.status_code != 200:
            return {"success": False, "output": {"error": joined.text}}
        events = f"{self.url}/gradio_api/queue/data?session_hash={session}"
        with httpx.stream("GET", events, timeout=120) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    return message
        raise AssertionError("the server closed the stream of events")


@contextmanager
def serving(model: GroundingModel | None = None) -> Iterator[Server]:
    with folder_of_server():
        page = web_page.new_page(Grounder(model or Bright(), "cpu"), "bright")
        yield Server(web_page.launch(page, "127.0.0.1", None, share=False)[0], page)
        page.close()
