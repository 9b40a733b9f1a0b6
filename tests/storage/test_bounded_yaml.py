"""YAML that is built to exhaust the reader, or to raise errors that are not YAML errors."""

import pytest

from ecar_dist.storage.bounded_yaml import MAX_DEPTH, MAX_NODES, parse_yaml
from ecar_dist.storage.untrusted import UntrustedError


def aliases(levels, each):
    """`each` ** `levels` values in a few lines."""
    lines = [f"a0: &a0 [{','.join('x' * each)}]"]
    lines += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * each)}]" for n in range(1, levels)]
    return "\n".join(lines)


REFUSED = {
    "aliases of aliases": aliases(9, 9),
    "an alias of itself": "a: &a [*a]",
    "a mapping that holds itself": "a: &a {b: *a}",
    "many aliases of a long text": f"a: &a {'x' * 1000}\nb: [{','.join(['*a'] * (MAX_NODES // 10))}]",
    "3,000 lists": "[" * 3000,
    "3,000 mappings": "{a: " * 3000,
    "3,000 dashes": "- " * 3000,
    "one list too many": "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
    "too many values": f"[{'x,' * MAX_NODES}x]",
    "an integer of 400 digits": f"a: {'9' * 400}",
    "an integer of 5,000 digits": f"a: {'9' * 5000}",
    "a negative one": f"a: -{'9' * 400}",
    "a sexagesimal one": f"a: {':'.join(['59'] * 200)}",
    "a sexagesimal one of a megabyte": f"a: 1{':59' * 300_000}",
    "a word as integer": "a: !!int abc",
    "nothing as float": 'a: !!float ""',
    "a word as boolean": "a: !!bool abc",
    "a list as integer": "a: !!int [1]",
    "a list as mapping": "a: !!map [1]",
    "a mapping as list": "a: !!seq {b: 1}",
    "a timestamp": "a: !!timestamp 2020-01-01",
    "bytes": "a: !!binary aGFsbG8=",
    "a set": "a: !!set {b}",
    "an ordered map": "a: !!omap [b: 1]",
    "pairs": "a: !!pairs [b: 1]",
    "an object": "a: !!python/object:os.system {}",
    "a merge key": "a: &a {b: 1}\nc: {<<: *a}",
    "half of a surrogate pair": 'a: "\\ud800"',
    "an escape": 'a: "\\x1b[31m"',
    "an escape beyond Unicode": 'a: "\\U00110000"',
    "an escape beyond all numbers": 'a: "\\UFFFFFFFF"',
    "an escape in a key": '"a\\x1b": 1',
    "a newline in a key": '"a\\nb": 1',
    "a key that is a list": "? [1]\n: 2",
    "a number as key": "1: 2",
    "a key given twice": "a: 1\na: 2",
    "two documents": "a: 1\n---\nb: 2",
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_one_short_line(name):
    with pytest.raises(UntrustedError) as caught:
        parse_yaml(REFUSED[name])
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1e-4", {"a": 1e-4}),
        ("a: 2024-13-45", {"a": "2024-13-45"}),
        ("a: 2024-01-02", {"a": "2024-01-02"}),
        ("a: &x [1, 2]\nb: *x", {"a": [1, 2], "b": [1, 2]}),
        (f"a: {2**63 - 1}", {"a": 2**63 - 1}),
        ("a: {b: [true, null, .5, '1', off]}", {"a": {"b": [True, None, 0.5, "1", False]}}),
        ("[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1), None),
        ("", None),
        ("# nothing\n", None),
    ],
)
def test_plain_yaml_is_read(text, value):
    assert parse_yaml(text) == value or value is None


def test_the_loader_of_pyyaml_is_not_changed():
    import datetime

    import yaml

    assert yaml.safe_load("a: 2024-01-02") == {"a": datetime.date(2024, 1, 2)}
