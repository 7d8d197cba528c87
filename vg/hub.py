"""Access to the Hugging Face Hub: a quick answer without network, and one message that explains every failure."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from vg.errors import UserError
from vg.files import similar_paths

logger = logging.getLogger(__name__)

TIMEOUT = 5.0  # seconds for the first answer of the Hub


@contextmanager
def loading(location: str, setting: str, failure: type[UserError], kind: str = "model") -> Iterator[None]:
    """Load from a local path or the Hub within the context; without network, only files in the local cache are used.

    Args:
        location: local path or Hub id.
        setting: key of the configuration that names it, or the argument of a command.
        failure: raised for every exception in the context, with a message that explains the ways out.
        kind: of Hub repository: "model" or "dataset".
    """
    is_local = Path(location).exists()
    advice = f"set {setting} to its folder or Hub id"
    if not is_local:
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", location):
            problem = f"{location} ({setting}) does not exist"
            raise failure("; ".join(filter(None, [problem, advice, similar_paths(location)])))
        _check_network()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the libraries raise exceptions of many types
        if is_local:
            raise failure(f"{location} ({setting}) cannot be loaded: {_reason(error)}") from error
        if "/" in location and Path(location).parent.is_dir():  # such as runs/demo, which is also a valid Hub id
            raise failure(
                f"{location} ({setting}) does not exist; {similar_paths(location) or advice}\n"
                f"As a Hub id, it cannot be loaded either: {_hub_reason(error)}"
            ) from error
        option = "" if kind == "model" else f" --repo-type {kind}"
        raise failure(
            f"{location} ({setting}) is neither a local path nor can it be loaded from the Hugging Face Hub: "
            f"{_hub_reason(error)}\nWithout access from here, run `hf download {location}{option} --local-dir FOLDER` "
            f"on another machine, copy the folder, and set {setting} to it"
        ) from error


@lru_cache(maxsize=1)
def _check_network() -> None:
    """Use only cached files from now on if the Hub does not answer: its client would retry every file for minutes."""
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return
    try:
        if get_session().head(constants.ENDPOINT, timeout=TIMEOUT).status_code < 500:
            return
    except Exception as error:  # of the HTTP library, which differs between versions of huggingface_hub
        logger.warning("the Hugging Face Hub cannot be reached (%s); only cached files are used", error)
    os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries that are imported later, and worker processes
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def _reason(error: BaseException) -> str:
    """Return the message of an error, without advice to run the code of a checkpoint."""
    if "trust_remote_code" in str(error):
        return "it needs the Python code that comes with it, which vg never runs"
    return str(error).strip() or type(error).__name__


def _hub_reason(error: BaseException) -> str:
    """Explain the first cause of an exception that is known."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, GatedRepoError):
            return "it is gated: request access on its page, then log in with `hf auth login`"
        if isinstance(cause, RepositoryNotFoundError):
            return "there is no such id, or it is private: correct it, or log in with `hf auth login`"
        if isinstance(cause, RevisionNotFoundError):
            return "it has no such revision"
        cause = cause.__cause__ or cause.__context__
    if constants.is_offline_mode():
        first = _reason(error).partition("\n")[0]
        return f"there is no network (or HF_HUB_OFFLINE is set), and it is not in the local cache ({first})"
    return f"{_reason(error)}\nIf access to it is restricted, log in with `hf auth login`"
