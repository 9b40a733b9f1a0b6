"""An edited checkpoint with correct hashes is refused by every verb, and the checkpoint before it is used."""

import shutil

import pytest
import torch

from ecar_dist.cli import main
from ecar_dist.config.read import config_to_yaml
from ecar_dist.errors import CheckpointError
from ecar_dist.runtime.checkpoint.storage import open_storage
from tests.runtime.checkpoint.edited_checkpoints import EDITED, ODD_VALUES, edit_manifest, in_time
from tests.runtime.checkpoint.worlds import State, load, make_config, newest, save

OLD, NEW = "step-00000004", "step-00000008"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    config = make_config(folder)
    for step in (4, 8):
        save(config, 2, seed=step, step=step)
    (folder / "tiny/config.yaml").write_text(config_to_yaml(config))
    return folder / "tiny"


@pytest.fixture
def run(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "tiny")
    return tmp_path / "tiny"


def asked(capsys, *words):
    """Status, lines on stdout and lines on stderr of a `checkpoint` command."""
    capsys.readouterr()
    status = main(["checkpoint", *map(str, words)])
    out, error = capsys.readouterr()
    assert all(line.isprintable() for line in [*out.splitlines(), *error.splitlines()])
    return status, out.splitlines(), error.splitlines()


def files_of(folder):
    return sorted(path for path in folder.rglob("*"))


def test_the_checkpoint_is_valid_before_the_edits(run, capsys):
    for words in (["list", run], ["verify", run], ["inspect", run / "checkpoints" / NEW]):
        assert asked(capsys, *words)[0] == 0
    assert load(make_config(run.parent))[0][0].progress.step == 8


@pytest.mark.parametrize("edit", EDITED.values(), ids=EDITED)
def test_each_verb_prints_one_line_and_the_older_checkpoint_is_used(run, capsys, edit):
    folder, config = run / "checkpoints", make_config(run.parent)
    edit(folder / NEW)
    before = files_of(run.parent)
    with in_time():
        status, out, error = asked(capsys, "list", run)
        assert (status, len(out), error) == (0, 2, [])
        status, out, error = asked(capsys, "verify", run)
        assert (status, len(out), len(error)) == (1, 2, 1)
        assert "damaged" in out[0]
        assert out[1].endswith("intact")
        for words in (["inspect", folder / NEW], ["diff", folder / OLD, folder / NEW]):
            status, out, error = asked(capsys, *words)
            assert (status, out, len(error)) == (1, [], 1)
            assert error[0].startswith("ecar-dist: ")
            assert len(error[0]) < 1000
        for rank, (restored, state, _) in enumerate(load(config, 2)):
            assert restored.progress.step == 4
            assert torch.equal(state.partitions[0], State(rank, 2, seed=4).partitions[0])
        (warning,) = capsys.readouterr().err.splitlines()
        assert NEW in warning
        assert OLD in warning
        assert newest(folder).name == OLD
        assert [name for name, _ in open_storage(config).complete()][-1] == OLD
    assert files_of(run.parent) == before  # nothing was created


@pytest.mark.parametrize("edit", ODD_VALUES.values(), ids=ODD_VALUES)
@pytest.mark.parametrize("ranks", [1, 3])
def test_values_that_no_run_can_resume_from_are_rejected(run, capsys, edit, ranks):
    config = make_config(run.parent)
    edit(run / "checkpoints" / NEW)
    for words in (["list", run], ["verify", run], ["inspect", run], ["diff", run, run / "checkpoints" / OLD]):
        assert asked(capsys, *words)[0] == 0
    for rank, (restored, state, _) in enumerate(load(config, ranks)):
        assert (restored.progress.step, state.optimizer_step) == (4, 4)
        assert torch.equal(state.partitions[0], State(rank, ranks, seed=4).partitions[0])
        assert torch.equal(state.published, state.partitions[0])
    (warning,) = capsys.readouterr().err.splitlines()
    assert NEW in warning
    shutil.rmtree(run / "checkpoints" / OLD)
    with pytest.raises(CheckpointError, match=r"all 1 checkpoints .* damaged"):
        load(config, ranks)


@pytest.mark.parametrize("name", [name for name in ODD_VALUES if name.endswith("ema")])
def test_such_values_are_not_exported(run, capsys, name):
    ODD_VALUES[name](run / "checkpoints" / NEW)
    before = files_of(run.parent)
    status, out, error = asked(capsys, "export", run)
    assert (status, out, len(error)) == (1, [], 1)
    assert "ema of a" in error[0]
    assert files_of(run.parent) == before


def test_unknown_keys_of_a_later_version_are_ignored(run, capsys):
    def add(tree):
        tree["hardware"] = {"gpus": 8}
        tree["progress"]["tokens"] = 3
        tree["files"][0]["written"] = "2027"

    edit_manifest(run / "checkpoints" / NEW, add)
    assert asked(capsys, "verify", run)[0] == 0
    assert load(make_config(run.parent))[0][0].progress.step == 8
