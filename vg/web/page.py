"""The web page: an image and phrases in; boxes out, which can be filtered, corrected and downloaded."""

from __future__ import annotations

from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image
from starlette.middleware import Middleware

from vg.data.synthetic.shapes import ShapesConfig
from vg.errors import ConfigError
from vg.inference.formats import Format
from vg.inference.grounder import Grounder
from vg.web.answer import HEADERS
from vg.web.callbacks import Callbacks, reported
from vg.web.guard import Guard, stop_like_ctrl_c
from vg.web.uploads import MAX_BYTES, folder_of_server

QUEUE_SIZE = 40  # waiting requests; further ones are refused with a message
NUM_SESSIONS = 100  # pages whose answer is kept, at most 8 MB each
SECONDS_KEPT = 3600  # files and answers
NUM_EXAMPLES = 4
NUM_CLASSES = 10  # that the empty field of the phrases shows
WEBCAM = gr.WebcamOptions(mirror=False, constraints={"video": {"facingMode": "environment"}})  # left stays left
DOWNLOADS: dict[str, Format] = {"JSON": "jsonl", "COCO": "coco", "Label Studio": "label-studio"}
SHOW = "() => document.querySelector('#drawn').scrollIntoView({block: 'nearest', behavior: 'smooth'})"  # on phones
SAVE = """(file) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([file.content], {type: "application/json"}));
    link.download = file.name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}"""
CSS = """
.legend { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center; min-height: 1.6em; }
.legend i { display: inline-block; width: 0.8em; height: 0.8em; border-radius: 2px; margin-right: 0.4em; }
#crops .caption-label { left: 0; right: 0; bottom: 0; max-width: 100%; font-size: 0.75em; padding: 2px 4px; }
#crops .grid-container { grid-template-columns: repeat(auto-fill, minmax(110px, 1fr)) !important; margin-top: 2em; }
#crops .grid-wrap { min-height: 0; max-height: 420px; }
.legend .none { opacity: 0.6; }
"""


def examples(grounder: Grounder) -> list[list[Any]]:
    """Draw scenes; return the image of each and its phrases."""
    source = ShapesConfig(split="test", view="detection" if grounder.takes_many else "expression").build()
    rows = []
    for index in range(NUM_EXAMPLES):
        sample = source.load(index, epoch=0)
        rows.append([Image.fromarray(sample.image), ", ".join(sample.phrases)])
    return rows


def new_page(grounder: Grounder, title: str) -> gr.Blocks:
    """Return the page of a model."""
    call = Callbacks(grounder, Path(get_upload_folder()))  # whose old files are deleted
    many = grounder.takes_many
    example = "cat, remote control" if many else "the man in the red shirt"
    default = f"empty for: {', '.join(grounder.classes[:NUM_CLASSES])}" if grounder.classes else example
    threshold_value = grounder.threshold(None)
    with gr.Blocks(title=f"vg: {title}", analytics_enabled=False, delete_cache=(300, SECONDS_KEPT)) as page:
        answer = gr.State(time_to_live=SECONDS_KEPT)
        corner = gr.State()
        file = gr.JSON(visible="hidden")
        selection = [gr.Number(visible="hidden"), gr.Number(visible="hidden")]  # threshold and IoU of the table
        answers = f"every phrase with {'any number of boxes' if threshold_value else 'its best box'}"
        gr.HTML(f"<h2>Find in an image what phrases describe</h2>{escape(title)} answers {answers}.")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                image = gr.Image(
                    label="Image",
                    height=300,
                    format="png",
                    elem_id="image",
                    buttons=["fullscreen"],
                    webcam_options=WEBCAM,
                )
                with gr.Row(equal_height=True):
                    url = gr.Textbox(
                        show_label=False, placeholder="or the URL of an image", max_lines=1, scale=4, elem_id="url"
                    )
                    load = gr.Button("Load", min_width=80, scale=1)
                text = gr.Textbox(
                    label="Phrases",
                    placeholder=default,
                    info='separated by commas; quotes keep "a red, round thing" together',
                    max_lines=1,
                    elem_id="phrases",
                )
                run = gr.Button("Find", variant="primary", elem_id="find")
                with gr.Row():
                    threshold = gr.Slider(0, 1, threshold_value, step=0.01, label="Threshold", elem_id="threshold")
                    iou = gr.Slider(0, 1, 0.7 if many else 1, step=0.01, label="NMS (IoU)", elem_id="nms")
                samples = gr.Examples(examples(grounder), [image, text], label="Examples", visible_columns=[0])
            with gr.Column(scale=3, min_width=320):
                drawn = gr.Image(
                    show_label=False,  # it would cover boxes
                    interactive=False,
                    format="jpeg",
                    buttons=["download", "fullscreen"],
                    elem_id="drawn",
                )
                summary = gr.HTML(elem_id="legend")
                crops = gr.Gallery(
                    label="Crops", columns=5, height="auto", object_fit="contain", fit_columns=False, elem_id="crops"
                )
                with gr.Accordion("Correct the boxes", open=False, elem_id="correct"):
                    gr.HTML(
                        "Edit a cell, or add and delete rows by the menu of a cell. To draw a new box, click on two "
                        "opposite corners in the image. Changed and new boxes have score 1; the threshold and NMS "
                        "apply to the other boxes only."
                    )
                    phrase = gr.Textbox(label="Phrase of the next new box", placeholder="the first phrase", max_lines=1)
                    table = gr.Dataframe(
                        headers=HEADERS,
                        datatype=["str", "number", "number", "number", "number", "number"],
                        type="array",
                        static_columns=[1],
                        column_count=(len(HEADERS), "fixed"),
                        interactive=True,
                        show_label=False,
                        elem_id="table",
                    )
                    undo = gr.Button("Discard all corrections")
                gr.HTML("<b>Download the boxes</b>")
                with gr.Row():
                    buttons = {format: gr.Button(name, size="md", min_width=90) for name, format in DOWNLOADS.items()}

        shown = [summary, drawn, crops, table, *selection]
        sliders = [threshold, iou]
        private: dict[str, Any] = {"api_visibility": "private"}
        model: dict[str, Any] = private | {"concurrency_limit": 1, "concurrency_id": "model", "preprocess": False}
        light: dict[str, Any] = private | {"concurrency_limit": 4, "concurrency_id": "light", "show_progress": "hidden"}
        find = (reported(call.find), [image, text, *sliders], [answer, corner, *shown])
        for finding in (gr.on([text.submit, run.click], *find, **model), samples.load_input_event.then(*find, **model)):
            finding.success(None, js=SHOW, **private)
        image.upload(reported(call.check), image, image, **light, preprocess=False)
        gr.on([url.submit, load.click], reported(call.fetch), url, image, **private, concurrency_limit=4)
        for slider in sliders:
            slider.input(reported(call.redraw), [answer, *sliders], shown, **light, trigger_mode="always_last")
        hand = light | {"concurrency_limit": 1, "concurrency_id": "hand", "trigger_mode": "multiple"}  # none is lost
        corrected = [answer, corner, *shown]
        table.input(reported(call.edit), [answer, table, *selection, *sliders], corrected, **hand)
        undo.click(reported(call.undo), [answer, *sliders], corrected, **hand)
        drawn.select(reported(call.corner), [answer, corner, phrase, *sliders], corrected, **hand)
        for format, button in buttons.items():
            saved = button.click(reported(partial(call.download, format)), [answer, *sliders], file, **light)
            saved.success(None, file, js=SAVE, **private)
    page.queue(max_size=QUEUE_SIZE)
    return page


def launch(page: gr.Blocks, host: str, port: int | None, share: bool) -> tuple[str, str | None]:
    """Start to serve a page in a thread; return its URL and its public URL, if any.

    Raises:
        ConfigError: the port is taken, or all that Gradio tries. Other addresses are refused by `check_address`.
    """
    theme = gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], primary_hue="blue"
    )  # fonts of the system: no request to another host
    try:
        _, url, public_url = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            theme=theme,
            css=CSS,
            max_file_size=MAX_BYTES,
            state_session_capacity=NUM_SESSIONS,
            app_kwargs={"middleware": [Middleware(Guard)]},
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            inline=False,
        )
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}, port {port or 'from 7860 on'}; choose another one by --port"
        ) from error
    return url, public_url


def serve(grounder: Grounder, title: str, host: str, port: int | None, share: bool) -> None:
    """Serve the page of a model until the process is interrupted; raises as `launch`."""
    stop_like_ctrl_c()
    with folder_of_server():
        page = new_page(grounder, title)
        url, public_url = launch(page, host, port, share)
        print(f"{title}: {url} (Ctrl-C stops)", flush=True)
        if public_url:
            print(f"for everybody: {public_url}", flush=True)
        page.block_thread()
