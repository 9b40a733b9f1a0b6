"""The loaders that `loader.py` compares: how each writes the same samples, and how each streams them in batches.

Interpreters that have a peer but not ecar_dist also import this module. So it imports only numpy and torch, and each
contender imports its own library.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

BATCH = 256
SHAPE = (8, 32, 32)  # moments of a 256-pixel image at 8x: 16 KiB in fp16
SHARD_SAMPLES = 4096
SMALL_SHARD_SAMPLES = 256
NUM_CLASSES = 1000
SEED = 0
DALI_THREADS = 2

Batch = tuple[torch.Tensor, torch.Tensor]  # fp16 [256, *SHAPE] contiguous, int64 [256]
Batches = Generator[Batch, None, None]


@dataclass(frozen=True)
class Contender:
    """`modules` are imported before anything is timed; the first must be installed. `write(arrays, out)` makes the
    files, `batches(out)` streams forever."""

    modules: tuple[str, ...]
    distributions: tuple[str, ...]  # whose versions are reported
    folder: str
    write: Callable[[Path, Path], None]
    batches: Callable[[Path], Batches]


def load_arrays(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The samples that every contender writes: fp16 [N, *SHAPE] (mapped) and int64 [N]."""
    return np.load(folder / "moments.npy", mmap_mode="r"), np.load(folder / "labels.npy")


def write_arrays(folder: Path, samples: int) -> None:
    """Random moments and labels: the content that every contender writes in its own format."""
    folder.mkdir()
    generator = np.random.default_rng(SEED)
    moments = np.lib.format.open_memmap(folder / "moments.npy", "w+", np.float16, (samples, *SHAPE))
    for first in range(0, samples, 4096):
        part = moments[first : first + 4096]
        part[:] = generator.standard_normal(part.shape, dtype=np.float32)
    moments.flush()
    np.save(folder / "labels.npy", generator.integers(0, NUM_CLASSES, samples))


# ---- ours


def write_ours(arrays: Path, out: Path, shard_samples: int = SHARD_SAMPLES) -> None:
    from ecar_dist.data.shards.manifest import Manifest, write_manifest
    from ecar_dist.data.shards.write import ShardContent, write_latent_shard

    moments, labels = load_arrays(arrays)
    entries = []
    for index, first in enumerate(range(0, len(labels), shard_samples)):
        rows = slice(first, first + shard_samples)
        content = ShardContent(first, np.asarray(moments[rows]), labels[rows])
        entry = write_latent_shard(out, index, content, {"encoder": {}, "plan_id": ""})
        assert entry is not None  # no one else writes here
        entries.append(entry)
    names = [str(label) for label in range(NUM_CLASSES)]
    write_manifest(out, Manifest(len(labels), NUM_CLASSES, names, SHAPE, False, {}, {}, {}, entries))


def write_ours_in_small_shards(arrays: Path, out: Path) -> None:
    write_ours(arrays, out, SMALL_SHARD_SAMPLES)


def ours_at_rest(folder: str | Path, cache: Path | None = None, nodes: int = 1) -> tuple[Any, Any]:
    """Source and order of a set. Only this function and `open_ours` know how our loader is put together."""
    from ecar_dist.data.order.stream import SampleStream
    from ecar_dist.data.shards.store import CacheOptions
    from ecar_dist.data.sources import LatentSource

    source = LatentSource(folder, CacheOptions(root=cache))
    return source, SampleStream([source.shard_counts], seed=SEED, global_batch_size=BATCH * nodes)


def open_ours(folder: str | Path, cache: Path | None = None, node: int = 0, nodes: int = 1, start: int = 0) -> Any:
    """The loader of node `node` of `nodes`, which has one rank and its own cache."""
    from ecar_dist.data.loader import SampleLoader, Share

    source, stream = ours_at_rest(folder, cache, nodes)
    return SampleLoader([source], stream, Share(BATCH * nodes, BATCH, node, nodes), seed=SEED, start=start)


def ours(folder: Path) -> Batches:
    with open_ours(folder) as loader:
        for batch in loader:
            yield batch.values, batch.labels


# ---- readers of our own tars


def already_written(arrays: Path, out: Path) -> None:
    """Nothing to write: reads the tars that `ours` wrote."""


def webdataset(folder: Path) -> Batches:
    """Plain webdataset as its users write it: shard shuffle, sample shuffle, decode, batch."""
    import webdataset as wds

    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    while True:
        samples = wds.WebDataset(tars, shardshuffle=len(tars), seed=SEED).shuffle(1000).decode()
        for moments, labels in samples.to_tuple("latent.npy", "cls").batched(BATCH, partial=False):
            yield torch.from_numpy(np.asarray(moments)), torch.as_tensor(labels, dtype=torch.int64)


def dali(folder: Path) -> Batches:
    """DALI's C++ reader with our index: shuffle buffer, npy header cut off and reshaped in the graph."""
    library: Any = importlib.import_module("nvidia.dali")  # its stubs know no pipeline without a device
    fn = library.fn

    tars = sorted(folder.glob("*.tar"))
    with open(tars[0], "rb") as file:
        file.seek(512)
        header = np.lib.format.read_magic(file) and np.lib.format.read_array_header_1_0(file) and file.tell() - 512

    @library.pipeline_def(batch_size=BATCH, num_threads=DALI_THREADS, device_id=None, prefetch_queue_depth=2)
    def pipeline() -> Any:
        moments, labels = fn.readers.webdataset(
            paths=[str(path) for path in tars],
            index_paths=[str(path.with_suffix(".idx")) for path in tars],
            ext=["latent.npy", "cls"],
            missing_component_behavior="error",
            random_shuffle=True,
            initial_fill=1024,
            seed=SEED,
        )
        moments = fn.reinterpret(moments[header:], dtype=library.types.FLOAT16, shape=list(SHAPE))
        return moments, fn.pad(labels, fill_value=0)

    running = pipeline()
    running.build()
    while True:
        moments, labels = running.run()
        texts = labels.as_array().view(f"S{labels.shape()[0][0]}")
        # The pipeline reuses its buffers, so a batch that must outlive the next one is a copy.
        yield torch.from_numpy(np.array(moments.as_array())), torch.from_numpy(texts.reshape(-1).astype(np.int64))


# ---- other formats


def write_mds(arrays: Path, out: Path) -> None:
    from streaming import MDSWriter

    moments, labels = load_arrays(arrays)
    columns = {"moments": f"ndarray:float16:{','.join(map(str, SHAPE))}", "label": "int"}
    with MDSWriter(out=str(out), columns=columns, size_limit=SHARD_SAMPLES * moments[0].nbytes) as writer:
        for row, label in zip(moments, labels, strict=True):
            writer.write({"moments": np.ascontiguousarray(row), "label": int(label)})


def mds(folder: Path) -> Batches:
    """mosaicml-streaming with its default shuffle, py1e."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    dataset = StreamingDataset(
        local=str(folder), shuffle=True, shuffle_algo="py1e", shuffle_seed=SEED, batch_size=BATCH, num_canonical_nodes=1
    )
    yield from stacked(dataset)


def write_litdata(arrays: Path, out: Path) -> None:
    from litdata.streaming import Cache

    moments, labels = load_arrays(arrays)
    cache = Cache(str(out), chunk_bytes=SHARD_SAMPLES * (moments[0].nbytes + 64))
    for index, (row, label) in enumerate(zip(moments, labels, strict=True)):
        cache[index] = {"moments": np.ascontiguousarray(row), "label": int(label)}
    cache.done()
    cache.merge()


def litdata(folder: Path) -> Batches:
    """litdata's StreamingDataset with its own shuffle."""
    from litdata import StreamingDataset

    yield from stacked(StreamingDataset(str(folder), shuffle=True, seed=SEED, drop_last=False))


def stacked(dataset: Any) -> Batches:
    """Batches of a dataset of {moments, label}, with the cheapest possible collation."""
    while True:
        moments, labels = [], []
        for sample in dataset:
            moments.append(sample["moments"])
            labels.append(sample["label"])
            if len(labels) == BATCH:
                yield torch.from_numpy(np.stack(moments)), torch.tensor(labels, dtype=torch.int64)
                moments, labels = [], []


def write_pyarrow(arrays: Path, out: Path) -> None:
    import pyarrow as pa

    moments, labels = load_arrays(arrays)
    flat = pa.py_buffer(np.ascontiguousarray(moments))
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(moments[0].nbytes), len(labels), [None, flat])
    table = pa.table({"moments": column, "label": labels})
    with pa.OSFile(str(out / "samples.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def pyarrow(folder: Path) -> Batches:
    """The practical limit: a mapped Arrow column, gathered at random. No integrity checks, no resume, no shards."""
    import pyarrow as pa

    table = pa.ipc.open_file(pa.memory_map(str(folder / "samples.arrow"))).read_all()
    rows, labels = table.column("moments").chunk(0), table.column("label").to_numpy()
    moments = np.frombuffer(rows.buffers()[1], dtype=np.float16).reshape(-1, *SHAPE)
    generator = np.random.default_rng(SEED)
    while True:
        order = generator.permutation(len(labels))
        for first in range(0, len(order) - BATCH + 1, BATCH):
            chosen = order[first : first + BATCH]
            yield torch.from_numpy(moments[chosen]), torch.from_numpy(labels[chosen])


def write_plain(arrays: Path, out: Path) -> None:
    for name in ("moments.npy", "labels.npy"):
        os.link(arrays / name, out / name)


def memcpy(folder: Path) -> Batches:
    """The physical limit: copies shard after shard into one reused buffer. No order, no batches."""
    moments, labels = load_arrays(folder)
    target = np.empty((SHARD_SAMPLES, *SHAPE), dtype=np.float16)
    while True:
        for first in range(0, len(labels), SHARD_SAMPLES):
            part = moments[first : first + SHARD_SAMPLES]
            np.copyto(target[: len(part)], part)
            yield torch.from_numpy(target[: len(part)]), torch.from_numpy(labels[first : first + len(part)])


_OURS = ("ecar_dist.data.loader", "ecar_dist.data.sources", "ecar_dist.data.shards.write")
_DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
CONTENDERS: dict[str, Contender] = {
    "ours": Contender(_OURS, ("ecar-dist",), "ours", write_ours, ours),
    "ours, small shards": Contender(_OURS, ("ecar-dist",), "ours_small", write_ours_in_small_shards, ours),
    "webdataset": Contender(("webdataset",), ("webdataset",), "ours", already_written, webdataset),
    "dali": Contender(("nvidia.dali",), _DALI, "ours", already_written, dali),
    "mds": Contender(("streaming",), ("mosaicml-streaming",), "mds", write_mds, mds),
    "litdata": Contender(("litdata",), ("litdata",), "litdata", write_litdata, litdata),
    "pyarrow": Contender(("pyarrow",), ("pyarrow",), "pyarrow", write_pyarrow, pyarrow),
    "memcpy": Contender(("numpy",), ("numpy",), "plain", write_plain, memcpy),
}

WARM_UP = "ours, small shards"

# Without the contenders that no target needs.
QUICK = ("ours", WARM_UP, "webdataset", "mds", "litdata", "memcpy")


def import_all(contender: Contender) -> None:
    for module in contender.modules:
        importlib.import_module(module)
