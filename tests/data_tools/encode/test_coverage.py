"""Tasks that are killed a thousand times, anywhere: each row of the plan is exactly one sample or one failure."""

import os
import random
from pathlib import Path

import numpy as np

from data_tools.encode.commit import CommittedFailures, is_committed
from data_tools.encode.plan import EncodePlan, settle_plan
from data_tools.encode.run import _encode_shard
from data_tools.failures import Failure
from data_tools.finalize import finalize
from ecar_dist.data.shards.manifest import load_manifest
from ecar_dist.data.shards.write import ShardContent
from ecar_dist.vae.codec import EncoderIdentity
from tests.data_tools.image_folders import content

KILLS = 1000
ENCODER = EncoderIdentity("dct", "dct-f2", "", "c", 1, 2, scaling_factor=1.0, shift_factor=0.0, deterministic=True)
SHAPE = (1, 1, 1)


class Killed(BaseException):
    """Stands in for SIGKILL: nothing that this process does afterwards reaches the disk."""


class Worker:
    """Stands in for EncodeWorker: the moments of a row are its number; some rows are bad."""

    def __init__(self, bad):
        self.bad, self.open_failures = bad, []

    def encode_shard(self, plan, shard_index):
        rows = plan.rows(shard_index)
        good = np.array([row for row in rows if row not in self.bad])
        self.open_failures = [Failure(row, f"{row}", "s", "decode", "e") for row in rows if row in self.bad]
        moments = good.reshape(-1, *SHAPE).astype(np.float16)
        missing = tuple(failure.row for failure in self.open_failures)
        return ShardContent(rows.start, moments, good, None, missing)


class Disk:
    """Counts links, renames and removals. At a given number, the process is killed before or after the call."""

    CALLS = ("link", "replace", "unlink", "rename")

    def __init__(self, patch):
        self._patch = patch
        self._calls = {name: getattr(os, name) for name in self.CALLS}
        self._left = 0
        self._after = False
        self.dead = False
        for name, call in self._calls.items():
            patch.setattr(os, name, self._counted(call))
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: self._unlink(path, missing_ok))

    def live_for(self, calls, after=False):
        self._left, self._after, self.dead = calls, after, False

    def _counted(self, call):
        def counted(*given, **named):
            if self.dead:
                raise Killed
            self._left -= 1
            self.dead = self._left < 0
            if self.dead and not self._after:
                raise Killed
            call(*given, **named)
            if self.dead:
                raise Killed

        return counted

    def _unlink(self, path, missing_ok):
        try:
            os.unlink(path)
        except FileNotFoundError:
            if not missing_ok:
                raise


def make_plan(rng):
    count, per_shard = rng.randint(1, 9), rng.randint(1, 4)
    plan = EncodePlan(
        source_folder="s",
        source_dataset_id="d",
        count=count,
        num_classes=10,
        class_names=[str(label) for label in range(10)],
        samples_per_shard=per_shard,
        seed=0,
        image_size=2,
        moments_shape=SHAPE,
        encoder=ENCODER.to_dict(),
        decoder="pil",
        resize="cubic",
        precision="fp32",
        flip="none",
        versions={},
        background="white",
    )
    # Every shard keeps at least one good row.
    bad = {row for index in range(plan.num_shards) for row in plan.rows(index)[1:] if rng.random() < 0.3}
    return plan, bad


def run_task(out, plan, bad, task, tasks):
    """What `encode` does, without images."""
    plan = settle_plan(out, plan)
    worker, committed = Worker(bad), CommittedFailures(out)
    for index in range(task, plan.num_shards, tasks):
        if not is_committed(out, index, plan):
            _encode_shard(worker, plan, out, index, committed)


def test_a_thousand_kills_lose_no_row_and_change_no_byte(tmp_path, monkeypatch):
    """Each encoding continues, task by task and kill by kill, until it is done."""
    rng = random.Random(0)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    disk = Disk(monkeypatch)
    kills = case = 0
    while kills < KILLS:
        case += 1
        plan, bad = make_plan(rng)
        calm, out = tmp_path / f"{case}-calm", tmp_path / f"{case}"
        disk.live_for(10**6)
        run_task(calm, plan, bad, 0, 1)

        # Tasks in any order, each killed before or after a random call.
        tasks = rng.randint(1, 3)
        left = set(range(tasks))
        while left:
            task = rng.choice(sorted(left))
            disk.live_for(rng.randint(0, 7), after=rng.random() < 0.5)
            try:
                run_task(out, plan, bad, task, tasks)
                left.remove(task)
            except Killed:
                kills += 1

        # Every row once, as a sample in its place or as a failure.
        disk.live_for(10**6)
        finalize(calm, max_bad=1.0)
        finalize(out, max_bad=1.0)
        shards = load_manifest(out).shards
        failed = [row for entry in shards for row in entry.missing]
        assert sorted([*np.concatenate([entry.rows for entry in shards]).tolist(), *failed]) == list(range(plan.count))
        assert set(failed) == bad, case
        assert [entry.first_row for entry in shards] == [plan.rows(index).start for index in range(plan.num_shards)]
        assert content(out) == content(calm), case
