"""Base class of all settings, YAML, and the check of a configuration's keys against the fields of such classes."""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar

import yaml

from vg.errors import closest

LARGEST_YAML, DEEPEST_YAML, MOST_VALUES = 2_000_000, 100, 200_000  # bytes or characters, levels, values
_TEXT = "tag:yaml.org,2002:str"
KeyPath = tuple[Any, ...]  # keys and list indices from the top of a configuration down to a value


class _UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings have every key once; the keys that `<<` merges may be overridden.

    Unlike in YAML 1.1, 010 and 1:30 are text instead of 8 and 90, and the keys no, yes and null are text, too.
    """

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        tag = super().resolve(kind, value, implicit)
        is_number = kind is yaml.ScalarNode and implicit[0] and tag.endswith((":int", ":float"))
        return _TEXT if is_number and re.search(r"^[-+]?0[\w]|:", value) else tag

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
                continue
            if key.tag.endswith((":bool", ":null")):
                key.tag = _TEXT
            first, line = lines.get((key.tag, key.value)), key.start_mark.line + 1
            if first is not None:
                raise yaml.YAMLError(f"the key `{key.value}` in line {line} is already in line {first}; remove one")
            lines[key.tag, key.value] = line
        return node


def read_yaml(path: Path) -> Any:
    """Parse a YAML file; raises OSError, or yaml.YAMLError for one that parse_yaml refuses or that is not UTF-8."""
    with path.open("rb") as file:
        content = file.read(LARGEST_YAML + 1)
    try:
        return parse_yaml(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise yaml.YAMLError(f"it is not encoded in UTF-8 ({error})") from error


def parse_yaml(text: str) -> Any:
    """Parse YAML.

    Raises:
        yaml.YAMLError: for invalid YAML, a key that a mapping has twice, and for documents that are far too large for
            settings: long, deep, or with aliases that repeat each other or themselves.
    """
    if len(text) > LARGEST_YAML:
        raise yaml.YAMLError(f"it has more than {LARGEST_YAML // 1000:,} kB; is it a file of settings?")
    try:
        values = yaml.load(text, _UniqueKeys)
    except RecursionError as error:
        raise yaml.YAMLError(f"it is nested deeper than {DEEPEST_YAML} levels") from error
    except ValueError as error:  # of Python, for a date or a number that does not exist
        raise yaml.YAMLError(str(error)) from error
    pending, count = [(values, 0)], 0
    while pending:
        value, depth = pending.pop()
        count += 1
        if depth > DEEPEST_YAML or count > MOST_VALUES:
            raise yaml.YAMLError(
                f"it is nested deeper than {DEEPEST_YAML} levels or has more than {MOST_VALUES:,} values; does an "
                "alias (*name) refer to itself or repeat others?"
            )
        if isinstance(value, str) and "\0" in value:
            raise yaml.YAMLError("a text has a NUL character, which no name or path can have")
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        pending += [(child, depth + 1) for child in children]
    return values


class Settings:
    """Base of all settings (dataclasses): unknown keys, which pydantic would drop, are errors, as are Inf and NaN."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}


def no_from_yaml(value: Any) -> Any:
    """Return "no" for a bare `no`, which YAML reads as false; other values as they are."""
    return "no" if value is False else value


def by_name(value: Any) -> Any:
    """Accept the name alone for settings that are selected by `name`: `head: dense` for `head: {name: dense}`."""
    return {"name": value} if isinstance(value, str) else value


def is_mapping_of_settings(value: Any) -> bool:
    """Whether a value maps names to settings, instead of being settings itself."""
    return isinstance(value, Mapping) and all(
        isinstance(item, Mapping) or dataclasses.is_dataclass(item) for item in value.values()
    )


def unknown_keys(values: Mapping[str, Any], config_type: type, path: KeyPath = ()) -> list[tuple[KeyPath, str]]:
    """Path and message of every key that is not a field of the dataclass, at any depth; suggests the closest field."""
    hints = typing.get_type_hints(config_type)
    found = []
    for key, value in values.items():
        if key not in hints or key.startswith("_"):
            names = [f.name for f in dataclasses.fields(config_type)]
            below = [f"{name}.{key}" for name in names for member in _members(hints[name]) if _has_field(member, key)]
            near = below or closest(key, names)
            advice = f"did you mean `{near[0]}`?" if near else f"expected one of {', '.join(names)}"
            found.append(((*path, key), f"unknown key; {advice}"))
        else:
            found += _unknown_below(value, hints[key], (*path, key))
    return found


def _unknown_below(value: Any, hint: Any, path: KeyPath) -> list[tuple[KeyPath, str]]:
    """Check the value of one key: settings, or a mapping or list of settings."""
    for member in _members(hint):
        is_list = typing.get_origin(member) is list and isinstance(value, list)
        if is_list or (typing.get_origin(member) is dict and is_mapping_of_settings(value)):
            item, entries = typing.get_args(member)[-1], enumerate(value) if is_list else value.items()
            return [found for key, entry in entries for found in _unknown_below(entry, item, (*path, key))]
    config_type, choices = _settings_type(hint, value)
    if choices:
        name = value if isinstance(value, str) else value.get("name")
        near = closest(name or "", choices)
        advice = f"did you mean `{near[0]}`? " if near else ""
        problem = "missing" if name is None else f"{name!r} is unknown"
        return [((*path, "name"), f"{problem}; {advice}expected one of {', '.join(choices)}")]
    return unknown_keys(value, config_type, path) if config_type is not None and isinstance(value, Mapping) else []


def _has_field(hint: Any, name: str) -> bool:
    return dataclasses.is_dataclass(hint) and name in {field.name for field in dataclasses.fields(hint)}


def _members(hint: Any) -> tuple[Any, ...]:
    """The member types of a union, or the single type."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _settings_type(hint: Any, value: Any) -> tuple[type | None, list[str]]:
    """The dataclass that a value selects; if its `name` matches none, the names to choose from."""
    members = [member for member in _members(hint) if isinstance(member, type) and dataclasses.is_dataclass(member)]
    named = {f.default: member for member in members for f in dataclasses.fields(member) if f.name == "name"}
    if not named or not isinstance(value, (str, Mapping)):
        return (members[0] if members else None), []
    name = value if isinstance(value, str) else value.get("name", next(iter(named)) if len(named) == 1 else None)
    return (named[name], []) if isinstance(name, str) and name in named else (None, sorted(map(str, named)))


def key_path(location: Sequence[str | int], values: Any) -> KeyPath:
    """The path of a pydantic error, without the names of types that pydantic inserts."""
    path: list[str | int] = []
    for depth, key in enumerate(location):
        inserted = isinstance(values, Mapping) and key not in values and depth < len(location) - 1
        if inserted or str(key).startswith("<"):  # as in "<one>"
            continue
        path.append(key)
        try:
            values = values[key]
        except (KeyError, IndexError, TypeError):  # this key is the missing one
            values = None
    return tuple(path)


def problem(error: Mapping[str, Any]) -> str:
    """Return the message of a pydantic error, with the value where YAML may have read another one than was meant."""
    value, message = error["input"], error["msg"]
    if error["type"] == "string_type" and isinstance(value, (bool, int, float, date, NoneType)):
        return f"{message}, got {value!r}, as YAML reads it; write text such as 'no' or '3' in quotes"
    return f"{message}, got {value!r:.80}" if error["type"] in ("int_parsing", "literal_error") else message


def as_overrides(overrides: str | Sequence[str]) -> Sequence[str]:
    """Return a single override as a list of one."""
    return [overrides] if isinstance(overrides, str) else overrides


def with_home(values: Any) -> Any:
    """Return a copy in which paths that begin with ~/ have the home folder instead."""
    if isinstance(values, Mapping):
        return {key: with_home(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [with_home(value) for value in values]
    return os.path.expanduser(values) if isinstance(values, str) and values.startswith("~/") else values


def all_attributes(value: Any) -> Any:
    """Return settings as nested dictionaries, with attributes that are not fields, and paths as text."""
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {key: all_attributes(entry) for key, entry in value.items()}
    return [all_attributes(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def changes(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted name, the old and the new value wherever nested mappings differ; None for a missing one."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys([*old, *new]):
            yield from changes(old.get(name), new.get(name), f"{path}{name}.")
    elif old != new:
        yield path[:-1], old, new


def differences(value: Any) -> Any:
    """Return the fields of settings that differ from their defaults, and the names that select settings."""
    if isinstance(value, Mapping):
        return {key: differences(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [differences(entry) for entry in value]
    if not dataclasses.is_dataclass(value):
        return value
    own = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    defaults = {
        f.name: f.default_factory() if callable(f.default_factory) else f.default for f in dataclasses.fields(value)
    }
    return {key: differences(entry) for key, entry in own.items() if key == "name" or entry != defaults[key]}
