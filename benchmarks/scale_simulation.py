"""Whether `ecar-dist plan --simulate` fetches the same shards as a real run, byte for byte.

`scale_simulation.py [--ranks 4 8]`: 1,024 samples in 128 shards of 20 kB behind an S3 stand-in (moto), batch 16. One
epoch is trained by gloo ranks on this machine, each with its own cache, as if it were a node. Then the bytes in each
cache are compared with those of the simulation, and the bytes of all requests with both. This takes some minutes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rounds
import synthetic_run

SAMPLES, SHARDS, BATCH = 1024, 128, 16
SECONDS = 900.0  # for a run
LAST_SECONDS = 5.0  # delay of the last step, for downloads that the run does not wait for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8], help="nodes of one rank (default: 4 8)")
    parser.add_argument("--save", type=Path, help="also write the result to this JSON file")
    options = parser.parse_args()

    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        synthetic_run.write_latents(work / "set", 4, SAMPLES, SHARDS)
        for ranks in options.ranks:
            rows[ranks] = compare(work, ranks)
            print(f"{ranks} ranks: {rows[ranks]}", flush=True)
    rounds.publish({"ranks": rows, "hardware": rounds.hardware()}, options.save)
    if not all(row["equal"] for row in rows.values()):
        sys.exit(1)


def compare(work: Path, ranks: int) -> dict[str, Any]:
    """Bytes in the cache of each node, simulated and real; and of all requests for shards."""
    walked, forecast = walk(work / "set", ranks)
    real, requested = train(work, ranks)
    shard = max(path.stat().st_size for path in (work / "set").glob("*.tar"))
    return {
        "walked": walked,
        "real": real,
        "equal": walked == real,
        "forecast of the epoch": forecast,
        "requested": requested,
        # The preflight of a node reads the beginning of one shard, which may not be in any cache.
        "requested beside the caches, in shards": round((requested - sum(real)) / shard, 2),
    }


def walk(folder: Path, ranks: int) -> tuple[list[int], int]:
    """Bytes that each node fetches, for an epoch and to read ahead into the next; the forecast of the epoch for all."""
    from ecar_dist.data.order.stream import SampleStream
    from ecar_dist.data.shards.manifest import load_manifest
    from ecar_dist.plan.reliability import SaveTimes
    from ecar_dist.plan.simulation import Cluster, NodeTraffic, blocks, plan_node, simulate_epoch

    entries = load_manifest(folder).shards
    stream = SampleStream([[entry.count for entry in entries]], seed=0, global_batch_size=BATCH)
    sizes = [np.array([entry.bytes for entry in entries])]
    cluster = Cluster(ranks, 1, network=1e9, cache=None, failures=1e30)

    # A loader reads ahead, so it has planned the first block of the next epoch when the run ends.
    begins = [begin for begin, _, _ in blocks(stream, BATCH, ranks)] + [stream.count]
    fetched = []
    for node in range(ranks):
        traffic = NodeTraffic(sizes, None)
        for begin in begins:
            plan_node(stream, traffic, node, cluster, begin, begin + stream.window)
            traffic.transfer(1e18)
        fetched.append(int(traffic.fetched))
    epoch = simulate_epoch(stream, sizes, BATCH, cluster, 1.0, SaveTimes(1e9, 0.0, 0.0, 0.0))
    return fetched, int(epoch.fetched)


def train(work: Path, ranks: int) -> tuple[list[int], int]:
    """Bytes in the cache of each node after an epoch, and of all requests for shards."""
    from ecar_dist.drills.object_store import StoreServers
    from ecar_dist.drills.processes import free_port

    with StoreServers() as servers:
        bucket = servers.new_bucket()
        url = bucket.put_folder(work / "set", "set/")
        bucket.break_on()  # empties the log
        config = write_config(work, url, ranks)
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        account = {"AWS_ENDPOINT_URL": bucket.endpoint, "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
        alone = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        slow = {"ECAR_FAILPOINT": f"train.step:step={SAMPLES // BATCH}:delay={LAST_SECONDS:g}"}
        shared = {**rounds.environment(), **address, **account, **alone, **slow, "AWS_DEFAULT_REGION": "us-east-1"}

        # One process per rank, each as its own node.
        processes = []
        for rank in range(ranks):
            own = f"data.cache.dir={cache(work, ranks, rank)}"
            command = [sys.executable, "-m", "ecar_dist", "train", str(config), own]
            with open(work / f"rank-{rank}-of-{ranks}.log", "w") as log:
                environment = {**shared, "RANK": str(rank)}
                processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        try:
            for rank, process in enumerate(processes):
                if process.wait(SECONDS):
                    raise RuntimeError(f"rank {rank}: {(work / f'rank-{rank}-of-{ranks}.log').read_text()[-2000:]}")
        finally:
            for process in processes:
                process.kill()
        requested = sum(entry["bytes"] for entry in bucket.log("GET", ".tar"))
    return [bytes_of_shards(cache(work, ranks, rank)) for rank in range(ranks)], requested


def cache(work: Path, ranks: int, rank: int) -> Path:
    return work / f"cache-{rank}-of-{ranks}"


def bytes_of_shards(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.tar") if not path.name.startswith("."))


def write_config(work: Path, url: str, ranks: int) -> Path:
    """A run of one epoch of the set at `url`."""
    tree = synthetic_run.run_tree(work, f"of-{ranks}", "T", latent_size=4, micro_batch=BATCH // ranks)
    tree["model"]["patch_size"] = 1
    tree["data"]["latents"] = url
    tree["batch"]["global_batch_size"] = BATCH
    tree["train"]["total_samples"] = SAMPLES
    tree["log"] = {"tensorboard": False}
    path = work / f"config-{ranks}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


if __name__ == "__main__":
    main()
