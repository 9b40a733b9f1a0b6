"""A disk that is full for the processes that were started on it."""

import subprocess

import pytest

from ecar_dist.drills import small_disk
from ecar_dist.drills.small_disk import NoSmallDiskError, SmallDisk


@pytest.mark.parametrize("way", small_disk.WAYS)
def test_it_fills_up_and_grows_and_is_seen_from_outside(way, tmp_path, monkeypatch):
    monkeypatch.setattr(small_disk, "WAYS", (way,))
    folder = tmp_path / "disk"
    try:
        disk = SmallDisk(folder, 1 << 20)
    except NoSmallDiskError:
        pytest.skip(f"unshare {' '.join(way)} may not mount here")
    with disk:
        for size, status in ((1 << 20, 1), (4 << 20, 0)):
            disk.resize(size)
            command = [*disk.prefix, "sh", "-c", f"head -c {3 << 20} /dev/zero > {folder}/file"]
            assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == status
            assert (disk.seen_from_outside / "file").stat().st_size == min(size, 3 << 20)
        monkeypatch.chdir(tmp_path)
        assert subprocess.run([*disk.prefix, "pwd"], capture_output=True, text=True).stdout == f"{tmp_path}\n"
        assert not list(folder.iterdir()), "visible to no other process"
    assert not disk.seen_from_outside.exists()


def test_a_machine_that_mounts_nothing_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(small_disk, "WAYS", (("--no-such-flag",),))
    with pytest.raises(NoSmallDiskError):
        SmallDisk(tmp_path / "disk", 1 << 20)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoSmallDiskError, match="unshare is not"):
        SmallDisk(tmp_path / "other", 1 << 20)
