"""`slurm/index.sbatch` on a real Slurm: the tasks of an array share the tars, and the last one to end creates OUT."""

import sys
from pathlib import Path

import pytest

from data_tools.images.index import index
from ecar_dist.data.images.shards import ImageShards
from tests.data.image_sets import members_of, samples, write_tar
from tests.data_tools.image_folders import content
from tests.slurm.cluster import ENDED

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]
ROOT = Path(__file__).parents[2]
ELSEWHERE = "--exclude=n4,n5"  # these two nodes belong to other tests


def test_an_array_of_two_indexes_tars(cluster, tmp_path):
    source, out = tmp_path / "tars", tmp_path / "index"
    source.mkdir()
    images = samples(20)
    for first in range(0, 20, 4):
        write_tar(source / f"{first:03d}.tar", members_of(images[first : first + 4]))
    log = f"--output={tmp_path}/index-%a.log"
    job = cluster.submit("--array=0-1", ELSEWHERE, log, "slurm/index.sbatch", source, out, cwd=ROOT, VENV=sys.prefix)

    def states():
        return [link["JobState"] for link in cluster.links(job)]

    cluster.until(lambda: set(states()) <= set(ENDED), 90, lambda: f"the array has ended, not {states()}")
    logs = [(tmp_path / f"index-{task}.log").read_text() for task in range(2)]
    assert states() == ["COMPLETED", "COMPLETED"], logs
    assert [f"task {task} of 2 on n" in said for task, said in enumerate(logs)] == [True, True]
    assert any("20 images" in said for said in logs)
    assert not list(tmp_path.glob(".index*")), "what the tasks shared has become OUT"
    assert [record.data for record in ImageShards(out).read_many(range(20))] == [image for _, image, _ in images]
    index(str(source), tmp_path / "alone")
    assert content(out) == content(tmp_path / "alone")
