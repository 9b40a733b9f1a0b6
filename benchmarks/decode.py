"""Decoding JPEGs: DALI against PIL and against webdataset's own decoder, in images per second and per core.

`python benchmarks/decode.py` takes about 20 seconds, `--full` a few minutes. The last line is JSON. All decoders take
turns in one process. "Per core" means per second of CPU time, summed over all threads.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import itertools
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rounds

from ecar_dist.data.images.decode import open_decoder

WIDTH, HEIGHT, QUALITY = 500, 375, 90  # an average image of ImageNet
IMAGE_SIZE = 256
BATCH = 64
PIL_DECODE, PIL_RESIZE = "pil decode", "pil decode + resize + crop"
DALI_DECODE, DALI_RESIZE = "dali decode", "dali decode + resize + crop"
WEBDATASET = "webdataset decode, tar reading included"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    seconds, repeats = (4.0, 15) if options.full else (0.6, 5)
    blobs = make_images(BATCH)
    with tempfile.TemporaryDirectory(prefix="ecar-benchmark-") as folder:
        ways, missing = _ways(blobs, _write_tar(Path(folder), blobs))
        for run_batch in ways.values():
            run_batch()
        measured = _take_turns(ways, repeats, seconds)
    result = {
        "images": {name: _summary(found) for name, found in measured.items()},
        "per_core_over_pil": {
            name: _ratio(measured[name], measured[PIL_RESIZE if name == DALI_RESIZE else PIL_DECODE])
            for name in measured
            if not name.startswith("pil")
        },
        "not_measured": missing,
        "jpeg_bytes": int(np.mean([len(blob) for blob in blobs])),
        "hardware": options.hardware or rounds.hardware(),
    }
    _report(result)
    rounds.publish(result, options.save)


def make_images(count: int) -> list[bytes]:
    """Encoded crops of two photographs, each at a different offset, so that no two are equal."""
    from sklearn.datasets import load_sample_images

    generator = np.random.default_rng(0)
    blobs = []
    for photograph in itertools.islice(itertools.cycle(load_sample_images().images), count):
        top = int(generator.integers(photograph.shape[0] - HEIGHT))
        left = int(generator.integers(photograph.shape[1] - WIDTH))
        buffer = io.BytesIO()
        crop = photograph[top : top + HEIGHT, left : left + WIDTH]
        Image.fromarray(crop).save(buffer, "JPEG", quality=QUALITY)
        blobs.append(buffer.getvalue())
    return blobs


def _ways(blobs: list[bytes], tar: Path) -> tuple[dict[str, Callable[[], Any]], list[str]]:
    """The decoders by name, each of which decodes one batch per call; and the names of those that are not installed."""
    keys = [str(number) for number in range(len(blobs))]
    pil = open_decoder("pil")
    ways: dict[str, Callable[[], Any]] = {
        PIL_DECODE: lambda: pil.decode(blobs, keys),
        PIL_RESIZE: lambda: pil.decode_to_batch(blobs, keys, IMAGE_SIZE),
    }
    missing = []
    if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"):
        dali = open_decoder("dali")
        ways[DALI_DECODE] = lambda: dali.decode(blobs, keys)
        ways[DALI_RESIZE] = lambda: dali.decode_to_batch(blobs, keys, IMAGE_SIZE)
    else:
        missing += [DALI_DECODE, DALI_RESIZE]
    if importlib.util.find_spec("webdataset"):
        stream = _webdataset(tar)
        ways[WEBDATASET] = lambda: list(itertools.islice(stream, BATCH))
    else:
        missing.append(WEBDATASET)
    return ways, missing


def _webdataset(tar: Path) -> Iterator[Any]:
    import webdataset as wds

    while True:
        yield from wds.WebDataset([str(tar)], shardshuffle=False).decode("rgb8").to_tuple("jpg")


def _write_tar(folder: Path, blobs: Sequence[bytes]) -> Path:
    path = folder / "images.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, blob in enumerate(blobs):
            header = tarfile.TarInfo(f"{number:06d}.jpg")
            header.size = len(blob)
            tar.addfile(header, io.BytesIO(blob))
    return path


def _take_turns(
    ways: dict[str, Callable[[], Any]], repeats: int, seconds: float
) -> dict[str, list[tuple[float, float]]]:
    """For each decoder, one pair per round: images per second, and images per second of CPU time."""
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run_batch in ways.items():
            images = 0
            cpu = time.process_time()
            began = time.perf_counter()
            while time.perf_counter() - began < seconds:
                run_batch()
                images += BATCH
            measured[name].append(
                (images / (time.perf_counter() - began), images / (time.process_time() - cpu)),
            )
    return measured


def _summary(found: Sequence[tuple[float, float]]) -> dict[str, float]:
    walls, cores = zip(*found, strict=True)
    return {"per_second": statistics.median(walls), "per_second_and_core": statistics.median(cores)}


def _ratio(above: Sequence[tuple[float, float]], below: Sequence[tuple[float, float]]) -> float:
    """The ratio of two rates per core: the median over rounds of the ratio within a round."""
    return statistics.median(one[1] / other[1] for one, other in zip(above, below, strict=True))


def _report(result: dict[str, Any]) -> None:
    print(f"{WIDTH} x {HEIGHT} JPEGs of quality {QUALITY}, {result['jpeg_bytes']} bytes on average; batches of {BATCH}")
    print(f"{'':42}{'images/s':>10}{'per core':>10}{'x pil':>7}")
    for name, rate in result["images"].items():
        times = result["per_core_over_pil"].get(name, 1.0)
        print(f"{name:42}{rate['per_second']:10.0f}{rate['per_second_and_core']:10.0f}{times:7.2f}")
    for name in result["not_measured"]:
        print(f"{name:42}NOT MEASURED: its library is not installed")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="more and longer rounds")
    parser.add_argument("--save", type=Path, help="also write what was measured to this JSON file")
    parser.add_argument("--hardware", help="what to call the machine (default: its cores and processor)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
