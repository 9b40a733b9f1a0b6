"""The cost of a checkpoint of many ranks: `scale_checkpoints.py [--ranks 64 512] [--preset 7B] [--zero-stage 3]`.

All tensors of the preset, each reduced to a few values per rank, because the costs depend on fragments and files, not
on bytes. A few ranks write with the product's code; the files of the others are made from a template with the same
format. Then rank 0 commits, and the checkpoint is listed, verified and restored. Seconds are CPU seconds of one
process. The bytes that a node copies from a bucket under a different ZeRO stage or number of ranks are computed for
the true sizes.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rounds

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
VALUES_A_RANK = 2  # of each tensor
WRITERS = 4  # ranks whose files the product's code writes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 512], help="numbers of ranks (default: 64 512)")
    parser.add_argument("--preset", default="7B", help="the model whose tensors are written (default: 7B)")
    parser.add_argument("--zero-stage", type=int, default=3, choices=(2, 3), help="the layout (default: 3)")
    parser.add_argument("--save", type=Path, help="also write the result to this JSON file")
    options = parser.parse_args()

    true_shapes = shapes_of(options.preset)
    names = list(true_shapes)
    rows = {}
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            rows[ranks] = measure(Path(folder), names, ranks, options.zero_stage)
        for name, stage, others in (
            ("the other stage", 5 - options.zero_stage, ranks),
            ("3/4 of the ranks", options.zero_stage, 3 * ranks // 4),
        ):
            rows[ranks][f"copied over own, {name}"] = copied_over_own(
                true_shapes, options.zero_stage, ranks, stage, others
            )
        print(f"{ranks:,} ranks: {rows[ranks]}", flush=True)
    result = {"preset": options.preset, "zero_stage": options.zero_stage, "tensors": len(names), "ranks": rows}
    rounds.publish({**result, "hardware": rounds.hardware()}, options.save)


def shapes_of(preset: str) -> dict[str, tuple[int, ...]]:
    """The parameters of the ECAR model of a preset, by name."""
    from ecar_dist.config.read import config_from_dict
    from ecar_dist.kinds.table import KINDS

    tree: dict[str, Any] = {
        "run": {"name": "scale", "dir": "runs"},
        "model": {"preset": preset},
        "vae": {"kind": "dct", "downsample": 8},
        "data": {"latents": "none", "num_classes": 1000, "latent_size": 32},
        "train": {"total_samples": 1000},
    }
    with torch.device("meta"):
        model = KINDS["ecar"].build_model(config_from_dict(tree))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def measure(folder: Path, names: list[str], ranks: int, zero_stage: int) -> dict[str, float]:
    """The cost of one save and of its readers."""
    from ecar_dist.runtime.checkpoint.files import read_manifest, verify
    from ecar_dist.runtime.checkpoint.folder import LocalStorage
    from ecar_dist.runtime.checkpoint.reader import FragmentReader
    from ecar_dist.runtime.checkpoint.restore import needed_by
    from ecar_dist.runtime.checkpoint.save import Outcome, Target, commit

    shapes = dict.fromkeys(names, (VALUES_A_RANK * ranks,))
    storage = LocalStorage(folder)
    target = Target(storage.new_checkpoint(8, "attempt"), KINDS)
    found: dict[str, float] = {}

    # Some ranks write with the product's code; a rank's message to the others is pickled, as in the collective.
    written_by_code = sorted({*range(0, ranks, -(-ranks // WRITERS)), ranks - 1})
    with cpu_seconds(found, "write, a rank", len(written_by_code)):
        entries = {rank: write(target, shapes, rank, ranks, zero_stage) for rank in written_by_code}
    found["told by a rank, bytes"] = max(len(pickle.dumps(Outcome((entry,)))) for entry in entries.values())
    for rank in range(ranks):
        fragments = fragments_of(shapes, rank, ranks, zero_stage)
        path = folder / "tmp-step-00000008-attempt" / file_of(rank, ranks)
        target.files.append(entries.get(rank) or imitate(path, fragments, next(iter(entries.values())), rank, ranks))

    # Rank 0.
    with cpu_seconds(found, "commit"):
        commit([target], manifest_of(shapes, ranks, zero_stage), lambda: True, str(folder))
    path = folder / "step-00000008"
    found["manifest, MiB"] = (path / "checkpoint.json").stat().st_size / 2**20
    with cpu_seconds(found, "list"):
        assert storage.complete()

    # A rank verifies its share and reads what it needs.
    fragments = fragments_of(shapes, ranks // 2, ranks, zero_stage)
    with cpu_seconds(found, "prove, a rank"):
        verify(path, ranks // 2, ranks)
    with cpu_seconds(found, "read, a rank"):
        reader = FragmentReader(path, needed_by(fragments), read_manifest(path))
        for fragment in fragments:
            for kind in KINDS:
                reader.read(kind, fragment.name, fragment.start, fragment.numel)

    # One process verifies all files.
    with cpu_seconds(found, "verify"):
        verify(path)
    return {key: round(value, 4) for key, value in found.items()}


def copied_over_own(
    shapes: dict[str, tuple[int, ...]], written_stage: int, written_by: int, stage: int, ranks: int
) -> dict[str, float]:
    """Bytes that a node of 8 ranks copies from a bucket over those of its own state: by parts, and by complete files.

    It is the node in the middle. The files are laid out as in a save, without their values.
    """
    from ecar_dist.runtime.checkpoint.restore import intervals_of

    middle = ranks // 16 * 8
    node = [fragment for rank in range(middle, middle + 8) for fragment in fragments_of(shapes, rank, ranks, stage)]
    wanted = intervals_of(node)
    files = [
        copied_of_file(fragments_of(shapes, rank, written_by, written_stage), wanted) for rank in range(written_by)
    ]
    own = 4 * len(KINDS) * sum(fragment.numel for fragment in node)
    return {name: round(sum(found[place] for found in files) / own, 3) for place, name in enumerate(("parts", "files"))}


def copied_of_file(fragments: list[Any], wanted: Any) -> tuple[int, int]:
    """Bytes that are copied from the file with these fragments: by parts, and in full; 0 if none of it is needed."""
    from ecar_dist.runtime.checkpoint.bucket import _MOSTLY, PART_BYTES
    from ecar_dist.runtime.checkpoint.manifest import Piece, overlaps
    from ecar_dist.storage.parts import PartTable, table_bytes

    # Where the needed values are: fragment by fragment, kind by kind.
    header, needed, ranges, end = 8, 0, [], 0
    for fragment in fragments:
        piece = Piece(fragment.name, fragment.start, fragment.numel)
        found = list(overlaps(piece, wanted))
        needed += sum(high - low for low, high in found)
        for kind in KINDS:
            header += len(kind) + len(piece.name) + len(f'"::{piece.start}"{tensor_header(piece.numel, end)},')
            first = end - 4 * piece.start
            ranges += [(first + 4 * low, first + 4 * high) for low, high in found]
            end += 4 * piece.numel
    if not needed:
        return 0, 0

    # The header, the table, and complete parts; or the complete file.
    size = header + end + table_bytes(end, PART_BYTES)
    if needed > _MOSTLY * sum(fragment.numel for fragment in fragments):
        return size, size
    table = PartTable(0, end, PART_BYTES, b"")
    bounds = [table.bounds(part, part) for part in table.parts_of(ranges)]
    return size - end + sum(stop - start for start, stop in bounds), size


def tensor_header(numel: int, start: int) -> str:
    return f':{{"dtype":"F32","shape":[{numel}],"data_offsets":[{start},{start + 4 * numel}]}}'


def file_of(rank: int, ranks: int) -> str:
    return f"state-{rank:05d}-of-{ranks:05d}.safetensors"


def write(target: Any, shapes: dict[str, tuple[int, ...]], rank: int, ranks: int, zero_stage: int) -> dict[str, Any]:
    """The manifest entry of a rank's file, written as in training."""
    from ecar_dist.runtime.checkpoint.save import RankShare

    fragments = fragments_of(shapes, rank, ranks, zero_stage)
    values = torch.zeros(sum(fragment.numel for fragment in fragments))
    even = (rank, ranks) if zero_stage == 3 else None
    copies = {kind: [values] for kind in KINDS}
    return RankShare(file_of(rank, ranks), 8, fragments, copies, threading.Event(), even).write(target)


def imitate(path: Path, fragments: list[Any], like: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """The same for zeros, without the work per tensor."""
    header, end = {}, 0
    for fragment in fragments:
        for kind in KINDS:
            stop = end + 4 * fragment.numel
            name = f"{kind}:{fragment.name}:{fragment.start}"
            header[name] = {"dtype": "F32", "shape": [fragment.numel], "data_offsets": [end, stop]}
            end = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    content = len(text).to_bytes(8, "little") + text + bytes(end)
    path.write_bytes(content)
    entry = {"name": path.name, "bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
    if "share" in like:
        return {**entry, "share": (rank, ranks)}
    return {**entry, "fragments": [f"{one.name}:{one.start}:{one.numel}" for one in fragments]}


def fragments_of(shapes: dict[str, tuple[int, ...]], rank: int, ranks: int, zero_stage: int) -> list[Any]:
    """What a rank has: an equal part of every tensor under ZeRO 3, else a range of all of them laid end to end."""
    from ecar_dist.runtime.engine import Fragment

    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = sum(sizes.values())
    fragments, offset, held = [], 0, 0
    for name, size in sizes.items():
        if zero_stage == 3:
            share = -(-size // ranks)
            low, high = min(rank * share, size), min((rank + 1) * share, size)
        else:
            low = min(max(rank * total // ranks - offset, 0), size)
            high = min(max((rank + 1) * total // ranks - offset, 0), size)
        offset += size
        if low < high:
            fragments.append(Fragment(name, low, high - low, 0, held))
            held += high - low
    return fragments


def manifest_of(shapes: dict[str, tuple[int, ...]], ranks: int, zero_stage: int) -> dict[str, Any]:
    averages = {"ema": "half-life 1000"}
    return {
        "progress": {"samples_seen": 8 * ranks, "step": 8},
        "notes": {},
        "run": "scale",
        "identity": {"model": {}, "data": {}},
        "averages": averages,
        "averages_since": dict.fromkeys(averages, 0),
        "shapes": shapes,
        "world_size": ranks,
        "zero_stage": zero_stage,
        "precision": "bf16",
    }


@contextmanager
def cpu_seconds(found: dict[str, float], name: str, parts: int = 1) -> Iterator[None]:
    began = time.process_time()
    yield
    found[f"{name}, s"] = (time.process_time() - began) / parts


if __name__ == "__main__":
    main()
