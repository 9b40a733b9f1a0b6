"""What else a folder of checkpoints may contain, and what happens to one that this version cannot read."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from ecar_dist.errors import CheckpointError
from ecar_dist.runtime.checkpoint import files as checkpoint_files
from ecar_dist.runtime.checkpoint import manifest as checkpoint_manifest
from ecar_dist.runtime.checkpoint.files import MANIFEST, committed, is_checkpoint_name
from tests.runtime.checkpoint.edited_checkpoints import put, recommit
from tests.runtime.checkpoint.worlds import checkpoints, load, make_config, newest, save

OLD, NEW = "step-00000004", "step-00000008"


@pytest.fixture
def config(tmp_path):
    return make_config(tmp_path, keep=2)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "tiny/checkpoints"


@pytest.mark.parametrize(
    ("name", "local", "bucket"),
    [
        ("step-00000020", True, False),
        ("step-100000000", True, False),
        ("step-00000020-0123abcd_0001", False, True),
        ("step-00000020.bak", False, False),
        ("step-00000012-milestone", False, False),
        ("step-0000002", False, False),
        ("step-000000020", False, False),
        ("step-00000020\n", False, False),
        ("step-0000002٣", False, False),
        ("step-" + "9" * 400, False, False),
        ("step-00000020-0123abcd", False, False),
        ("step-00000020-0123abcd_0001.bak", False, False),
    ],
)
def test_names(name, local, bucket):
    assert (is_checkpoint_name(name), is_checkpoint_name(name, attempt=True)) == (local, bucket)


STRANGERS = ["step-00000012-milestone", "step-00000020.bak", "step-4", "tmp-mine", "tmp-step-00000004", "step-best"]


def test_folders_with_other_names_are_neither_read_nor_removed(config, folder):
    save(config, seed=4, step=4)
    for name in STRANGERS:
        shutil.copytree(folder / OLD, folder / name)
    for step in (8, 12, 16):
        assert load(config)[0][0].progress.step == step - 4
        save(config, seed=step, step=step, restore=True)
    assert checkpoints(folder.parents[1]) == sorted([*STRANGERS, "step-00000012", "step-00000016"])
    assert all((folder / name / "COMMITTED").exists() for name in STRANGERS)


def test_a_linked_checkpoint_is_read_and_neither_it_nor_its_target_is_removed(config, folder, tmp_path):
    save(config, step=4)
    (folder / OLD).rename(tmp_path / "archive")
    (folder / OLD).symlink_to(tmp_path / "archive")
    assert load(config)[0][0].progress.step == 4
    for step in (8, 12, 16):
        save(config, step=step, restore=True)
    assert checkpoints(tmp_path) == [OLD, "step-00000012", "step-00000016"]
    assert (tmp_path / "archive/COMMITTED").exists()


def test_a_run_with_renamed_checkpoints_alone_does_not_start_again(config, folder):
    save(config)
    (folder / OLD).rename(folder / f"{OLD}.bak")
    with pytest.raises(CheckpointError, match=rf"{OLD}\.bak"):
        load(config)
    (folder / f"{OLD}.bak").rename(folder / OLD)
    assert load(config)[0][0].progress.step == 4


def test_steps_are_sorted_as_numbers(config, folder):
    for step in (99_999_999, 100_000_000):
        save(config, seed=1, step=step)
    assert [path.name for path in committed(folder)] == ["step-100000000", "step-99999999"]
    assert load(config)[0][0].progress.step == 100_000_000
    save(config, step=100_000_001, restore=True)
    assert checkpoints(folder.parents[1]) == ["step-100000000", "step-100000001"]


def test_a_name_with_another_step_than_the_manifest_is_damage(config, folder, capsys):
    for step in (4, 8):
        save(config, seed=step, step=step)
    (folder / NEW).rename(folder / "step-00000099")
    assert load(config)[0][0].progress.step == 4
    assert "step 99" in capsys.readouterr().err
    assert newest(folder).name == OLD


def make_large(path):
    os.truncate(path / MANIFEST, checkpoint_manifest.MAX_MANIFEST_BYTES + 1)


LATER = {
    "another schema": put("schema", value="ecar-checkpoint-v9"),
    "another schema, all else unknown": lambda path: recommit(path, json.dumps({"schema": "ecar-checkpoint-v9"})),
    "a manifest beyond the bound": make_large,
}


@pytest.mark.parametrize("edit", LATER.values(), ids=LATER)
def test_a_checkpoint_of_another_version_hides_no_older_one_and_is_never_removed(config, folder, capsys, edit):
    for step in (4, 8, 12):
        save(config, seed=step, step=step)
    edit(folder / "step-00000012")
    assert load(config)[0][0].progress.step == 8
    (warning,) = capsys.readouterr().err.splitlines()
    assert str(folder / "step-00000012") in warning
    assert "not by this version" in warning
    assert f"{folder / NEW} is used instead" in warning
    assert newest(folder).name == NEW
    for step in (10, 14, 16):
        save(config, step=step, restore=True)
    assert checkpoints(folder.parents[1]) == ["step-00000012", "step-00000014", "step-00000016"]


@pytest.mark.parametrize("edit", LATER.values(), ids=LATER)
def test_a_checkpoint_of_another_version_alone_does_not_start_the_run_again(config, folder, edit):
    save(config)
    edit(folder / OLD)
    with pytest.raises(CheckpointError, match=r"all 1 checkpoints .* damaged"):
        load(config)
    assert checkpoints(folder.parents[1]) == [OLD]


def test_a_manifest_that_readers_reject_is_not_committed(config, folder, monkeypatch, capsys):
    """As in a ZeRO-3 run on thousands of ranks: the save fails, its error has the numbers, and the older one stays."""
    save(config, seed=4, step=4)
    size = (folder / OLD / MANIFEST).stat().st_size
    for module in (checkpoint_files, checkpoint_manifest):
        monkeypatch.setattr(module, "MAX_MANIFEST_BYTES", size + 50)
    with pytest.raises(
        CheckpointError, match=rf"step 8 was not saved: .*\b{size + 50:,}\b.*deepspeed.zero_stage"
    ) as said:
        save(config, 3, seed=8, step=8, restore=True)  # the files of three ranks need a longer manifest
    assert "\n" not in str(said.value)
    assert checkpoints(folder.parents[1]) == [OLD]
    assert load(config)[0][0].progress.step == 4


def test_overlapping_intervals_are_not_committed(config, folder, monkeypatch):
    """Two ranks that both believe that they own the same values."""
    save(config, seed=4, step=4)
    monkeypatch.setattr(
        "ecar_dist.runtime.checkpoint.store.CheckpointStore._fragments_to_write", lambda store, engine: engine.fragments
    )
    with pytest.raises(CheckpointError, match=r"step 8 was not saved: .* overlap at element 24"):
        save(config, 2, seed=8, step=8, replicated=True)
    assert checkpoints(folder.parents[1]) == [OLD]


@pytest.mark.parametrize("part", ["COMMITTED", "checkpoint.json", "weights"])
def test_a_file_that_cannot_be_read_for_a_moment_is_not_removed(config, folder, monkeypatch, part):
    """EIO or ESTALE of a network drive: the checkpoint may be intact, so the next clean-up leaves it alone."""
    for step in (4, 8):
        save(config, seed=step, step=step)
    stat, lstat = Path.stat, Path.lstat

    def fails(path):
        return path.parent.name == NEW and (path.name == part or (part == "weights" and path.suffix == ".safetensors"))

    def refuse(real):
        def looked(path, **options):
            if fails(path):
                raise OSError(errno.EIO, "Input/output error", str(path))
            return real(path, **options)

        return looked

    monkeypatch.setattr(Path, "stat", refuse(stat))
    monkeypatch.setattr(Path, "lstat", refuse(lstat))
    for step in (12, 16, 20):
        save(config, seed=step, step=step)
    monkeypatch.undo()
    assert checkpoints(folder.parents[1]) == [NEW, "step-00000016", "step-00000020"]
    (folder / "step-00000016/COMMITTED").unlink()
    (folder / "step-00000020/COMMITTED").unlink()
    assert load(config)[0][0].progress.step == 8
