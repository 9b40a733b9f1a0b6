import itertools
import time

import numpy as np
import pytest

from ecar_dist.data import loader as loader_module
from ecar_dist.data.loader import LatentLoader
from ecar_dist.data.order import sample_indices
from ecar_dist.errors import ConfigError, DataError
from tests.data.latent_sets import SHAPE, write_set
from tests.data.test_shards import flip_a_byte, truncate

SEED = 5


def read(folder, steps, *, world_size=1, micro=4, global_batch=24, start=0):
    """Everything all ranks see in `steps` steps: position -> (moments, label)."""
    seen = {}
    for rank in range(world_size):
        settings = {"seed": SEED, "global_batch_size": global_batch, "micro_batch_size": micro, "start": start}
        with LatentLoader(folder, **settings, rank=rank, world_size=world_size) as loader:
            for batch in itertools.islice(loader, steps * global_batch // (micro * world_size)):
                assert batch.moments.shape == (micro, *SHAPE)
                for moments, label, position in zip(batch.moments, batch.labels, batch.positions, strict=True):
                    assert int(position) not in seen
                    seen[int(position)] = (moments.numpy().tobytes(), int(label))
    return seen


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "flip"])
def latents(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    return folder, *write_set(folder, flip=request.param), request.param


def test_samples_are_those_of_the_order(latents):
    folder, moments, labels, flip = latents
    seen = read(folder, steps=9)  # 216 positions: more than two epochs of 97
    assert sorted(seen) == list(range(216))
    indices = sample_indices(np.arange(216), 97, SEED)
    mirrored = 0
    for position, index in enumerate(indices):
        straight, back = moments[index].tobytes(), np.ascontiguousarray(moments[index][..., ::-1]).tobytes()
        assert seen[position][0] in ((straight, back) if flip else (straight,))
        assert seen[position][1] == labels[index]
        mirrored += seen[position][0] == back
    assert (70 < mirrored < 146) if flip else mirrored == 0


@pytest.mark.parametrize(("world_size", "micro"), [(1, 24), (1, 3), (2, 4), (2, 12), (3, 8), (4, 2), (4, 6)])
def test_every_world_size_and_split_sees_the_same(latents, world_size, micro):
    assert read(latents[0], 5, world_size=world_size, micro=micro) == read(latents[0], 5)


def test_start_continues_the_sequence(latents):
    whole = read(latents[0], 8)
    late = read(latents[0], 5, start=72, world_size=2)
    assert late == {position: whole[position] for position in range(72, 192)}


def test_positions_inside_a_rank_are_in_order(latents):
    settings = {"seed": SEED, "global_batch_size": 24, "micro_batch_size": 6}
    with LatentLoader(latents[0], **settings, rank=1, world_size=2, start=7) as loader:
        positions = np.concatenate([batch.positions.numpy() for batch in itertools.islice(loader, 4)])
    assert positions.tolist() == [*range(8, 31, 2), *range(32, 55, 2)]


def open_loader(folder, **changes):
    settings = {"seed": SEED, "global_batch_size": 8, "micro_batch_size": 8, **changes}
    return LatentLoader(folder, **settings)


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
                list(itertools.islice(loader, 20))


def test_close_is_prompt_with_a_full_queue_and_ends_iteration(latents):
    loader = open_loader(latents[0], prefetch=1)
    next(loader)
    time.sleep(0.1)  # the thread now waits for room in the queue
    began = time.perf_counter()
    loader.close()
    loader.close()
    assert time.perf_counter() - began < 1.0
    assert not loader._thread.is_alive()
    assert list(loader) == []


def test_prefetch_is_bounded_and_waiting_is_counted(latents, monkeypatch):
    calls = []
    real = loader_module.sample_indices

    def slow(*values):
        calls.append(1)
        time.sleep(0.05)
        return real(*values)

    monkeypatch.setattr(loader_module, "sample_indices", slow)
    with open_loader(latents[0], prefetch=2) as loader:
        next(loader)
        assert loader.wait_seconds > 0.03
        time.sleep(0.5)
        assert len(calls) == 4  # one consumed, two queued, one waiting for room
        before = loader.wait_seconds
        next(loader)
        assert loader.wait_seconds - before < 0.03


def test_batch_numbers_must_multiply_out(latents):
    with pytest.raises(ConfigError, match="not a multiple of micro_batch_size x world_size = 3 x 2"):
        open_loader(latents[0], micro_batch_size=3, world_size=2)


def test_a_remote_folder_is_refused_clearly(latents, monkeypatch):
    manifest = loader_module.load_manifest(latents[0])
    monkeypatch.setattr(loader_module, "load_manifest", lambda _: manifest)
    with pytest.raises(DataError, match="must be on a local or mounted file system, got s3://bucket/x"):
        open_loader("s3://bucket/x")
