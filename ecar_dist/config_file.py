"""Read a configuration: defaults < YAML file < `a.b=c` overrides, and whatever is wrong is said in one line.

An unknown key is an error that names its nearest neighbour.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ecar_dist.config import RunConfig
from ecar_dist.errors import ConfigError


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, with two differences: `1e-4` is a number, and a key given twice is an error."""


def _mapping_without_duplicates(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is no name", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def load_config(path: str | os.PathLike[str], overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file and apply `a.b=c` overrides. Raises ConfigError, one line, for whatever is wrong."""
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}; give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file; give the path of a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where} is not valid YAML: {_problem(error)}; mend that line") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections (run:, data:, train:, ...), got {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    return config_from_dict(tree)


def _problem(error: yaml.YAMLError) -> str:
    """What is wrong, on one line: not every YAML error has a `problem`."""
    return str(getattr(error, "problem", None) or error).splitlines()[0]


def config_from_dict(tree: dict[str, Any]) -> RunConfig:
    """Validate a nested dict. Raises ConfigError with the first broken rule."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def config_to_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override {override!r} must look like section.field=value, e.g. train.total_samples=4096")
    *parents, leaf = dotted.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a section; check the dotted name")
    try:
        node[leaf] = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value; quote it") from None


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    dotted = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown config key {dotted}{_nearest(first['loc'])}"
    if first["type"] == "missing":
        return f"config key {dotted} is required and has no default; set it in the YAML or as {dotted}=..."
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return message
    return f"{dotted}={first['input']!r}: {message[0].lower()}{message[1:]}"


def _nearest(location: tuple[str | int, ...]) -> str:
    section: Any = RunConfig
    for part in location[:-1]:
        section = section.model_fields[str(part)].annotation
    known = list(section.model_fields)
    close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {'.'.join([*map(str, location[:-1]), close[0]])}?"
    return f"; known here: {', '.join(known)}"
