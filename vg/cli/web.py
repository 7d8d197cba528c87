"""`vg web`: a page in the browser to try a model."""

from __future__ import annotations

import argparse
from pathlib import Path

from vg.cli.arguments import MODEL_HELP, add_model_overrides, add_runtime, open_grounder
from vg.errors import ConfigError

EPILOG = """
The page is served to this machine only; with --host 0.0.0.0 to everybody who reaches it, without passwords. URLs of
images are fetched from public addresses only. The environment variable VG_MAX_PIXELS limits the size of images.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("checkpoint", metavar="MODEL", help=MODEL_HELP)
    add_model_overrides(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, help="port to listen on (default: the first free one from 7860 on)")
    parser.add_argument("--share", action="store_true", help="also open a public link, through a server of Gradio")
    add_runtime(parser)


def _port(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text} is not a port from 1 to 65535")
    return int(text)


def run(options: argparse.Namespace) -> None:
    try:
        from vg.web.guard import check_address
        from vg.web.page import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ConfigError("vg web needs gradio: pip install gradio") from error
    check_address(options.host, options.port)  # before minutes of loading a model
    grounder = open_grounder(options)
    is_local = Path(options.checkpoint).exists()
    title = Path(options.checkpoint).resolve().name if is_local else options.checkpoint  # not the path of this machine
    serve(grounder, title, options.host, options.port, options.share)
