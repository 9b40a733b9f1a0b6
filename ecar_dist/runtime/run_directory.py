"""The run directory: config.yaml, lineage.json, metrics.jsonl, tb/, samples/, logs/, checkpoints/."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import platform
import socket
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ecar_dist import __version__
from ecar_dist.config import RunConfig
from ecar_dist.config_file import config_to_yaml, load_config
from ecar_dist.errors import ConfigError
from ecar_dist.storage.atomic import TEMPORARY_SUFFIX, atomic_write, write_json

LOCK_NAME = ".lock"


class RunDirectory:
    """Paths of one run. Reading needs no more than the path; `open_for_training` claims it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config, self.lineage = self.path / "config.yaml", self.path / "lineage.json"
        self.metrics, self.tensorboard = self.path / "metrics.jsonl", self.path / "tb"
        self.samples, self.logs, self.checkpoints = (self.path / name for name in ("samples", "logs", "checkpoints"))
        self._lock: BinaryIO | None = None

    def open_for_training(self) -> None:
        """Make the directory, or take up the one an earlier attempt of this run left. Call on rank 0 only.

        It is this process's until its end, however that comes. Raises ConfigError where the directory holds something
        that is not a run, or another process trains there.
        """
        ours = (TEMPORARY_SUFFIX, LOCK_NAME)
        if not self.lineage.exists() and any(not path.name.endswith(ours) for path in self.path.glob("*")):
            raise ConfigError(
                f"{self.path} is not empty and holds no run (no lineage.json); choose another run.name or run.dir"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._hold()
        write_json(self.lineage, self.attempts())  # first: a start that is cut short here may be made again
        for folder in (self.samples, self.logs, self.checkpoints):
            folder.mkdir(exist_ok=True)

    def _hold(self) -> None:
        """An flock: the kernel drops it with its owner. The file says who that is, for the message."""
        if self._lock is not None:
            return
        file = open(self.path / LOCK_NAME, "ab+", buffering=0)  # noqa: SIM115 - held until the process ends
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().decode().strip() or "another process"
            raise ConfigError(f"{owner} trains in {self.path}; wait for its end, or choose another run.name") from None
        except OSError as error:
            print(f"{self.path} cannot be locked ({error.strerror}): see to it that no second job trains there")
        file.truncate(0)
        job = f", Slurm job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
        file.write(f"process {os.getpid()} on {socket.gethostname()}{job}\n".encode())
        self._lock = file

    def attempts(self) -> list[dict[str, Any]]:
        return json.loads(self.lineage.read_text()) if self.lineage.exists() else []

    def record_attempt(self, config: RunConfig, **facts: Any) -> None:
        """Write the resolved config, and append this start with its versions to lineage.json. Call on rank 0 only."""
        with atomic_write(self.config) as file:
            file.write(config_to_yaml(config).encode())
        attempt = {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "ecar_dist": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            **facts,
        }
        write_json(self.lineage, [*self.attempts(), attempt])

    def load_config(self) -> RunConfig:
        """The resolved config of the run. Raises ConfigError where this is not a run directory."""
        if not self.config.exists():
            raise ConfigError(f"{self.path} holds no config.yaml; give a run directory, or an export made from one")
        return load_config(self.config)
