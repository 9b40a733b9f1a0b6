"""Reads a configuration: defaults < YAML file < `a.b=c` overrides. Every error is one line.

An unknown key is an error that names the nearest known one. Messages contain no secrets. Of a long
value they show only the first characters.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ecar_dist.config.run import RunConfig
from ecar_dist.errors import ConfigError
from ecar_dist.storage.bounded_yaml import MAX_DEPTH, parse_yaml
from ecar_dist.storage.redaction import redact_text, redact_tree
from ecar_dist.storage.untrusted import UntrustedError, printable, read_plain_file

MAX_CONFIG_BYTES = 1 << 20
SHOWN_VALUE = 80  # characters of a value that a message shows
SHOWN_MESSAGE = 600
SEARCHED = 1 << 15  # leading characters of a text that are searched for secrets before it is shortened


def load_config(path: str | os.PathLike[str], overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file and apply `a.b=c` overrides. Raises ConfigError with a one-line message for any error."""
    shown = _shorten(os.fspath(path))

    # the file: regular, small, UTF-8, and YAML within the limits
    try:
        tree = parse_yaml(read_plain_file(Path(path), MAX_CONFIG_BYTES).decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config {shown}: {error.strerror}; give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{shown} is not a text file in UTF-8; give the path of a YAML file") from None
    except UntrustedError as error:
        raise ConfigError(_not_yaml(shown, str(error))) from None

    # its sections
    if tree is None:
        raise ConfigError(f"{shown} is empty; write the sections run:, vae:, data: and train:, or copy one of configs/")
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{shown} contains a {type(tree).__name__}, not sections; write run:, vae:, data: and train:, or copy "
            "one of configs/"
        )
    for override in overrides:
        _apply_override(tree, override)
    return config_from_dict(tree)


def _not_yaml(shown: str, problem: str) -> str:
    if problem.startswith("line "):
        where, _, problem = problem.partition(": ")
        return f"{shown} {where} is not valid YAML: {redact_text(problem)}; fix that line"
    return f"{shown} cannot be used: {redact_text(problem)}; give a YAML file of at most {MAX_CONFIG_BYTES:,} bytes"


def config_from_dict(tree: dict[str, Any]) -> RunConfig:
    """Validate a nested dict. Raises ConfigError with the first broken rule."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_shorten(_explain(error), SHOWN_MESSAGE)) from None


def with_overrides(config: RunConfig, overrides: Mapping[str, Any]) -> RunConfig:
    """The config with other values, by dotted key of an existing knob. Raises ConfigError like `config_from_dict`."""
    tree = config.model_dump(mode="json")
    for dotted, value in overrides.items():
        *parents, leaf = dotted.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return config_from_dict(tree)


def config_to_yaml(config: RunConfig) -> str:
    """The resolved config as a file that `load_config` reads back. It contains the secrets of URLs: do not print it."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def shown_config(config: RunConfig) -> str:
    """The resolved config without secrets, for printing or for a file that others can read."""
    return _dump_without_secrets(config.model_dump(mode="json"))


def shown_yaml(text: str) -> str:
    """The output of `config_to_yaml` without secrets. Raises UntrustedError if it is not YAML within the limits."""
    return _dump_without_secrets(parse_yaml(text))


def _dump_without_secrets(tree: Any) -> str:
    return yaml.safe_dump(redact_tree(tree), sort_keys=False)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    # section.field = text
    dotted, equals, text = override.partition("=")
    shown = _shorten(repr(override))
    if not equals or not dotted:
        raise ConfigError(f"override {shown} must look like section.field=value, e.g. train.total_samples=4096")
    *parents, leaf = dotted.split(".")
    if len(parents) >= MAX_DEPTH:
        raise ConfigError(f"override {shown} is nested deeper than {MAX_DEPTH}; check the dotted name")

    # the section, which may be missing in the file
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {shown}: {_shorten(parent)} is a value, not a section; check the dotted name")

    node[leaf] = override_value(dotted, text)


def override_value(dotted: str, text: str) -> Any:
    """The YAML value of `text`; for a text field, `text` itself: `run.name=off`, `run.name=1`.

    Raises ConfigError.
    """
    types = _types_of(dotted)
    quoted = text[:1] in ("'", '"')
    null = NoneType in types and text in ("", "~", "null")
    if str in types and not quoted and not null:
        return text
    try:
        return parse_yaml(text)
    except UntrustedError as error:
        shown = _shorten(repr(f"{dotted}={text}"))
        raise ConfigError(f"override {shown} is not a YAML value ({_shorten(str(error))}); quote it") from None


def _types_of(dotted: str) -> set[Any]:
    """The plain types of a field, e.g. {str, NoneType} of `str | None`. Empty for a section or an unknown key."""
    annotation: Any = RunConfig
    for part in dotted.split("."):
        is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        if not is_section or part not in annotation.model_fields:
            return set()
        annotation = annotation.model_fields[part].annotation

    # a union or the values of a Literal, without what Annotated adds
    one_of = get_args(annotation) if get_origin(annotation) in (Union, UnionType, Literal) else (annotation,)
    plain = [get_args(part)[0] if get_origin(part) is Annotated else part for part in one_of]
    return {type(part) if isinstance(part, str) else part for part in plain}


def _explain(error: ValidationError) -> str:
    """pydantic's first error in our words, with the dotted key."""
    errors = error.errors(include_url=False)
    first = errors[0]
    dotted, kind = _dotted(first["loc"]), first["type"]
    if kind == "extra_forbidden":
        return f"unknown config key {dotted}{_nearest(first['loc'])}"
    if kind == "missing":
        return _explain_missing(first, errors)

    # our own rules raise complete messages
    message = first["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return message

    if kind == "string_pattern_mismatch" and dotted == "run.name":
        message = "letters, digits, '.', '_' and '-' only, and a letter or digit first"
    if kind == "string_type":
        message += "; put it in quotes"
    return f"{dotted}={_value(first['input'])}: {message[0].lower()}{message[1:]}"


def _explain_missing(missing: ErrorDetails, errors: list[ErrorDetails]) -> str:
    """A required key that is missing, and an unknown key of the same section that may have been meant."""
    location, dotted = missing["loc"], _dotted(missing["loc"])
    unknown = [
        str(error["loc"][-1])
        for error in errors
        if error["type"] == "extra_forbidden" and error["loc"][:-1] == location[:-1]
    ]
    if close := difflib.get_close_matches(str(location[-1]), unknown, n=1, cutoff=0.5):
        found = _dotted((*location[:-1], close[0]))
        return f"config key {dotted} is required; {found} is not a config key: rename it to {location[-1]}"
    return f"config key {dotted} is required and has no default; set it in the YAML or as {dotted}=..."


def _nearest(location: tuple[str | int, ...]) -> str:
    """The known key nearest to an unknown one, or all known ones, as the end of a message."""
    section: Any = RunConfig
    for part in location[:-1]:
        # a number is an index into a list of sections
        section = get_args(section)[0] if isinstance(part, int) else section.model_fields[part].annotation
    known = list(section.model_fields)
    close = difflib.get_close_matches(str(location[-1])[:SHOWN_VALUE], known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {_dotted((*location[:-1], close[0]))}?"
    return f"; known here: {', '.join(known)}"


def _dotted(location: tuple[str | int, ...]) -> str:
    return ".".join(_shorten(str(part), SHOWN_VALUE) for part in location)


def _value(value: Any) -> str:
    return printable(repr(redact_tree(value)), SHOWN_VALUE)


def _shorten(text: str, limit: int = 3 * SHOWN_VALUE) -> str:
    """Printable, without secrets, and at most `limit` characters; text far beyond that is not even searched."""
    return printable(redact_text(text[:SEARCHED]), limit)
