"""The starting point of the cases: one small valid artefact of each kind, made once, copied for each case.

    folder/        a directory of images per class          foreign.tar    the same in a tar of another program
    images/        image shards of them                     index/         an index of foreign.tar
    jsons.tar      the same, the labels in JSON             vae/           an autoencoder, barely trained
    latents/       latent shards, with the plan and the markers of their encoding
    config.yaml    a run on the latents                     runs/tiny/     that run, finished, by two ranks
    export/        its export                               bucket/        its newest checkpoint, as in a bucket

All paths in them are relative: a command runs in the folder with its copies.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import yaml

from data_tools.cli import main as ecar_data
from ecar_dist.cli import main as ecar_dist
from tests.conftest import free_port
from tests.data.image_sets import write_tar, write_webdataset_tar
from tests.data_tools.image_folders import write_image_folder
from tests.fork_server import run_ranks

TREE = {
    "run": {"name": "tiny", "dir": "runs"},
    "model": {"preset": "T", "patch_size": 1, "ar_depth": 1, "flow_depth": 1},
    "flow": {"num_stages": 2},
    "vae": {"kind": "dct", "downsample": 8},
    "data": {"latents": "latents", "num_classes": 3, "latent_channels": 12, "latent_size": 2},
    "batch": {"global_batch_size": 8, "micro_batch_size": 4},
    "optim": {"learning_rate": 1e-3},
    "ema": {"half_life_samples": [100]},
    "deepspeed": {"precision": "fp32", "zero_stage": 1},
    "train": {"total_samples": 48},
    "checkpoint": {"every_samples": 16},
    "sample": {"steps_per_stage": 1},
    "log": {"every_steps": 1, "tensorboard": False},
}
RUN = "runs/tiny"
LARGE = 1 << 16  # bytes; a larger file is linked instead of copied until a case changes it
_WATCHED = {"rank": 0, "host": "gpu03", "process": 7, "kind": "hung", "phase": "data", "step": 3, "beat": 4}


def make(root: Path) -> None:
    """Fill an empty folder with all of the above."""
    with contextlib.chdir(root):
        write_image_folder(Path("folder"))
        samples = [(f"{place:04d}", path.read_bytes(), place % 3) for place, path in enumerate(_images())]
        write_webdataset_tar(Path("foreign.tar"), samples)
        write_tar(Path("jsons.tar"), [part for sample in samples for part in _with_json(*sample)])
        _call(ecar_data, "shard folder images --samples-per-shard 10")
        _call(ecar_data, "index foreign.tar index")
        _call(ecar_data, "train-vae images vae --image-size 16 --steps 1 --batch-size 2 --channels 8 --device cpu")
        _call(ecar_data, "encode images latents --vae dct-f8 --image-size 16 --samples-per-shard 12 --decoder pil")
        _call(ecar_data, "finalize latents")
        Path("config.yaml").write_text(yaml.safe_dump(TREE, sort_keys=False))
        ended = run_ranks(2, free_port(), "train", "config.yaml")
        assert not any(rank.returncode for rank in ended), "".join(rank.stderr for rank in ended)
        _call(ecar_dist, f"checkpoint export {RUN} --out export")
        _add_what_other_days_leave(Path(RUN))
        newest = max(Path(RUN, "checkpoints").glob("step-*"))
        shutil.copytree(newest, Path("bucket/tiny") / f"{newest.name}-0123abcd")
        shutil.copytree(Path(__file__).parents[2] / "configs", "configs")
        Path("classes.txt").write_text("bird\ncat\ndog\n")


def _with_json(key: str, image: bytes, label: int) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", image), (f"{key}.json", json.dumps({"label": label, "words": "a picture"}).encode())]


def _images() -> list[Path]:
    return sorted(path for path in Path("folder").glob("*/*.jpeg"))


def _call(main: object, words: str) -> None:
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        assert main(words.split()) == 0  # type: ignore[operator]


def _add_what_other_days_leave(run: Path) -> None:
    """Files that a finished run does not have if nothing went wrong."""
    bad = {"step": 2, "samples_seen": 8, "loss": "nan", "grad_norm": 1.0, "reason": "not finite", "sample_ids": [[1]]}
    (run / "bad_steps.jsonl").write_text(f"{json.dumps(bad)}\n{json.dumps({'step': 3, 'pass_over': [1, 2]})}\n")
    files = {
        "logs/watchdog/0123abcd/rank-00000.json": json.dumps({**_WATCHED, "seconds": 3.0}),
        "logs/watchdog/0123abcd/verdict.txt": "rank 0 hung\n",
        "logs/job-12/exit-status": "0\n",
        "logs/job-12/rank-00000.log": "a story\n",
        "logs/job-12/bad-nodes": "gpu03 gpu04\n",
        "logs/substituted.rank-00000.jsonl": json.dumps({"sample_id": 3, "reason": "damaged"}) + "\n",
        "jobs/001/job": "12\n",
        ".lock": "process 999999 on gpu03, Slurm job 12\n",
    }
    for name, text in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
    shutil.copy(run / "config.yaml", run / "jobs/001/config.yaml")


def fast_folder() -> str | None:
    """A folder for thousands of short-lived small folders: in memory if there is room; None: the temporary folder."""
    with contextlib.suppress(OSError):
        room = os.statvfs("/dev/shm")
        if room.f_bavail * room.f_frsize > 1 << 29 and os.access("/dev/shm", os.W_OK):
            return "/dev/shm"
    return None


def copy(source: Path, target: Path) -> None:
    """Copy a file or folder. Large files become links, which `own` turns into separate files."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_copy_file)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        _copy_file(source, target)


def own(path: Path) -> None:
    """Separate a linked file from the one it was copied from."""
    if path.is_file() and path.stat().st_nlink > 1:
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)


def _copy_file(source: str | Path, target: str | Path) -> None:
    if os.path.getsize(source) > LARGE:
        os.link(source, target)
    else:
        shutil.copy2(source, target)


class Pristine:
    """The artefacts, made at first use, and removed with the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def root(self) -> Path:
        with self._lock:
            if self._folder is None:
                kept = os.environ.get("FUZZ_ARTEFACTS")
                if kept and Path(kept, "export").exists():
                    return Path(kept)
                folder = tempfile.TemporaryDirectory(prefix="fuzz-artefacts-", dir=fast_folder())
                make(Path(folder.name))
                self._folder = folder
            return Path(self._folder.name)

    def files(self, *names: str) -> list[str]:
        """Every file of some artefacts, as sorted paths relative to the root."""
        return sorted(str(path.relative_to(self.root)) for name in names for path in self._below(name))

    def _below(self, name: str) -> Iterator[Path]:
        place = self.root / name
        yield from (path for path in ([place] if place.is_file() else place.rglob("*")) if path.is_file())


PRISTINE = Pristine()
