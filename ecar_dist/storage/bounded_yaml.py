"""YAML from untrusted sources, with limits: plain data only, and nothing that expands when it is read.

PyYAML's safe loader creates plain data only. But a few hundred bytes can expand to gigabytes (aliases of aliases),
exhaust the stack (nesting) or raise errors that are not YAML errors (`2024-13-45`, `!!int abc`, 5,000 digits).
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from ecar_dist.storage.redaction import redact_text
from ecar_dist.storage.untrusted import CONTROL_CHARACTER, UntrustedError, printable

MAX_NODES = 20_000  # values and keys, counting each use of an alias; a config has about 150
LONG_TEXT = 64  # characters: a text counts as one more value for every so many
MAX_DEPTH = 32
INTEGER_LIMIT = 1 << 63
LONGEST_NUMBER = 100  # characters; base 60 (`1:59:59`) takes quadratic time
_TAG = "tag:yaml.org,2002:"
_CORE_TAGS = ("null", "bool", "int", "float", "str", "seq", "map")


_WORDS = {"null": "null", "bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}
_Refused = yaml.constructor.ConstructorError  # (None, None, what is wrong, where)


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader with limits. `1e-4` is a number, a date is text, and a key given twice is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = 0
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}  # number of nodes in the subtree of a node, including itself

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As in PyYAML, with the limits. The value of an alias counts again each time it is used."""
        mark = self.peek_event().start_mark
        is_alias = self.check_event(yaml.AliasEvent)
        before = self._nodes

        # depth, before PyYAML recurses
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _Refused(None, None, f"it is nested deeper than {MAX_DEPTH}", mark)

        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if is_alias and node not in self._sizes:
            raise _Refused(None, None, "an alias refers to a value that contains it", mark)

        # size, after PyYAML has recursed
        letters = len(node.value) if isinstance(node, yaml.ScalarNode) else 0
        self._nodes += self._sizes[node] if is_alias else 1 + letters // LONG_TEXT
        if self._nodes > MAX_NODES:
            raise _Refused(None, None, f"it has more than {MAX_NODES:,} values", mark)
        if not is_alias:
            self._sizes[node] = self._nodes - before
        return node


def _mapping(loader: _StrictLoader, node: yaml.Node) -> dict[str, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise _Refused(None, None, "it is not a mapping of keys to values", node.start_mark)
    tree: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            problem = f"key {_shown(key)} is not a name"
            raise _Refused(None, None, problem, key_node.start_mark)
        if key == "<<":
            raise _Refused(None, None, "merge keys (<<) are not supported, write the keys out", key_node.start_mark)
        if key in tree:
            problem = f"key {_shown(key)} is given twice"
            raise _Refused(None, None, problem, key_node.start_mark)
        tree[key] = loader.construct_object(value_node, deep=True)
    return tree


def _shown(value: Any) -> str:
    return printable(redact_text(repr(value)), 80)


def _scalar(kind: str) -> Any:
    """PyYAML's constructor of a scalar type, with all errors as YAML errors."""
    construct = yaml.SafeLoader.yaml_constructors[_TAG + kind]

    def constructor(loader: _StrictLoader, node: yaml.Node) -> Any:
        if kind in ("int", "float") and len(node.value) > LONGEST_NUMBER:
            problem = f"a number of {len(node.value):,} characters is too long, the limit is {LONGEST_NUMBER}"
            raise _Refused(None, None, problem, node.start_mark)
        try:
            value = construct(loader, node)
        except (ValueError, KeyError, IndexError, OverflowError):
            raise _Refused(None, None, f"{_shown(node.value)} is not {_WORDS[kind]}", node.start_mark) from None
        if kind == "int" and not -INTEGER_LIMIT < value < INTEGER_LIMIT:
            problem = f"a number of {len(node.value)} characters is too large, the largest one is 2^63 - 1"
            raise _Refused(None, None, problem, node.start_mark)
        if kind == "str" and (found := CONTROL_CHARACTER.search(value)):
            problem = f"a text contains the control character U+{ord(found[0]):04X}"
            raise _Refused(None, None, problem, node.start_mark)
        return value

    return constructor


# copies, because all loaders of the process share PyYAML's own tables
_StrictLoader.yaml_constructors = {
    **{_TAG + kind: _scalar(kind) for kind in ("null", "bool", "int", "float", "str")},
    _TAG + "seq": yaml.SafeLoader.yaml_constructors[_TAG + "seq"],
    _TAG + "map": _mapping,
    None: yaml.SafeLoader.yaml_constructors[None],
}
_StrictLoader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag.removeprefix(_TAG) in _CORE_TAGS]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(_TAG + "float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def parse_yaml(text: str) -> Any:
    """The value of a YAML document: dicts with text keys, lists, text, finite or infinite numbers, booleans and None.

    Raises UntrustedError, which names the line if it is known.
    """
    try:
        loader = _StrictLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        # not every YAML error has a `problem`
        problem = printable(redact_text(str(getattr(error, "problem", None) or error).splitlines()[0]))
        raise UntrustedError(f"line {mark.line + 1}: {problem}" if mark else problem) from None
    except RecursionError:
        raise UntrustedError(f"it is nested deeper than {MAX_DEPTH}") from None
    except (OverflowError, ValueError) as error:  # raised by PyYAML for an escape such as \UFFFFFFFF
        raise error if isinstance(error, UntrustedError) else UntrustedError("an escape is not a character") from None
