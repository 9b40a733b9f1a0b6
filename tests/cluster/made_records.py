"""Run directories like those that `submit`, the job script and training leave, with files of any age."""

import datetime
import json
import os
import time

from ecar_dist.cluster.status import run_status
from tests.runtime.made_runs import make_run

BATCH, EVERY, STEP_SECONDS = 16, 10, 0.5  # a line every 5 s


class MadeRecord:
    """Ages are in seconds before `now`. Every tenth step of 1,000 has a line."""

    def __init__(self, folder, **sections):
        self.path, self.config = make_run(folder, **sections)
        (self.path / "lineage.json").unlink()
        self.now, self._attempts = time.time(), []

    def attempt(self, begun, ended=None, reason=None, loaded=True, **facts):
        """`loaded`: the attempt has loaded its checkpoint, so the step from which it continues is known."""
        entry = {"attempt": f"{len(self._attempts):08x}", "host": "gpu03", "job": None, "newest_step": None}
        entry |= {"started": self._moment(begun), **({"resumed_from_step": None} if loaded else {}), **facts}
        if ended is not None:
            entry |= {"ended": self._moment(ended), "reason": reason}
        self._attempts.append(entry)
        self.write("lineage.json", json.dumps(self._attempts), begun if ended is None else ended)

    def lines(self, count, age=3.0, **values):
        """`values`: the same for every line, or a list with one for each line."""
        made = []
        for place in range(count):
            step = (place + 1) * EVERY
            line = {"step": step, "samples_seen": step * BATCH, "train/loss": 1.0, "checkpoint/failures": 0.0}
            if place:  # an attempt's first line has no rates
                line |= {"perf/samples_per_second": BATCH / STEP_SECONDS, "perf/step_seconds": STEP_SECONDS}
            line |= {"perf/data_wait_fraction": 0.01, "time/forward": 0.3, "time/backward": 0.6}
            line |= {tag: value[place] if isinstance(value, list) else value for tag, value in values.items()}
            made.append(json.dumps(line) + "\n")
        self.write("metrics.jsonl", "".join(made), age)

    def lock(self, host, process, age=100.0):
        self.write(".lock", f"process {process} on {host}, Slurm job 12\n", age)

    def submitted(self, job, age, folder="001"):
        self.write(f"jobs/{folder}/job", f"{job}\n", age)

    def job_logs(self, job, status=None, age=None):
        """`status`: content of the file exit-status; None for no file. `age`: of the file and of the folder."""
        self.write(f"logs/job-{job}/rank-00000.log", "a story\n", age)
        (self.path / f"logs/job-{job}/exit-status").unlink(missing_ok=True)
        if status is not None:
            self.write(f"logs/job-{job}/exit-status", status, age)
        self._age(self.path / f"logs/job-{job}", age)

    def checkpoint(self, step, age):
        self.write(f"checkpoints/step-{step:08d}/COMMITTED", "", age)

    def write(self, name, text, age):
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        self._age(path, age)

    def status(self, here="login"):
        return run_status(self.path, self.now, here)

    def _age(self, path, age):
        os.utime(path, (self.now - age, self.now - age))

    def _moment(self, age):
        return datetime.datetime.fromtimestamp(self.now - age, datetime.UTC).isoformat()
