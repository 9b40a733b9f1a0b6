import contextlib
import dataclasses
import itertools
import json
import signal
import threading
import time

import numpy as np
import pytest
import torch

from ecar_dist.data import loader as loader_module
from ecar_dist.data import sources as sources_module
from ecar_dist.data.loader import SampleLoader, Share
from ecar_dist.data.order.stream import SampleStream
from ecar_dist.data.order.substitution import BadSamples
from ecar_dist.data.sources import DaliLatentSource, LatentSource
from ecar_dist.errors import ConfigError, DataError
from tests.data.latent_sets import COUNTS, write_set
from tests.data.process import open_files, wait_until
from tests.data.shards.test_read import flip_a_byte, truncate
from tests.fork_server import CONTEXT

SEED, BATCH = 5, 24


def open_loader(folders, *, micro=4, batch=BATCH, rank=0, world_size=1, start=0, dali=False, **options):
    """A loader over one or several folders. Several have the weights 2 : 1 : 1 ..."""
    folders = folders if isinstance(folders, list) else [folders]
    sources = [LatentSource(folder) for folder in folders]
    weights = [2.0, *[1.0] * (len(folders) - 1)] if len(folders) > 1 else [1.0]
    by_step = options.pop("by_step", False)
    counts = [source.shard_counts for source in sources]
    stream = SampleStream(
        counts, seed=SEED, global_batch_size=batch, weights=weights, by_step=by_step, lanes=2, window_shards=1
    )
    share = Share(batch, micro, rank, world_size)
    if dali:
        sources = [DaliLatentSource(source, micro, torch.device("cpu")) for source in sources]
    return SampleLoader(sources, stream, share, seed=SEED, start=start, **options)


def read(folders, steps, *, world_size=1, micro=4, batch=BATCH, **options):
    """Everything that all ranks see in `steps` steps: position -> (moments, label, sample id)."""
    seen = {}
    for rank in range(world_size):
        with open_loader(folders, rank=rank, world_size=world_size, micro=micro, batch=batch, **options) as loader:
            for read in itertools.islice(loader, steps * batch // (micro * world_size)):
                assert len(read.values) == len(read.labels) == len(read.sample_ids) == micro
                for values, label, position, sample in zip(
                    read.values, read.labels, read.positions, read.sample_ids, strict=True
                ):
                    assert int(position) not in seen
                    seen[int(position)] = (values.numpy().tobytes(), int(label), int(sample))
    return seen


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "flip"])
def latents(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    return folder, *write_set(folder, flip=request.param), request.param


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory):
    folders = [tmp_path_factory.mktemp("mixed") for _ in range(2)]
    for folder in folders:
        write_set(folder)
    return folders


def test_samples_are_those_of_the_order(latents):
    folder, moments, labels, flip = latents
    seen = read(folder, steps=9)  # 216 positions: more than two epochs of 97
    assert sorted(seen) == list(range(216))
    order = SampleStream([COUNTS], seed=SEED, global_batch_size=BATCH, lanes=2, window_shards=1).orders[0]
    indices = order.sample_indices(np.arange(216))
    assert sorted(indices[:97]) == list(range(97))
    mirrored = 0
    for position, index in enumerate(indices):
        straight, back = moments[index].tobytes(), np.ascontiguousarray(moments[index][..., ::-1]).tobytes()
        assert seen[position][0] in ((straight, back) if flip else (straight,))
        assert seen[position][1:] == (labels[index], index)
        mirrored += seen[position][0] == back
    assert (70 < mirrored < 146) if flip else mirrored == 0


@pytest.mark.parametrize(("world_size", "micro"), [(1, 24), (1, 3), (2, 4), (2, 12), (3, 8), (4, 2), (4, 6)])
def test_every_world_size_and_split_sees_the_same(latents, world_size, micro):
    assert read(latents[0], 5, world_size=world_size, micro=micro) == read(latents[0], 5)


def test_blocks_of_the_order_leave_no_seam(latents, monkeypatch):
    whole = read(latents[0], 8)
    monkeypatch.setattr(loader_module, "_MAX_BLOCK", 30)
    assert read(latents[0], 8) == whole
    assert read(latents[0], 8, world_size=3) == whole


def test_start_continues_the_sequence(latents):
    whole = read(latents[0], 8)
    late = read(latents[0], 5, start=72, world_size=2)
    assert late == {position: whole[position] for position in range(72, 192)}


def test_positions_inside_a_rank_are_in_order(latents):
    parts = []
    for rank in range(2):
        with open_loader(latents[0], micro=6, rank=rank, world_size=2, start=7) as loader:
            positions = np.concatenate([batch.positions.numpy() for batch in itertools.islice(loader, 4)])
        parts.append(positions.reshape(2, 12))  # two steps
        assert (np.diff(parts[-1]) > 0).all()
    assert np.sort(np.concatenate(parts, axis=1)).tolist() == [[*range(7, 31)], [*range(31, 55)]]


def test_dali_gives_the_same_batches(latents):
    assert read(latents[0], 3, dali=True) == read(latents[0], 3)


def test_a_mixture_keeps_its_proportions_and_its_samples(two_sets):
    seen = read(two_sets, 16, world_size=2)  # 384 positions
    samples = [seen[position][2] for position in range(384)]
    first = [sample for sample in samples if sample < 97]
    second = [sample - 97 for sample in samples if sample >= 97]
    assert len(first) == 256
    assert len(second) == 128
    assert set(np.bincount(first)) == {2, 3}  # 256 = 2 x 97 + 62 samples of the first
    assert set(np.bincount(second)) == {1, 2}
    assert read(two_sets, 8, start=192) == {position: seen[position] for position in range(192, 384)}


def test_what_goes_to_a_gpu_is_pinned_and_nothing_else(latents, monkeypatch):
    pinned = []

    def pin(tensor):
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    with open_loader([latents[0]], pin_memory=True, prefetch=1) as loader:
        batch = next(loader)
    places = {tensor.data_ptr() for tensor in pinned}
    assert places >= {tensor.data_ptr() for tensor in (batch.values, batch.labels, batch.positions)}
    assert batch.sample_ids.data_ptr() not in places


def test_by_step_every_batch_comes_from_one_set(two_sets):
    seen = read(two_sets, 12, world_size=3, by_step=True)
    kinds = [{seen[position][2] < 97 for position in range(step * BATCH, (step + 1) * BATCH)} for step in range(12)]
    assert all(len(kind) == 1 for kind in kinds)
    assert sum(kind == {True} for kind in kinds) == 8


@pytest.mark.parametrize("damage", [truncate, lambda path: path.unlink()])
def test_a_missing_or_cut_shard_stops_the_run_before_it_starts(tmp_path, damage):
    write_set(tmp_path)
    damage(tmp_path / "000002.tar")
    with pytest.raises(DataError, match=r"000002\.tar"):
        open_loader(tmp_path)


def test_an_error_in_the_thread_reaches_the_consumer_and_stays(tmp_path):
    write_set(tmp_path)
    flip_a_byte(tmp_path / "000001.tar")
    with open_loader(tmp_path) as loader:
        for _ in range(2):
            with pytest.raises(DataError, match=r"000001\.tar.*xxh3_128"):
                list(itertools.islice(loader, 40))


def test_substitutes_are_the_same_everywhere_and_listed(tmp_path):
    write_set(tmp_path)
    whole = read(tmp_path, 8)
    flip_a_byte(tmp_path / "000002.tar")  # samples 80..96
    patched = read(tmp_path, 8, max_bad=0.2)
    assert patched == read(tmp_path, 8, world_size=4, micro=2, max_bad=0.2)
    assert all(sample < 80 for _, _, sample in patched.values())
    assert {position for position in whole if whole[position] != patched[position]} == {
        position for position, (_, _, sample) in whole.items() if sample >= 80
    }
    with open_loader(tmp_path, micro=BATCH, max_bad=0.2) as loader:
        batches = list(itertools.islice(loader, 8))
    for batch in batches:  # listed with their own batch, however far the thread has read ahead
        assert {one.position for one in batch.substitutions} <= set(batch.positions.tolist())
    made = [one for batch in batches for one in batch.substitutions]
    replaced = {one.position: one.replaced_by for one in made}  # the last one, if a substitute was bad too
    assert replaced == {position: patched[position][2] for position, (_, _, sample) in whole.items() if sample >= 80}
    assert all("000002.tar" in one.reason for one in made)


def test_a_damaged_shard_of_a_mixture_is_replaced_from_its_own_set(tmp_path):
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
        write_set(folder)
    whole = read(folders, 8)
    flip_a_byte(folders[1] / "000002.tar")  # samples from 97 + 80 on
    patched = read(folders, 8, max_bad=0.1)
    assert patched == read(folders, 8, world_size=3, micro=2, max_bad=0.1)
    changed = {position for position in whole if whole[position] != patched[position]}
    assert changed == {position for position, (_, _, sample) in whole.items() if sample >= 177}
    assert all(97 <= patched[position][2] < 177 for position in changed)


def test_substitution_is_bounded(tmp_path):
    write_set(tmp_path)
    flip_a_byte(tmp_path / "000002.tar")
    with pytest.raises(DataError, match=r"000002\.tar.* 17 of 97 .*data\.max_bad=0\.1 "):
        read(tmp_path, 8, max_bad=0.1)


def test_close_is_prompt_with_a_full_queue_and_ends_iteration(latents):
    loader = open_loader(latents[0], prefetch=1)
    next(loader)
    time.sleep(0.1)  # the thread now waits for room in the queue
    began = time.perf_counter()
    loader.close()
    loader.close()
    assert time.perf_counter() - began < 10
    assert not loader._thread.is_alive()
    assert list(loader) == []


def test_close_does_not_wait_for_what_its_sources_can_end(tmp_path):
    """A download that is retried for minutes ends when its store is closed."""
    write_set(tmp_path)
    source = LatentSource(tmp_path)
    reading, closed = threading.Event(), threading.Event()

    def read(places, flip):
        reading.set()
        closed.wait(120)
        raise DataError("was stopped")

    source.read, source.close = read, closed.set
    stream = SampleStream([COUNTS], seed=SEED, global_batch_size=BATCH)
    loader = SampleLoader([source], stream, Share(BATCH, 4), seed=SEED)
    assert reading.wait(60)
    began = time.perf_counter()
    loader.close()
    assert time.perf_counter() - began < 60
    assert list(loader) == []


def test_prefetch_is_bounded_and_waiting_is_counted(latents, monkeypatch):
    calls, allowed, polls = [], threading.Semaphore(0), []
    real = LatentSource.read

    def held_up(*values):
        calls.append(1)
        assert allowed.acquire(timeout=120)
        return real(*values)

    def allow_one():
        polls.append(1)
        allowed.release()
        return False

    monkeypatch.setattr(LatentSource, "read", held_up)
    monkeypatch.setattr(loader_module, "_POLL_SECONDS", 0.05)
    with open_loader(latents[0], prefetch=2) as loader:
        loader.take(1, allow_one)  # nothing is read before the consumer has waited for a poll
        assert loader.wait_seconds >= 0.05
        allowed.release(1000)
        wait_until(lambda: len(calls) == 4 and loader._queue.full())
        time.sleep(0.1)
        assert len(calls) == 4  # one consumed, two queued, one waiting for room
        polls.clear()
        loader.take(1, allow_one)
        assert not polls, "it did not wait"
    allowed = threading.Semaphore(0)
    with open_loader(latents[0], prefetch=2) as loader:
        for _ in range(3):
            loader.take(1, allow_one)
        assert loader.wait_seconds >= 0.05 * len(polls) > 0.1, "the waits add up"
        allowed.release(1000)


def test_batch_numbers_must_multiply_out():
    with pytest.raises(ConfigError, match=r"global_batch_size=8\b.* 3 x 2 = 6\b.*=6 or 12"):
        Share(8, 3, 0, 2)


def write_samples(folder, log, start, rank, world_size, steps):
    """What a rank reads, as lines of (position, sample id)."""
    with (
        open_loader([folder], micro=2, rank=rank, world_size=world_size, start=start) as loader,
        open(log, "w") as file,
    ):
        for batch in itertools.islice(loader, steps * BATCH // (2 * world_size)):
            rows = zip(batch.positions.tolist(), batch.sample_ids.tolist(), strict=True)
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()


def consume(folder, out, start, world_size, *, steps, kill_after=None):
    """Run all ranks as processes. SIGKILL them after each wrote `kill_after` lines. Returns position -> sample id."""
    logs = [out / f"{start}-{rank}.jsonl" for rank in range(world_size)]
    ranks = [
        CONTEXT.Process(target=write_samples, args=(folder, log, start, rank, world_size, steps))
        for rank, log in enumerate(logs)
    ]
    for process in ranks:
        process.start()
    if kill_after is not None:
        wait_until(lambda: all(log.exists() and log.read_text().count("\n") >= kill_after for log in logs))
        for process in ranks:
            process.kill()
    for process in ranks:
        process.join()
    assert {process.exitcode for process in ranks} == {0 if kill_after is None else -signal.SIGKILL}
    lines = [line for log in logs for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return dict(json.loads(line) for line in lines)


def test_killed_and_resumed_at_another_world_size_the_sequence_goes_on(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_set(folder)
    first = consume(folder, tmp_path, 0, 2, steps=10**6, kill_after=60)
    order = SampleStream([COUNTS], seed=SEED, global_batch_size=BATCH, lanes=2, window_shards=1).orders[0]
    whole = dict(enumerate(order.sample_indices(np.arange(max(first) + 1000 * BATCH)).tolist()))
    assert first.items() <= whole.items()
    start = 2 * BATCH  # a run continues from its last checkpoint
    second = consume(folder, tmp_path, start, 3, steps=50)
    assert second == {position: whole[position] for position in range(start, start + 50 * BATCH)}


def test_a_part_of_the_locations_has_all_their_fields():
    stream = SampleStream([COUNTS], seed=SEED, global_batch_size=BATCH)
    locations, part = stream.locate(np.arange(10)), stream.locate(np.arange(10)).take(slice(2, 5))
    assert len(part) == 3
    for field in dataclasses.fields(locations):
        assert getattr(part, field.name).tolist() == getattr(locations, field.name)[2:5].tolist()


class RecordingSource:
    """Has no data, and records the plans and the shards that are read."""

    can_flip = False

    def __init__(self):
        self.plans, self.reads = [], []  # `reads` has a list of sets for each plan

    def plan(self, soon, future):
        self.plans.append((soon, future))
        self.reads.append([])

    def read(self, locations, flip):
        self.reads[-1].append(set(locations.shards.tolist()))
        return torch.zeros(len(locations)), torch.zeros(len(locations), dtype=torch.int64)

    def close(self):
        pass


@pytest.mark.parametrize(("batch", "window_shards", "steps_per_plan"), [(4, 8, 10), (4, 1, 1), (24, 1, 1)])
def test_a_shard_is_requested_at_least_one_plan_before_its_use(batch, window_shards, steps_per_plan):
    """A plan is for half a window of positions, or a step if that is longer, and looks ahead twice as far."""
    source = RecordingSource()
    stream = SampleStream([[10] * 40], seed=SEED, global_batch_size=batch, lanes=1, window_shards=window_shards)
    with SampleLoader([source], stream, Share(batch, batch), seed=SEED) as loader:
        list(itertools.islice(loader, 8 * steps_per_plan))
    assert [len(reads) for reads in source.reads[:8]] == [steps_per_plan] * 8
    for (earlier, _), (soon, future), reads in zip(source.plans[:7], source.plans[1:8], source.reads[1:8], strict=True):
        assert set().union(*reads) <= set(earlier) & set(soon) & set(future)
        assert sorted(future, key=future.get)[0] == soon[0]
        assert sorted(future.values()) == list(range(len(future)))


@pytest.mark.parametrize("node_ranks", [(0, 1), ()])
def test_a_plan_has_the_shards_of_this_rank_soon_and_of_its_node_in_an_epoch(node_ranks):
    """Each window is exactly one shard, so nothing else may be planned. The run continues at position 5."""
    source = RecordingSource()
    stream = SampleStream([[4] * 16], seed=SEED, global_batch_size=8, lanes=4, window_shards=1)
    with SampleLoader([source], stream, Share(8, 2, 1, 4, node_ranks), seed=SEED, start=5) as loader:
        assert next(loader).positions.tolist() == [5, 9]  # lane 1

    def shards_of(ranks, count):
        positions = np.arange(5, 5 + count)
        return set(stream.locate(positions[np.isin(positions % 4, ranks)]).shards.tolist())

    soon, future = source.plans[0]
    assert set(soon) == shards_of([1], stream.window)
    assert set(future) == shards_of(node_ranks or [1], stream.count)
    assert len(future) < 16


@pytest.mark.parametrize("evicts", [False, True])
@pytest.mark.parametrize("most", [2, 3])
def test_shards_stay_mapped_unless_evicted_or_too_many(tmp_path, evicts, most, monkeypatch):
    monkeypatch.setattr(sources_module, "_MAX_MAPPED", most)
    write_set(tmp_path)
    source = LatentSource(tmp_path)
    stream = SampleStream([COUNTS], seed=SEED, global_batch_size=BATCH)
    places = stream.locate(np.arange(97))
    source.read(places, None)
    source.store.evicts = evicts
    source.plan([2], {2: 7, 0: 1, 1: 5})  # other ranks of the node come first
    assert sorted(source.open_shards(places.take(slice(0)))) == ([0, 2] if evicts or most == 2 else [0, 1, 2])


@pytest.mark.parametrize("dali", [False, True])
def test_a_source_prefetches_what_it_lacks_and_never_reads_a_damaged_shard_again(tmp_path, dali):
    write_set(tmp_path)
    whole = (tmp_path / "000002.tar").read_bytes()
    flip_a_byte(tmp_path / "000002.tar")
    latents = LatentSource(tmp_path)
    locations = SampleStream([COUNTS], seed=SEED, global_batch_size=BATCH).locate(np.arange(97))
    source = DaliLatentSource(latents, 40, torch.device("cpu")) if dali else latents
    for _ in range(2):
        source.read(locations.take(np.flatnonzero(locations.shards == 0)), None)
        with pytest.raises(BadSamples, match=r"000002\.tar") as caught:
            source.read(locations.take(np.flatnonzero(locations.shards != 1)), None)
        assert len(caught.value.reasons) == 17
        assert caught.value.whole_shards
        (tmp_path / "000002.tar").write_bytes(whole)  # too late: all ranks must keep replacing the same samples
    assert open_files(tmp_path) == {"000000.tar"}
    source.plan([2, 0, 1], {2: 0, 0: 1, 1: 2})
    wait_until(lambda: open_files(tmp_path) == {"000000.tar", "000001.tar"})
    latents.store.stats.add(bytes=7)
    assert source.traffic()["bytes"] == 7
    source.close()


def test_a_consumer_may_give_up_waiting(latents, monkeypatch):
    monkeypatch.setattr(LatentSource, "read", lambda *_: time.sleep(3600))
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as ends:
        patch.setattr(loader_module, "_POLL_SECONDS", 0.05)
        loader = open_loader(latents[0])
        ends.callback(loader._stopping.set)  # its thread still sleeps: close() would wait for it
        asked = iter([False, False, True])
        began = time.perf_counter()
        assert loader.take(2, lambda: next(asked)) is None
        assert 0.1 < time.perf_counter() - began < 60
        assert loader.wait_seconds > 0.1
