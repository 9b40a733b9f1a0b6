"""Checkpoints edited by somebody who can also compute the hashes, so that only the content is wrong."""

import json
import os
import signal
from contextlib import contextmanager

import torch
import xxhash
from safetensors.torch import load_file, save_file

from ecar_dist.runtime.checkpoint.files import MANIFEST, MARKER, marker_of

HUGE = 40 << 30
SECONDS = 20  # time limit for everything that is done with one checkpoint


def recommit(path, text):
    """Write `text` (str or bytes) to checkpoint.json, and its hash to COMMITTED."""
    text = text if isinstance(text, bytes) else text.encode()
    (path / MANIFEST).write_bytes(text)
    (path / MARKER).write_bytes(marker_of(text))


def edit_manifest(path, change):
    """`change` gets the tree of checkpoint.json, and may return a new one."""
    tree = json.loads((path / MANIFEST).read_text())
    recommit(path, json.dumps(change(tree) or tree))


def edit_tensors(path, change):
    """`change` gets the tensors of the first rank's file by key, and may return new ones."""
    file = sorted(path.glob("*.safetensors"))[0]
    tensors = load_file(file)
    save_file(change(tensors) or tensors, file)
    rehash(path, file)


def rehash(path, file):
    content = file.read_bytes()

    def say(tree):
        (entry,) = [entry for entry in tree["files"] if entry["name"] == file.name]
        entry.update(bytes=len(content), xxh3_128=xxhash.xxh3_128_hexdigest(content))

    edit_manifest(path, say)


def put(*keys, value):
    """A change of a tree: set the place that `keys` lead to, to `value`."""

    def change(tree):
        *front, last = keys
        for key in front:
            tree = tree[key]
        tree[last] = value

    return lambda path: edit_manifest(path, change)


def drop(key):
    return lambda path: edit_manifest(path, lambda tree: tree.pop(key) and None)


def text(content):
    return lambda path: recommit(path, content)


def tensors(change):
    return lambda path: edit_tensors(path, change)


def tensor(key, make):
    """Replace one tensor of the first file by `make` of its old value."""
    return tensors(lambda held: held.update({key: make(held[key])}))


def bytes_of_weights(change):
    """Change the bytes of the first file."""

    def edit(path):
        file = sorted(path.glob("*.safetensors"))[0]
        file.write_bytes(change(file.read_bytes()))
        rehash(path, file)

    return edit


def instead(name, make):
    """Replace a file by something else: `make` is called with its path."""

    def edit(path):
        file = sorted(path.glob(name))[0]
        content = file.read_bytes()
        file.unlink()
        make(file, content)

    return edit


def sparse(file, _):
    file.touch()
    os.truncate(file, HUGE)


def link_out(file, content):
    """The target of the link is valid."""
    target = file.parents[2] / f"outside-{file.name}"
    target.write_bytes(content)
    file.symlink_to(target)


def pipe(file, _):
    os.mkfifo(file)


def folder(file, _):
    file.mkdir()


def device(file, _):
    file.symlink_to("/dev/zero")


def loop(file, _):
    file.symlink_to(file.name)


def gone(file, _):
    """There is no file."""


def sparse_weights(path):
    """40 GiB of zeros that the shapes account for: a header that was cut off."""
    file = sorted(path.glob("*.safetensors"))[0]
    os.truncate(file, HUGE)

    def say(tree):
        tree["shapes"]["z"] = [HUGE // 4]
        tree["files"][0].update(bytes=HUGE, xxh3_128="0" * 32)
        tree["files"][0]["fragments"].append(f"z:0:{HUGE // 4}")

    edit_manifest(path, say)


def moved(start, numel):
    """Change the second file's piece of `a`, elements 19 to 24, both in the file and in the manifest."""

    def edit(path):
        file = sorted(path.glob("*.safetensors"))[1]
        held = load_file(file)
        for kind in {key.partition(":")[0] for key in held}:
            values = held.pop(f"{kind}:a:19")
            if numel:
                held[f"{kind}:a:{start}"] = values.new_ones(numel)
        save_file(held, file)
        rehash(path, file)
        place = [f"a:{start}:{numel}"] if numel else []
        edit_manifest(path, lambda tree: tree["files"][1].update(fragments=[*place, "b:0:10", "c:0:3"]))

    return edit


OTHER_TYPES = (None, True, -1, 10**30, "x\n\x1b[2J", [None], {}, {"a": {"a": []}})
# for these fields, some of the values above are valid
FITTING = {
    "notes": ({}, {"a": {"a": []}}),
}
FIELDS = ("schema", "progress", "notes", "run", "identity", "averages", "averages_since", "shapes")
FIELDS += ("world_size", "zero_stage", "precision", "files")
FIRST = ("files", 0)
ODD_FRAGMENTS = ("a:b", "a", "", "a:-1:5", "a:0:-5", "a:0:0", "a:0:25", "a: 0:19", "x:0:19", "a:1:18", "a:0:18")
ODD_FRAGMENTS += ("a:0:" + "9" * 30, "a:0:1_9", "a:0:٣", 3, None, [])

EDITED = {
    **{f"{field} is not there": drop(field) for field in FIELDS},
    **{
        f"{field} is {value!r}": put(field, value=value)
        for field in FIELDS
        for value in OTHER_TYPES
        if value not in FITTING.get(field, ())
    },
    **{
        f"{count} is {value!r}": put("progress", count, value=value)
        for count in ("step", "samples_seen")
        for value in (-1, 10**30, 2**63, 1.5, "4", True, None, [])
    },
    "another step than its name": put("progress", "step", value=22),
    "identity without data": put("identity", value={"model": {}}),
    "no average": lambda path: edit_manifest(path, lambda tree: tree.update(averages={}, averages_since={})),
    "an average by another name": put("averages", "../x", value="y"),
    "averages_since of others": put("averages_since", "ema7", value=1),
    "a run of many words": put("run", value="x" * 1000),
    "ranks beyond number": put("world_size", value=10**9),
    **{
        f"the shape of a is {value!r}": put("shapes", "a", value=value)
        for value in ([-4, -6], [0], [4, 10**30], [4.0, 6], [[4, 6]], [], [24, 2], [1] * 99, [2**43, 2**43], "46")
    },
    "a shape without values": put("shapes", "d", value=[3]),
    "a name with a colon": put("shapes", "a:b", value=[1]),
    "a name with ESC": put("shapes", "a\x1b[2J", value=[1]),
    **{
        f"the file's name is {value!r}": put(*FIRST, "name", value=value)
        for value in ("../../../x", "/etc/passwd", "", "..", ".x", "COMMITTED", "a\n.safetensors", 3, None, "x" * 5000)
    },
    "a file twice": lambda path: edit_manifest(path, lambda tree: tree["files"].append(tree["files"][0])),
    **{f"bytes are {value!r}": put(*FIRST, "bytes", value=value) for value in (-1, 10**30, HUGE, "9", 1.5, None)},
    **{f"the hash is {value!r}": put(*FIRST, "xxh3_128", value=value) for value in ("", "0" * 31, "G" * 32, 3, None)},
    **{f"the first fragment is {value!r}": put(*FIRST, "fragments", 0, value=value) for value in ODD_FRAGMENTS},
    "a fragment twice": put(*FIRST, "fragments", value=["a:0:19", "a:0:19"]),
    "no fragment": put(*FIRST, "fragments", value=[]),
    "overlap and a gap of the same length": lambda path: edit_manifest(
        path, lambda tree: tree["files"][1].update(fragments=["a:14:5", "b:0:10", "c:0:3"])
    ),
    **{
        f"the note {section}.{name} is {value!r}": put("notes", value={section: {name: value}})
        for section, name, value in (
            ("goodput", "kept_seconds", 10**400),
            ("goodput", "kept_seconds", "3"),
            ("bad_steps", "good_norms", 3),
            ("bad_steps", "good_norms", ["1"]),
            ("bad_steps", "in_a_row", None),
            ("bad_steps", "windows", [[1]]),
            ("bad_steps", "windows", [[1, "2"]]),
        )
    },
    "notes that are a list": put("notes", value={"goodput": [], "bad_steps": []}),
    "a piece twice and a hole of its length": moved(14, 5),
    "a piece that is there already": moved(0, 5),
    "a piece that begins too late": moved(20, 4),
    "a piece beyond the end": moved(19, 6),
    "a piece that is too short": moved(19, 4),
    "a piece less": moved(19, 0),
    "NaN": text('{"schema": "ecar-checkpoint-v2", "world_size": NaN}'),
    "a key twice": lambda path: recommit(path, (path / MANIFEST).read_text().replace("{", '{"run": "x", ', 1)),
    "lists in lists": text("[" * 100_000),
    "objects in objects": text('{"a":' * 100_000),
    "a number of 5,000 digits": text('{"schema": "ecar-checkpoint-v2", "run": ' + "9" * 5000 + "}"),
    "not UTF-8": text(b"\xff\xfe{}"),
    "empty": text(""),
    "a list": text("[]"),
    "int32 for fp32": tensor("master:a:0", lambda held: held.view(torch.int32)),
    "fp16 for fp32": tensor("master:a:0", torch.Tensor.half),
    "fp64 for fp32": tensor("master:a:0", torch.Tensor.double),
    "two dimensions": tensor("master:a:0", lambda held: held.view(1, -1)),
    "no dimension": tensor("master:a:0", lambda held: held[0].clone()),
    "a value less": tensor("master:a:0", lambda held: held[:-1].clone()),
    "a value more": tensor("master:a:0", lambda held: torch.cat((held, held[:1]))),
    "a tensor less": tensors(lambda held: held.pop("master:a:0") is None),
    "a kind less in one file": tensors(lambda held: {key: held[key] for key in held if not key.startswith("ema:")}),
    **{
        f"a tensor {key!r} more": tensors(lambda held, key=key: held.update({key: torch.zeros(3)}))
        for key in ("a:b", "x", "", "master:a:-1", "master:a:0:0", "master:a:5", "ema:z:0", "a\x1b[2J:b:c", "::")
    },
    "no tensor": tensors(lambda held: {"x": held["master:a:0"]}),
    "a header that is cut": bytes_of_weights(lambda content: content[:40]),
    "a header of 2^62 bytes": bytes_of_weights(lambda content: (1 << 62).to_bytes(8, "little") + content[8:]),
    "a header that is not JSON": bytes_of_weights(lambda content: content[:8] + b"x" + content[9:]),
    "a tail": bytes_of_weights(lambda content: content + bytes(8)),
    "an empty file": bytes_of_weights(lambda _: b""),
    "40 GiB that the shapes account for": sparse_weights,
    **{
        f"{name}: {make.__name__}": instead(name, make)
        for name in (MARKER, MANIFEST, "*-of-00002.safetensors")
        for make in (pipe, folder, device, loop, link_out, sparse)
    },
    "checkpoint.json: gone": instead(MANIFEST, gone),
    "weights: gone": instead("*.safetensors", gone),
}

# the hashes are right; only loading shows that training cannot continue from these values
ODD_VALUES = {
    f"{value} in {kind}": tensor(f"{kind}:a:0", lambda held, value=value: held.index_fill(0, torch.tensor([3]), value))
    for kind, value in (
        *(
            (kind, value)
            for kind in ("master", "exp_avg", "exp_avg_sq", "ema")
            for value in (float("nan"), float("inf"))
        ),
        ("master", float("-inf")),
        ("exp_avg_sq", -1e-3),
    )
}


@contextmanager
def in_time():
    """Raises TimeoutError if the block takes too long: it must not wait for anything, or read anything large."""

    def late(*_):
        raise TimeoutError(f"not done within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
