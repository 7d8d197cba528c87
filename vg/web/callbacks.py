"""What the page calls: Python functions from the values of its fields to new values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from vg.errors import DataError, UserError, printable
from vg.inference.draw import COLORS
from vg.inference.formats import Format
from vg.inference.grounder import Grounder
from vg.web.answer import NUM_SHOWN, Answer, Shown
from vg.web.phrases import split_phrases
from vg.web.uploads import check_image, fetch, named_upload, read_upload


def reported(callback: Callable) -> Callable:
    """Turn user errors of a callback into messages on the page; their text may contain what strangers chose."""

    @wraps(callback)
    def call(*arguments: Any) -> Any:
        try:
            return callback(*arguments)
        except UserError as error:
            text = "<br>".join(escape(printable(line)) for line in str(error).splitlines())
            raise gr.Error(text, print_exception=False) from error

    return call


class Callbacks:
    """What the page calls; none needs a browser."""

    def __init__(self, grounder: Grounder, folder: Path):
        self.grounder = grounder
        self.folder = folder  # of uploaded and downloaded images

    def check(self, upload: Any) -> Any:
        """Empty the image field, with a warning, if the file is not a usable image."""
        if upload is None:
            return gr.skip()
        try:
            check_image(*named_upload(upload, self.folder))
        except UserError as error:
            gr.Warning(escape(printable(str(error))))
            return None
        return gr.skip()

    def fetch(self, url: str) -> str:
        return str(fetch(url, self.folder))

    def find(self, upload: Any, text: Any, threshold: float, iou: float) -> tuple:
        """Run the model."""
        phrases = split_phrases(str(text or ""), self.grounder.classes)
        image, name = read_upload(upload, self.folder)
        result = self.grounder.predict(image, phrases)
        if not self.grounder.threshold(None):
            result = result.best()
        return self.changed(Answer.of(replace(result, name=name)), threshold, iou)

    def changed(self, answer: Answer, threshold: float, iou: float) -> tuple:
        """Return a new answer, no corner, and what is shown."""
        return answer, None, *self.redraw(answer, threshold, iou)

    def redraw(self, answer: Answer | None, threshold: float, iou: float) -> tuple:
        """Return the legend, the drawn image, the crops and the table, with its threshold and IoU."""
        if answer is None:
            return "", None, None, None, threshold, iou
        shown = answer.shown(threshold, iou)
        boxes = shown.on_preview()
        captions = [f"{score:.2f} {phrase}" for phrase, score, _ in boxes]
        crops = list(zip(boxes.crop(), captions, strict=True))
        return legend(shown, answer), boxes.draw(), crops, shown.table(), threshold, iou

    def edit(
        self,
        answer: Answer | None,
        table: list[list[Any]],
        table_threshold: float,
        table_iou: float,
        threshold: float,
        iou: float,
    ) -> tuple:
        """Apply a table; its rows are boxes of the threshold and IoU it was made with: the sliders may have moved."""
        return self.changed(existing(answer).with_table(table, table_threshold, table_iou), threshold, iou)

    def undo(self, answer: Answer | None, threshold: float, iou: float) -> tuple:
        return self.changed(existing(answer).original(), threshold, iou)

    def corner(
        self,
        answer: Answer | None,
        corner: tuple | None,
        phrase: str,
        threshold: float,
        iou: float,
        event: gr.SelectData,
    ) -> tuple:
        """Add a box at the second click on the drawn image."""
        answer, clicked = existing(answer), tuple(event.index)
        if corner is None:
            gr.Info("First corner set; click on the opposite corner of the new box.", duration=4)
            return answer, clicked, *[gr.skip()] * 6
        try:
            answer = answer.with_box(phrase or answer.result.phrases[0], [corner, clicked])
        except DataError as error:
            gr.Warning(escape(printable(str(error))))
            return answer, None, *[gr.skip()] * 6
        return self.changed(answer, threshold, iou)

    def download(self, format: Format, answer: Answer | None, threshold: float, iou: float) -> dict[str, str]:
        name, content = existing(answer).shown(threshold, iou).text(format)
        return {"name": name, "content": content}


def existing(answer: Answer | None) -> Answer:
    if answer is None:
        raise DataError("no boxes yet; choose an image and enter phrases first")
    return answer


def legend(shown: Shown, answer: Answer) -> str:
    """Return HTML: each phrase with its color and number of boxes, and what is not shown."""
    phrases, counts = shown.result.phrases, np.bincount(shown.result.phrase_ids, minlength=len(shown.result.phrases))
    entries = [
        f'<span class="{"some" if count else "none"}"><i style="background:{COLORS[index % len(COLORS)]}"></i>'
        f"{escape(phrase)}: <b>{count}</b></span>"
        for index, (phrase, count) in enumerate(zip(phrases, counts, strict=True))
    ]
    if shown.num_selected > NUM_SHOWN:
        entries.append(f"<span>the best {NUM_SHOWN} of {shown.num_selected} boxes; raise the threshold</span>")
    elif not len(shown.result):
        best = f"the best box scores {answer.result.scores[0]:.2f}" if len(answer.result) else "no box was predicted"
        entries.append(f"<span>no box reaches the threshold ({best})</span>")
    return f'<div class="legend">{"".join(entries)}</div>'
