import os
import re

import pytest

from data_tools.encode.status import status
from data_tools.finalize import finalize
from ecar_dist.data.shards.manifest import load_manifest
from ecar_dist.errors import ConfigError, DataError
from tests.data_tools.bad_images import write_bad_image_shards
from tests.data_tools.image_folders import encode_small, write_image_shards

BEGUN = 1_000_000.0


def say(capsys, out, **settings):
    status(out, **settings)
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0] + (line.split()[1] if line.startswith("task") else ""): line for line in lines}


def numbers(line):
    return re.findall(r"[\d.]+", line)


def set_times(out, **seconds):
    """When each file was written, in seconds since the plan."""
    for name, at in {"plan": 0, **seconds}.items():
        os.utime(out / f"{name.strip('_')}.json", (BEGUN + at, BEGUN + at))


@pytest.fixture
def half(tmp_path, capsys):
    """Task 0 of 2 is finished, task 1 has not started: shards 0, 2 and 4, of 5, 5 and 4 images."""
    out = tmp_path / "latents"
    encode_small(write_image_shards(tmp_path), out, task=0, tasks=2)
    capsys.readouterr()
    set_times(out, _000000=100, _000002=650, _000004=700)
    return out


def test_done_rates_and_time_left(half, capsys):
    said = say(capsys, half, now=BEGUN + 800)
    assert "3 of 5" in said["shards"]
    assert "14 of 24, 58.3 %" in said["images"]
    assert said["failures"].split() == ["failures", "0"]
    # shards 2 and 4 are of the last 600 s: 9 / 600; overall 14 / 700
    assert numbers(said["rate"]) == ["0.0", "10", "0.0"]  # recent, minutes, overall
    assert "11m07s" in said["left"]  # 10 / (9 / 600) s
    assert "000004, 1m40s" in said["newest"]
    assert "finalized" not in said


def test_rates_soon_after_the_start_and_long_after_the_end(half, capsys):
    set_times(half, _000000=1, _000002=1, _000004=2)
    said = say(capsys, half, now=BEGUN + 4)
    assert numbers(said["rate"]) == ["3.5", "10", "7.0"]
    assert " 3s" in said["left"]
    assert "unknown" in say(capsys, half, now=BEGUN + 9999)["left"]


def test_each_tasks_share(half, capsys):
    set_times(half, _000000=1, _000002=1, _000004=2)
    said = say(capsys, half, now=BEGUN + 4, tasks=2)
    assert re.search(r" 3 of 3 .* 2s .* 9\.0 images/s", said["task0"])  # shards 2 and 4 in the second after shard 0
    assert "0 of 2" in said["task1"]
    with pytest.raises(ConfigError, match="--tasks 0"):
        status(half, tasks=0)


def test_a_tasks_rate_is_its_own_whenever_it_ran(half, capsys):
    """An hour after the plan, and long ago; a pause of hours does not count against its newest shards."""
    set_times(half, _000000=3600, _000002=3605, _000004=3609)
    said = say(capsys, half, now=BEGUN + 7209, tasks=2)
    assert re.search(r" 3 of 3 .* 1h00m .* 1\.0 images/s", said["task0"])
    set_times(half, _000000=10, _000002=9000, _000004=9010)
    assert ", 0.4 images/s" in say(capsys, half, now=BEGUN + 9010, tasks=2)["task0"]
    set_times(half, _000000=10, _000002=9000, _000004=18_000)
    assert ", 0.0 images/s" in say(capsys, half, now=BEGUN + 18_000, tasks=2)["task0"]
    (half / "000000.json").unlink()
    (half / "000002.json").unlink()
    said = say(capsys, half, now=BEGUN + 18_000, tasks=2)
    assert re.search(r" 1 of 3 .* 0s", said["task0"])
    assert "images/s" not in said["task0"]


def test_nothing_done_yet(half, capsys):
    for path in half.glob("0*"):
        path.unlink()
    said = say(capsys, half, now=BEGUN + 4, tasks=1)
    assert "0 of 24, 0.0 %" in said["images"]
    assert "newest" not in said


def test_after_the_end(tmp_path, capsys):
    out = tmp_path / "latents"
    encode_small(write_bad_image_shards(tmp_path), out, max_bad=0.2)
    finalize(out, max_bad=0.2)
    said = say(capsys, out)
    assert "24 of 24, 100.0 %" in said["images"]
    assert " 3, " in said["failures"]
    assert f"{out}/errors.jsonl" in said["failures"]
    assert "nothing" in said["left"]
    assert load_manifest(out).dataset_id in said["finalized"]


def test_no_plan(tmp_path):
    with pytest.raises(DataError, match=r"plan\.json does not exist"):
        status(tmp_path)
