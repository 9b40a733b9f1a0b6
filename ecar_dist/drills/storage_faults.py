"""Drills of storage faults: torn and cut checkpoints, a flipped byte, 503s from an object store, a full disk."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, SIGTERM

import numpy as np

from ecar_dist.command_line import counted
from ecar_dist.config.run import RunConfig
from ecar_dist.data.shards.layout import ShardLayout
from ecar_dist.data.shards.manifest import MANIFEST_NAME, load_manifest
from ecar_dist.drills.evidence import (
    Finding,
    ended_well,
    ended_within,
    every_step_once,
    no_orphans,
    one_line_with,
    rank_statuses,
    whole_checkpoints,
)
from ecar_dist.drills.ground import SAVE_EVERY, STEPS, STRIKE_AT, CannotRunError, Ground, Trial
from ecar_dist.drills.object_store import ObjectStore, StoreServers
from ecar_dist.drills.processes import Ended, UnexpectedError
from ecar_dist.drills.rank_faults import DEATH_SECONDS, as_quiet, from_step, names_rank, resumed_as_quiet
from ecar_dist.drills.small_disk import NoSmallDiskError, SmallDisk
from ecar_dist.runtime.checkpoint.files import committed, readable
from ecar_dist.storage.remote import file_in, is_remote, local_path
from ecar_dist.train.sources import check_data, open_stream

ENDED_BY_LAUNCHER = -SIGTERM  # torchrun ends the other ranks once one has failed
LARGEST_BUCKET = 1 << 30  # bytes: the S3 server keeps them in memory
BURSTS = {MANIFEST_NAME: 2, ".tar": 6}  # part of the path -> number of consecutive 503s
ACCOUNT = {
    "AWS_ACCESS_KEY_ID": "drill",
    "AWS_SECRET_ACCESS_KEY": "drill",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


def torn_checkpoint(ground: Ground) -> Iterator[Finding]:
    """A rank dies during its second save. Later the newest checkpoint is truncated."""
    trial = Trial(ground, "torn-checkpoint")
    victim = ground.ranks - 1

    # The victim dies in the save, and the job ends.
    ended = trial.train(failpoint=f"checkpoint.write:rank={victim}:nth=2:kill")
    due = 2 * SAVE_EVERY
    last = max((entry["step"] for entry in trial.metrics()), default=0)
    status = ended.rank_statuses.get(victim)
    seen = f"exit status {status} after step {last}"
    yield Finding(f"rank {victim} dies in the save of step {due}", seen, status == -SIGKILL and last >= due)
    yield ended_within(ended, ground.quiet.seconds + DEATH_SECONDS)
    yield names_rank(ended, victim)
    yield no_orphans(ended)

    # The unfinished save has left no checkpoint.
    saved = trial.newest_step()
    yield Finding(f"the checkpoint of step {SAVE_EVERY} is the newest", f"step {saved}", saved == SAVE_EVERY)
    yield from resumed_as_quiet(ground, trial)

    # Truncate a file of the newest checkpoint: the one before it is used.
    if len(found := committed(trial.checkpoints)) < 2:
        raise UnexpectedError(f"there are {len(found)} checkpoints, and two are needed to cut the newer one")
    newest, before = found[:2]
    largest = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    again = trial.train()
    yield ended_well(again)
    named = (newest.name, largest.name)
    yield one_line_with(again, f"one warning names {newest.name} and its truncated file", *named, beginning="warning: ")
    yield from_step(trial, int(before.name.removeprefix("step-")))
    yield from as_quiet(ground, trial)


def corrupt_shard(ground: Ground) -> Iterator[Finding]:
    """A byte of a latent shard is flipped, and later restored."""
    # The job ends, and one line names the shard and the byte.
    damaged = damage(ground.config, ground.folder / "damaged")
    trial = Trial(ground, "corrupt-shard", (f"data.latents={damaged.path.parent}",))
    ended = trial.train()
    yield ended_within(ended, ground.quiet.seconds + DEATH_SECONDS)
    yield rank_statuses(ended, 1, ENDED_BY_LAUNCHER)
    yield no_orphans(ended)
    said = one_line_with(ended, f"one line names {damaged.path.name}", str(damaged.path))
    yield said
    found = re.search(r"byte (\d+)", said.seen)
    near = found is not None and damaged.sample_begins <= int(found[1]) <= damaged.flipped
    place = f"the damaged sample, {damaged.sample_begins} to {damaged.flipped}"
    yield Finding(f"it names a byte in {place}", f"byte {found[1]}" if found else "no byte", near)

    # With the byte restored, the same command trains like the quiet run.
    flip(damaged.path, damaged.flipped)
    yield from resumed_as_quiet(ground, trial)


@dataclass(frozen=True)
class DamagedShard:
    """A shard with one flipped byte, next to links to all other files of its set."""

    path: Path
    sample_begins: int
    flipped: int


def damage(config: RunConfig, folder: Path) -> DamagedShard:
    """Make a copy of the set in which the sample in the middle of the run is damaged."""
    # Find the sample.
    home = local_latents(config)
    stream = open_stream(config, check_data(config))
    place = stream.locate(np.array([STRIKE_AT * config.batch.global_batch_size]))
    manifest = load_manifest(home)
    entry = manifest.shards[int(place.shards[0])]
    row = int(place.rows[0])

    # Copy its shard, and link the others.
    folder.mkdir()
    for name in (MANIFEST_NAME, *(shard.name for shard in manifest.shards if shard != entry)):
        file_in(folder, name).symlink_to(file_in(home, name))
    shutil.copyfile(file_in(home, entry.name), file_in(folder, entry.name))

    # Flip a byte in the middle of its latents.
    layout = ShardLayout.of(entry.count, manifest.moments_shape, manifest.has_flip)
    begins = layout.first_offset + row * layout.stride
    member = layout.members[0]
    flipped = begins + member.rel_offset + (member.nbytes or 0) // 2
    path = file_in(folder, entry.name)
    flip(path, flipped)
    return DamagedShard(path, begins, flipped)


def flip(path: Path, offset: int) -> None:
    """Flip all bits of one byte. A second call restores the file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))


def local_latents(config: RunConfig) -> Path:
    """The folder of the latents. Raises CannotRunError for a run that does not read one local set."""
    if config.data.latents is None or is_remote(config.data.latents):
        raise CannotRunError("data.latents must be a local folder; give a config that has one")
    return local_path(config.data.latents).absolute()


def s3_503(ground: Ground) -> Iterator[Finding]:
    """The latents are read from an S3 server that answers bursts of requests with 503."""
    # It needs the server, and latents that are small enough for it.
    if not all(importlib.util.find_spec(name) for name in ("moto", "flask")):
        raise CannotRunError("its S3 server is not installed; pip install 'ecar_dist[dev]'")
    home = local_latents(ground.config)
    shards = load_manifest(home).shards
    if (size := sum(shard.bytes for shard in shards)) > LARGEST_BUCKET:
        raise CannotRunError(f"the set has {size / 2**30:.1f} GiB, the S3 server allows 1; give a smaller data.latents")

    # Upload the latents, then train from the bucket.
    with StoreServers() as servers:
        bucket = servers.new_bucket()
        for name in (MANIFEST_NAME, *(shard.name for shard in shards)):
            bucket.put(f"latents/{name}", file_in(home, name).read_bytes())
        bucket.break_on(*({"kind": "status", "status": 503, "match": f, "times": n} for f, n in BURSTS.items()))
        environment = {**ACCOUNT, "AWS_ENDPOINT_URL": bucket.endpoint}
        trial = Trial(ground, "s3-503", (f"data.latents={bucket.url}/latents",), environment)
        ended = trial.train()
        yield ended_well(ended)
        yield from requests(bucket)
    yield no_orphans(ended)
    yield from as_quiet(ground, trial)


def requests(bucket: ObjectStore) -> Iterator[Finding]:
    """What the proxy logged: every 503 led to a retry, and nothing was downloaded twice because of it.

    The first request for a shard comes from the preflight, which reads its beginning without the node's cache.
    """
    entries = bucket.log()
    burst = sum(BURSTS.values())
    met = sum(entry["fault"] == "status" for entry in entries)
    yield Finding(f"{burst} requests are answered with 503 and retried", f"{met} were", met == burst)
    fetched = [(entry["path"], entry["range"]) for entry in bucket.log(match=".tar") if entry["fault"] is None]
    looks = fetched[:1]
    reads = fetched[1:]
    seen = f"{counted(len(looks), 'preflight read')}, then {len(reads)} requests for {len(set(reads))} ranges of shards"
    expected = "one preflight read of a shard; then no part of a shard is downloaded twice"
    yield Finding(expected, seen, bool(reads) and len(reads) == len(set(reads)))


def says_room(ended: Ended, size: int) -> Finding:
    """The last error gives the size of a checkpoint, to a tenth, and the free space."""
    said = re.findall(r"^ecar-dist: (.* needs (\S+) ([MG])iB, and .* free.*)$", ended.text, re.MULTILINE)
    line, number, unit = said[-1] if said else ("no such line", "0", "M")
    ok = abs(float(number) * 2 ** {"M": 20, "G": 30}[unit] - size) < 0.1 * size
    return Finding(f"it reports the free space and the space needed: {readable(size)}", line, ok)


def disk_full(ground: Ground) -> Iterator[Finding]:
    """A disk with space for one and a half checkpoints; then with enough space, and the same command again."""
    folder = ground.folder / "disk"
    size = ground.quiet.checkpoint_bytes
    with contextlib.ExitStack() as stack:
        # A real small disk, or a failpoint if it cannot be mounted.
        try:
            disk = stack.enter_context(SmallDisk(folder, size + size // 2))
            checkpoints, prefix, failpoint = disk.seen_from_outside / "disk-full", disk.prefix, ""
        except NoSmallDiskError as reason:
            disk, checkpoints, prefix = None, folder / "disk-full", []
            failpoint = ",".join(f"checkpoint.write:nth={save}:enospc" for save in range(2, STEPS // SAVE_EVERY + 1))
            yield Finding("a disk that is full", f"{reason}: the error comes from a failpoint", True)

        # Training continues without the second checkpoint and ends with an error, because the last one is not saved.
        trial = Trial(ground, "disk-full", (f"checkpoint.dir={folder}",), checkpoints=checkpoints)
        ended = trial.train(failpoint=failpoint, prefix=prefix)
        yield every_step_once(trial.metrics(), STEPS)
        yield rank_statuses(ended, 1, ENDED_BY_LAUNCHER)
        yield no_orphans(ended)
        unsaved = f"step {2 * SAVE_EVERY} was not saved"
        yield one_line_with(ended, f"{unsaved}; training continues", unsaved, "continues", beginning="warning: ")
        yield says_room(ended, size)
        yield whole_checkpoints(checkpoints, committed(checkpoints))
        saved = trial.newest_step()
        yield Finding(f"the checkpoint of step {SAVE_EVERY} is the newest", f"step {saved}", saved == SAVE_EVERY)

        # With enough space the same command trains to the end.
        if disk is not None:
            disk.resize(8 * size)
        yield from resumed_as_quiet(ground, trial, prefix)
