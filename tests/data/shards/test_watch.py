"""Data that change during a run are detected before they are used, whoever writes them and however."""

import contextlib
import mmap
import os
import re
import time

import numpy as np
import pytest
import torch

from ecar_dist.data.images.shards import ImageShards
from ecar_dist.data.loader import SampleLoader, Share
from ecar_dist.data.order.stream import SampleStream
from ecar_dist.data.order.substitution import BadSamples
from ecar_dist.data.shards import watch as shard_watch
from ecar_dist.data.shards.proof import ProvenMap
from ecar_dist.data.shards.store import CacheOptions
from ecar_dist.data.sources import DaliLatentSource, LatentSource
from ecar_dist.errors import DataError
from tests.data.image_sets import encoded, write_class_directory
from tests.data.latent_sets import COUNTS, write_set
from tests.data.object_store import QUICK
from tests.data.process import wait_until

TOTAL = sum(COUNTS)


@pytest.fixture
def latents(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_set(folder)
    return folder


def places_of(source, count=TOTAL):
    return SampleStream([source.shard_counts], seed=0, global_batch_size=count).locate(np.arange(count))


# ---- writers


def garbage(path):
    """The same number of bytes, all of them different, including the headers of a tar."""
    return bytes(byte ^ 0x55 for byte in path.read_bytes())


def by_write(path):
    with path.open("r+b") as file:
        file.write(garbage(path))


def by_write_and_old_times(path):
    before = path.stat()
    by_write(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def one_byte(path):
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(3000)
        byte = file.read(1)[0]
        file.seek(3000)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def by_map(path):
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[:] = garbage(path)


def by_rename(path):
    other = path.with_name("other")
    other.write_bytes(garbage(path))
    os.rename(other, path)


def by_copy(path):
    path.write_bytes(garbage(path))


def cut(path):
    os.truncate(path, 100)


WRITERS = [by_write, by_write_and_old_times, one_byte, by_map, by_rename, by_copy, cut]


@pytest.mark.parametrize("writes", WRITERS)
def test_a_changed_shard_is_found_before_its_rows_are_used(latents, writes):
    source = LatentSource(latents)
    places = places_of(source)
    source.read(places, None)
    time.sleep(shard_watch.LONGEST_PAUSE)
    writes(latents / "000001.tar")
    with pytest.raises(BadSamples, match=r"000001\.tar"):
        source.read(places, None)


@pytest.mark.parametrize("flip", [False, True])
def test_each_row_is_checked_if_the_file_shows_no_change(tmp_path, monkeypatch, flip):
    """As on a tmpfs, where a write through a map does not update the times; without a pause between write and read."""
    write_set(tmp_path, flip=flip)
    monkeypatch.setattr(ProvenMap, "has_changed", lambda self: False)
    monkeypatch.setattr(shard_watch, "PAUSE", 0)
    source = LatentSource(tmp_path)
    places = places_of(source)
    back = np.arange(TOTAL) % 2 == 0 if flip else None
    source.read(places, back)
    path = tmp_path / "000002.tar"
    whole = path.read_bytes()
    for row in range(COUNTS[2]):
        one = places.take(np.flatnonzero((places.shards == 2) & (places.rows == row)))
        for side in [np.array([False]), np.array([True])] if flip else [None]:
            with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
                mapped[:] = garbage(path)
            source._damaged.clear()
            with pytest.raises(BadSamples, match=r"000002\.tar"):
                source.read(one, side)
            path.write_bytes(whole)
            source._damaged.clear()
            source.read(one, side)


def test_a_change_between_the_check_and_the_copy(latents, monkeypatch):
    source = LatentSource(latents)
    places = places_of(source)
    source.read(places, None)
    time.sleep(shard_watch.LONGEST_PAUSE)
    copy = source._copy

    def late(shards, *rest):
        one_byte(latents / "000001.tar")
        monkeypatch.setattr(source, "_copy", copy)
        return copy(shards, *rest)

    monkeypatch.setattr(source, "_copy", late)
    with pytest.raises(BadSamples, match=r"000001\.tar"):
        source.read(places, None)


@pytest.mark.parametrize(
    "touches", [os.utime, lambda path: os.link(path, f"{path}.link"), lambda path: path.chmod(0o600)]
)
def test_a_file_that_is_still_whole_is_read_on(latents, touches):
    source = LatentSource(latents)
    places = places_of(source)
    values, labels = source.read(places, None)
    values, labels = values.clone(), labels.clone()
    time.sleep(shard_watch.LONGEST_PAUSE)
    touches(latents / "000001.tar")
    again, labels_again = source.read(places, None)
    assert torch.equal(values, again)
    assert torch.equal(labels, labels_again)


def test_a_file_that_lost_its_name_cannot_change(latents):
    source = LatentSource(latents)
    places = places_of(source)
    values = source.read(places, None)[0].clone()
    time.sleep(shard_watch.LONGEST_PAUSE)
    (latents / "000001.tar").unlink()
    assert torch.equal(values, source.read(places, None)[0])


def test_a_file_that_keeps_changing(latents, monkeypatch):
    monkeypatch.setattr(ProvenMap, "has_changed", lambda self: True)
    source = LatentSource(latents)
    with pytest.raises(DataError, match=r"00000\d\.tar .*3 times"):
        source.read(places_of(source), None)


def test_each_plan_checks_all_mapped_files(latents):
    source = LatentSource(latents)
    source.read(places_of(source), None)
    by_write(latents / "000001.tar")
    source.plan([], {})
    assert 1 not in source._open
    assert 0 in source._open


def test_a_run_ends_with_the_name_of_the_shard(tmp_path):
    """All shards are rewritten in place at step 5 of 100; no batch that is handed out contains a new value."""
    moments, _ = write_set(tmp_path)
    truth = {row.tobytes() for row in moments}
    source, batches = LatentSource(tmp_path), []
    read = source.read
    source.read = lambda *where: (batches.append(read(*where)), batches[-1])[1]
    stream = SampleStream([source.shard_counts], seed=0, global_batch_size=8)
    with SampleLoader([source], stream, Share(8, 8), seed=0) as loader:
        for _ in range(5):
            next(loader)
        wait_until(lambda: len(batches) == 8)  # two are queued, and one waits for room
        time.sleep(2 * shard_watch.LONGEST_PAUSE)
        for number in range(len(COUNTS)):
            by_write_and_old_times(tmp_path / f"{number:06d}.tar")
        handed_out, ended = [], ""
        while not ended:
            try:
                handed_out.append(next(loader))
            except DataError as error:
                ended = str(error)
    assert re.search(r"^changed .*00000\d\.tar", ended)
    assert len(handed_out) <= 3  # the batches that were read ahead
    assert {row.numpy().tobytes() for batch in handed_out for row in batch.values} <= truth


def test_with_substitution_the_run_continues_without_the_shard(latents):
    source = LatentSource(latents)
    stream = SampleStream([source.shard_counts], seed=0, global_batch_size=8)
    with SampleLoader([source], stream, Share(8, 8), seed=0, max_bad=0.9) as loader:
        next(loader)
        by_write(latents / "000001.tar")
        time.sleep(2 * shard_watch.LONGEST_PAUSE)
        replaced = [one for _ in range(30) for one in next(loader).substitutions]
    assert {one.sample_id // 40 for one in replaced} == {1}


def test_a_changed_shard_in_the_cache_is_downloaded_again(latents, object_store, tmp_path):
    for path in latents.iterdir():
        object_store.put(f"set/{path.name}", path.read_bytes())
    with contextlib.closing(
        LatentSource(f"{object_store.url}/set", CacheOptions(root=tmp_path / "cache", retry=QUICK))
    ) as source:
        places = places_of(source)
        values = source.read(places, None)[0].clone()
        time.sleep(shard_watch.LONGEST_PAUSE)
        (cached,) = (tmp_path / "cache").rglob("000001.tar")
        by_write(cached)
        assert torch.equal(values, source.read(places, None)[0])
        assert source.traffic()["refetches"] == 1


def test_dali_reads_the_same(latents):
    pytest.importorskip("nvidia.dali")
    source = DaliLatentSource(LatentSource(latents), TOTAL, torch.device("cpu"))
    places = places_of(source._source)
    source.read(places, None)
    time.sleep(shard_watch.LONGEST_PAUSE)
    by_write(latents / "000001.tar")
    with pytest.raises(BadSamples, match=r"000001\.tar"):
        source.read(places, None)


def test_an_image_of_a_class_directory(tmp_path):
    """Nobody reads the file before the first epoch. From then on, it may not change."""
    write_class_directory(tmp_path / "set")
    path, data = tmp_path / "set/class/a.jpg", encoded(0)
    images = ImageShards(tmp_path / "set")
    assert images.read(0).data == data
    images.forget(())
    assert images.read(0).data == data
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DataError, match=r"a\.jpg"):
        images.read(0)


def test_checks_take_a_bounded_share_of_the_time(latents, monkeypatch):
    """Measures their number, because times on a busy machine mean nothing."""
    source, now, looks = LatentSource(latents), [1e6], []
    counted = ProvenMap.has_changed
    monkeypatch.setattr(shard_watch.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(ProvenMap, "has_changed", lambda self: looks.append(1) or counted(self))
    places = places_of(source)

    def read_after(seconds):
        looks.clear()
        now[0] += seconds
        source.read(places, None)
        return len(looks)

    assert read_after(0) == len(COUNTS)  # just opened
    source.watch.checked(0.0001)
    assert [read_after(0.0001 * shard_watch.PAUSE / 6) for _ in range(5)] == [0, 0, 0, 0, 0]
    assert read_after(0.0001 * shard_watch.PAUSE / 5) == len(COUNTS)
    source.watch.checked(1.0)
    assert read_after(shard_watch.LONGEST_PAUSE) == len(COUNTS)
