"""A thousand random checkpoints: every value is in exactly one file, and any other layout reads the same back."""

import json
import math
import os
import random
import threading
from collections import Counter

import fsspec
import pytest
import torch

from ecar_dist.runtime.checkpoint import bucket as checkpoint_bucket
from ecar_dist.runtime.checkpoint import manifest as checkpoint_manifest
from ecar_dist.runtime.checkpoint.bucket import BucketStorage
from ecar_dist.runtime.checkpoint.files import read_manifest
from ecar_dist.runtime.checkpoint.folder import LocalStorage
from ecar_dist.runtime.checkpoint.restore import intervals_of, load_fragments, needed_by
from ecar_dist.runtime.checkpoint.save import RankShare, Target, commit, even_share, state_by_kind
from ecar_dist.runtime.ema import ShardedEma
from tests.runtime.checkpoint.worlds import State, make_config

CASES = 1000
LAYOUTS = {0: {"replicated": True}, 1: {"zero_stage": 1}, 2: {}, 3: {"shares": True}}  # by ZeRO stage
NAME = "step-00000008"


def random_shapes(rng, most=20):
    """One to three tensors of up to `most` values; some have fewer values than there are ranks."""
    shapes = {}
    for number in range(rng.randint(1, 3)):
        sides = [rng.randint(1, rng.choice([2, 5, 3 * most // 5])) for _ in range(rng.randint(0, 2))]
        shapes[f"layer.{number}"] = tuple(sides) if math.prod(sides) <= most else (sides[0],)
    return shapes


def write(storage, shapes, ranks, stage, ema_section):
    """Write each rank's file, then commit, like a run but without threads."""
    target = Target(storage.new_checkpoint(8, "0123abcd_0001"), ())
    for rank in range(ranks):
        state = State(rank, ranks, 1, shapes, **LAYOUTS[stage])
        kinds = state_by_kind(state, ShardedEma(state.partitions, ema_section))
        mine = state.fragments[rank::ranks] if state.replicated else state.fragments
        target.kinds = tuple(kinds)
        even = even_share(state, rank, ranks)
        share = RankShare(f"state-{rank:05d}.safetensors", 8, mine, kinds, threading.Event(), even)
        target.files.append(share.write(target))
    facts = {
        "progress": {"samples_seen": 128, "step": 8},
        "notes": {},
        "run": "coverage",
        "identity": {"model": {}, "data": {}},
        "averages": {"ema": "half-life"},
        "averages_since": {"ema": 0},
        "shapes": shapes,
        "world_size": ranks,
        "zero_stage": stage,
        "precision": "bf16",
    }
    commit([target], facts, lambda: True, storage.where)


def loads_the_same(path, manifest, layout, ema_section):
    """Whether a rank of a different world (`layout`: arguments of State) reads its part correctly."""
    state, expected = (State(*layout[:2], seed, layout[2], **layout[3]) for seed in (2, 1))
    ema = ShardedEma(state.partitions, ema_section)
    load_fragments(path, manifest, state, ema, {"ema": "ema"})
    ours, theirs = state.numbers(ema), expected.numbers(ShardedEma(expected.partitions, ema_section))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def values_in(path, manifest):
    """How often each value is in the files, by (kind, parameter, position)."""
    found = Counter()
    for file in manifest.files:
        content = (path / file.name).read_bytes()
        for key, tensor in json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).items():
            kind, name, start = key.split(":")
            found.update((kind, name, int(start) + place) for place in range(*tensor["shape"]))
    return found


@pytest.fixture
def no_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


def test_a_thousand_layouts_hold_every_value_once_and_restore_on_any_other(tmp_path, no_disk):
    rng = random.Random(0)
    ema_section = make_config(tmp_path).ema
    converted = 0
    for case in range(CASES):
        shapes = random_shapes(rng)
        ranks, readers = rng.randint(1, 4), rng.randint(1, 6)
        stage, other = rng.randrange(4), rng.randrange(4)
        write(LocalStorage(tmp_path / str(case)), shapes, ranks, stage, ema_section)
        path = tmp_path / str(case) / NAME
        manifest = read_manifest(path)
        assert (manifest.files[0].share is not None) == (stage == 3), case

        # Each value is in exactly one file, in every kind of state.
        wanted = {
            (kind, name, place)
            for kind in ("master", "exp_avg", "exp_avg_sq", "ema")
            for name, shape in shapes.items()
            for place in range(math.prod(shape))
        }
        found = values_in(path, manifest)
        assert found.keys() == wanted, (case, shapes, ranks, stage)
        assert set(found.values()) == {1}, (case, shapes, ranks, stage)

        # One rank of a different world reads its part, and opens only the files that contain some of it.
        rank = rng.randrange(readers)
        layout = (rank, readers, shapes, LAYOUTS[other])
        assert loads_the_same(path, manifest, layout, ema_section), (case, shapes, ranks, stage, readers, other)
        fragments = State(rank, readers, 1, shapes, **LAYOUTS[other]).fragments
        opened = {file.name for file in needed_by(fragments)(manifest)}
        assert opened == files_with_any_of(fragments, manifest), case
        converted += (ranks, stage) != (readers, other)
    assert converted > CASES // 2


def test_any_layout_restores_from_parts_of_the_files_of_any_other(tmp_path, no_disk, monkeypatch):
    monkeypatch.setattr(checkpoint_bucket._PendingObjects, "part_bytes", 256)
    monkeypatch.setattr(checkpoint_manifest, "_FEW_PARTS", 0)
    in_parts = []
    fetch_parts = checkpoint_bucket.fetch_parts
    monkeypatch.setattr(
        checkpoint_bucket, "fetch_parts", lambda *given: in_parts.append(given[1].name) or fetch_parts(*given)
    )
    rng = random.Random(0)
    ema_section = make_config(tmp_path).ema
    for case in range(60):
        shapes, ranks, readers = random_shapes(rng, 900), rng.randint(1, 4), rng.randint(2, 6)
        stage, other = rng.randrange(4), rng.randrange(4)
        storage = BucketStorage(f"memory://{tmp_path.name}/{case}", tmp_path / str(case))
        write(storage, shapes, ranks, stage, ema_section)
        (name,) = storage.committed()
        for rank in rng.sample(range(readers), 2):  # on one node: the second finds what the first has copied
            fragments = State(rank, readers, 1, shapes, **LAYOUTS[other]).fragments
            path = storage.fetch(name, (rank, readers), needed_by(fragments), intervals_of(fragments))
            layout = (rank, readers, shapes, LAYOUTS[other])
            loaded = loads_the_same(path, storage.manifest(name), layout, ema_section)
            assert loaded, (case, shapes, ranks, stage, readers, other)
    assert len(in_parts) > 60
    fsspec.filesystem("memory").store.clear()


def files_with_any_of(fragments, manifest):
    """The names that `files_with` should find, by checking every value."""
    mine = {(one.name, place) for one in fragments for place in range(one.start, one.start + one.numel)}
    return {
        file.name
        for file in manifest.files
        for piece in file.pieces(manifest.shapes)
        if any((piece.name, place) in mine for place in range(piece.start, piece.start + piece.numel))
    }
