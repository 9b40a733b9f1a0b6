"""A job that is requeued again and again without a new checkpoint reports it and asks not to be requeued: status 93."""

import json

from ecar_dist.runtime.run.directory import MAX_FRUITLESS, RunDirectory
from tests.fork_server import run_forked


def test_a_job_that_dies_before_every_checkpoint_is_not_started_a_fourth_time(write_config, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    run = tmp_path / "runs/tiny"
    for _ in range(MAX_FRUITLESS):  # each was killed: it did not record its end
        directory = RunDirectory(run)
        directory.open_for_training()
        directory.begin_attempt(newest_step=None, checkpoints=str(run / "checkpoints"))
        directory._lock.close()
    done = run_forked("train", str(write_config()))
    assert done.returncode == 93, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ecar-dist: ")]
    assert [value in line for value in ("job 77", f"{MAX_FRUITLESS} times", "step 0", "logs/")] == [True] * 4
    assert not (run / "metrics.jsonl").exists()
    reason = json.loads((run / "lineage.json").read_text())[-1].get("reason")
    assert reason is None or reason.startswith("gave up: job 77")
