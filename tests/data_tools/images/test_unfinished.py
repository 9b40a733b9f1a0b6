"""Two commands that write the same folder: one of them is refused, whenever it comes, or shares the work."""

import os
import shutil
from pathlib import Path

import pytest

from data_tools.images import unfinished as unfinished_module
from data_tools.images.index import index
from data_tools.images.indexing import IndexFolder
from data_tools.images.unfinished import unfinished_folder
from ecar_dist.errors import DataError
from tests.data.image_sets import members_of, samples, write_tar


def write(out):
    with unfinished_folder(out) as working:
        (working / "000000.tar").write_text("all of it")


def test_a_command_that_comes_while_another_finishes_is_refused(tmp_path, monkeypatch):
    out, rename, refused = tmp_path / "out", os.rename, []

    def finish(source, target):
        for rename_now in (lambda: None, lambda: rename(source, target)):
            rename_now()
            with pytest.raises(DataError) as caught, unfinished_folder(out) as working:
                working.joinpath("000000.tar").unlink()
            refused.append(str(caught.value))

    monkeypatch.setattr(unfinished_module.os, "rename", finish)
    write(out)
    assert ["another command is writing" in refused[0], "is not empty" in refused[1]] == [True, True]
    assert [path.name for path in out.iterdir()] == ["000000.tar"]


@pytest.mark.parametrize("moment", ["mkdir", "try_lock"])
def test_a_command_that_comes_when_another_has_just_finished_is_refused(tmp_path, monkeypatch, moment):
    """It saw that the folder did not exist, and then the other one finished."""
    out = tmp_path / "out"
    owner, original = (Path, Path.mkdir) if moment == "mkdir" else (unfinished_module, unfinished_module.try_lock)

    def late(*values, **named):
        monkeypatch.setattr(owner, moment, original)
        write(out)
        return original(*values, **named)

    monkeypatch.setattr(owner, moment, late)
    with pytest.raises(DataError, match=f"{out}"), unfinished_folder(out):
        pytest.fail("it was let in")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_task_that_comes_while_another_finishes_says_so(tmp_path, monkeypatch, capsys):
    """It has seen the records of all tars, and the folder gets its name before it reads them."""
    (tmp_path / "tars").mkdir()
    for number in range(5):
        write_tar(tmp_path / f"tars/{number}.tar", members_of(samples(2)))
    out, record = tmp_path / "out", IndexFolder.record
    index(str(tmp_path / "tars"), out, task=0, tasks=2)
    shutil.copytree(tmp_path / ".out.indexing", tmp_path / "half")
    index(str(tmp_path / "tars"), out, task=1, tasks=2)
    shutil.move(out, tmp_path / "whole")
    shutil.move(tmp_path / "half", tmp_path / ".out.indexing")
    capsys.readouterr()

    def late(folder, place):
        if folder.number_done() == 5 and not out.exists():
            shutil.rmtree(folder.path)
            shutil.copytree(tmp_path / "whole", out)
        return record(folder, place)

    monkeypatch.setattr(IndexFolder, "record", late)
    index(str(tmp_path / "tars"), out, task=1, tasks=2)
    assert capsys.readouterr().out == f"{out} is finished\n"
