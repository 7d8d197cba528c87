"""Base class of all settings: dataclasses that pydantic validates when a configuration is read."""

from __future__ import annotations

from typing import Any, ClassVar


class Settings:
    """Base of all settings (dataclasses): an unknown key is an error, where pydantic would drop it silently."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}


def by_name(value: Any) -> Any:
    """Accept the name alone for settings that are selected by `name`: `head: dense` for `head: {name: dense}`."""
    return {"name": value} if isinstance(value, str) else value
