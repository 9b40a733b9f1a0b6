"""What is on disk: complete or not there, verified before use, and refused if it belongs to another run."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ecar_dist.errors import CheckpointError
from ecar_dist.runtime.checkpoint import files as checkpoint_files
from ecar_dist.runtime.checkpoint.files import MANIFEST, MARKER, committed, open_fragments, read_manifest, verify
from ecar_dist.runtime.checkpoint.manifest import Progress
from ecar_dist.runtime.checkpoint.reader import FragmentReader
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.runtime.run.directory import RunDirectory
from tests.runtime.checkpoint.worlds import (
    IDENTITY,
    Ranks,
    State,
    checkpoints,
    load,
    make_config,
    newest,
    save,
    store_of,
)

OLD, NEW = "step-00000004", "step-00000008"


@pytest.fixture
def config(tmp_path):
    return make_config(tmp_path)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "tiny/checkpoints"


@pytest.mark.parametrize(("written_by", "read_by"), [(1, 1), (3, 2), (2, 5), (4, 1), (1, 7)])
def test_any_number_of_ranks_reads_what_any_number_wrote(config, written_by, read_by):
    save(config, written_by, seed=1, step=4)
    for rank, (restored, state, ema) in enumerate(load(config, read_by)):
        expected = State(rank, read_by, seed=1)
        assert restored.progress == Progress(64, 4)
        assert restored.client_state == {"seed": 1}
        assert state.optimizer_step == 4
        theirs = expected.numbers(ShardedEma(expected.partitions, config.ema))
        ours = state.numbers(ema)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert torch.equal(state.published, state.partitions[0])  # after the partitions were read


@pytest.mark.parametrize(("written", "read"), [(True, False), (False, True)])
def test_replicated_state_is_written_once_and_read_into_any_layout(config, folder, written, read):
    save(config, 2, seed=1, replicated=written)
    files = [load_file(path) for path in sorted((folder / OLD).glob("*.safetensors"))]
    assert not set(files[0]) & set(files[1])
    for rank, (restored, state, _) in enumerate(load(config, 3, replicated=read)):
        expected = State(rank, 3, seed=1, replicated=read).numbers()
        assert all(torch.equal(value, expected[key]) for key, value in state.numbers().items())
        stages = (0, 2) if written else (2, 0)
        said = f"written by 2 ranks with ZeRO-{stages[0]}, read by 3 ranks with ZeRO-{stages[1]}"
        assert restored.conversion == said


def test_no_line_without_a_conversion(config):
    save(config, 2)
    assert [restored.conversion for restored, *_ in load(config, 2)] == [None, None]


def test_a_whole_parameter_has_its_shape(config, folder):
    save(config, 3, seed=1)
    reader = FragmentReader(newest(folder))
    full = State(0, 1, seed=1).full["master"]
    assert torch.equal(reader.full("ema", "a"), full[:24].view(4, 6))
    assert torch.equal(reader.full("master", "c"), full[34:])
    assert reader.kinds == {"master", "exp_avg", "exp_avg_sq", "ema"}


def test_no_checkpoint_is_a_fresh_start(config):
    assert load(config)[0][0] is None


def test_a_directory_without_its_marker_does_not_exist(config, folder):
    save(config, seed=1, step=4)
    save(config, seed=2, step=8)
    (folder / NEW / MARKER).unlink()
    assert [path.name for path in committed(folder)] == [OLD]
    assert load(config)[0][0].progress.step == 4


def damage_flip(path):
    shard = next(path.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)


def damage_cut(path):
    shard = next(path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])


def damage_gone(path):
    next(path.glob("*.safetensors")).unlink()


def damage_swapped(path):
    one, other = sorted(path.glob("*.safetensors"))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def damage_stale(path):
    for shard in path.glob("*.safetensors"):
        shutil.copy(path.parent / OLD / shard.name, shard)


def damage_manifest(path):
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["progress"]["samples_seen"] += 16
    (path / MANIFEST).write_text(json.dumps(manifest))


def damage_manifest_gone(path):
    (path / MANIFEST).unlink()


DAMAGES = [damage_flip, damage_cut, damage_gone, damage_swapped, damage_stale, damage_manifest, damage_manifest_gone]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_damaged_checkpoint_is_named_and_the_older_one_is_used(config, folder, capsys, damage, ranks):
    save(config, 2, seed=1, step=4)
    save(config, 2, seed=2, step=8)
    damage(folder / NEW)
    for rank, (restored, state, _) in enumerate(load(config, ranks)):
        assert (restored.progress.step, restored.path) == (4, str(folder / OLD))
        assert torch.equal(state.partitions[0], State(rank, ranks, seed=1).partitions[0])
    (warning,) = capsys.readouterr().err.splitlines()
    assert f"{folder / NEW} is damaged" in warning
    assert warning.endswith(f"{folder / OLD} is used instead")
    with pytest.raises(CheckpointError, match=NEW):
        verify(folder / NEW)
    assert newest(folder).name == OLD


def test_all_damaged_is_an_error_and_never_a_fresh_start(config, folder):
    save(config)
    damage_flip(folder / OLD)
    with pytest.raises(CheckpointError, match=r"all 1 checkpoints .* damaged"):
        load(config, 2)


def identity_with(**changes):
    return {kind: {**values, **changes.get(kind, {})} for kind, values in IDENTITY.items()}


@pytest.mark.parametrize("more", [{"flow.num_stages": 2}, {"flow.twist": 1}])
def test_a_checkpoint_of_another_model_is_refused(config, more):
    save(config)
    key, value = next(iter(more.items()))
    text = f"made with {key}={IDENTITY['model'].get(key)}, this run has {key}={value}; set it back"
    with pytest.raises(CheckpointError, match=text):
        load(config, identity=identity_with(model=more))


def test_another_data_order_needs_a_flag(config):
    save(config)
    other = identity_with(data={"run.seed": 5})
    with pytest.raises(CheckpointError, match=r"run\.seed=0, this run has run\.seed=5.*add --new-data-order"):
        load(config, identity=other)
    restored = load(config, identity=other, allow_new_data=True)[0][0]
    assert restored.new_data_order == "new data order from here on: run.seed=0 -> 5"
    assert load(config)[0][0].new_data_order is None


def test_a_checkpoint_of_another_version_is_refused_in_one_line(config, folder):
    save(config)
    manifest = json.loads((folder / OLD / MANIFEST).read_text()) | {"schema": "ecar-checkpoint-v9"}
    text = json.dumps(manifest)
    (folder / OLD / MANIFEST).write_text(text)
    (folder / OLD / MARKER).write_bytes(checkpoint_files.marker_of(text.encode()))
    with pytest.raises(CheckpointError, match=r"^[^\n]*schema 'ecar-checkpoint-v9', this version[^\n]*$"):
        load(config)


def test_only_the_newest_are_kept(tmp_path):
    config = make_config(tmp_path, keep=2)
    for step in range(1, 6):
        save(config, seed=step, step=step)
    assert checkpoints(tmp_path) == ["step-00000004", "step-00000005"]


def test_keep_every_samples(tmp_path):
    config = make_config(tmp_path, keep=2, keep_every_samples=48)  # three steps
    for step in (1, 2, 4, 5, 6, 7, 8):
        save(config, seed=step, step=step)
    assert checkpoints(tmp_path) == [f"step-{step:08d}" for step in (4, 6, 7, 8)]


def test_a_truncated_checkpoint_does_not_count_as_kept(tmp_path, folder):
    config = make_config(tmp_path, keep=2)
    for step in (1, 2):
        save(config, seed=step, step=step)
    damage_cut(folder / "step-00000002")
    save(config, seed=3, step=3)
    assert checkpoints(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_checkpoint_found_damaged_at_the_start_does_not_count_as_kept(tmp_path, folder):
    config = make_config(tmp_path, keep=2)
    for step in (1, 2):
        save(config, seed=step, step=step)
    damage_flip(folder / "step-00000002")  # its size is right
    save(config, seed=3, step=3, restore=True)
    assert checkpoints(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_new_checkpoint_is_never_removed_for_damaged_newer_ones(tmp_path, folder):
    config = make_config(tmp_path, keep=2)
    for step in (4, 8, 12):
        save(config, seed=step, step=step)
    damage_flip(folder / "step-00000012")
    damage_flip(folder / NEW)
    save(make_config(tmp_path, keep=2), seed=6, step=6)
    assert checkpoints(tmp_path) == ["step-00000006"]


def test_saving_a_step_again_replaces_it(config, folder):
    save(config, 2, seed=1)
    save(config, 1, seed=2)
    verify(folder / OLD)
    assert [path.name for path in folder.iterdir()] == [OLD]
    assert torch.equal(load(config)[0][1].partitions[0], State(0, 1, seed=2).partitions[0])


def test_nothing_in_a_checkpoint_is_pickled(config, folder):
    save(config, 2)
    names = sorted(path.name for path in (folder / OLD).iterdir())
    assert names == [MARKER, MANIFEST, "state-00000-of-00002.safetensors", "state-00001-of-00002.safetensors"]
    assert set(load_file(folder / OLD / names[2])) >= {"master:a:0", "exp_avg:a:0", "ema:a:0"}


def test_everything_is_on_disk_before_the_rename(config, folder, monkeypatch):
    order, fsync, rename = [], os.fsync, os.rename

    def noted(handle):
        order.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", lambda old, new: (order.append("rename"), rename(old, new)))
    save(config)
    assert order[:3] == ["state-00000-of-00001.safetensors", MANIFEST, MARKER]
    assert order[3].startswith(f"tmp-{OLD}")
    assert order[4:] == ["rename", "checkpoints"]


def test_the_next_save_removes_the_remains_of_a_kill(config, folder):
    (folder / "tmp-step-00000004-dead").mkdir(parents=True)
    (folder / "step-00000002").mkdir()  # its marker was removed before its files
    (folder.parent / "ema/tmp-step-00000002-dead").mkdir(parents=True)
    save(config)
    assert [path.name for path in folder.iterdir()] == [OLD]
    assert not list((folder.parent / "ema").iterdir())


def test_a_checkpoint_loses_its_marker_before_anything_else(tmp_path, monkeypatch):
    config = make_config(tmp_path, keep=2)
    save(config, step=1)
    save(config, step=2)
    gone, rmtree = [], shutil.rmtree
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, **more: (gone.append((path / MARKER).exists()), rmtree(path, **more))
    )
    save(config, step=3)
    assert gone == [False]


def test_a_gap_in_a_parameter_is_an_error(config, folder):
    save(config)
    with pytest.raises(CheckpointError, match="24 of 25 values of ema a"):
        FragmentReader(newest(folder)).read("ema", "a", 0, 25)


def test_a_rank_opens_only_the_files_that_it_needs(config, monkeypatch):
    save(config, 4)
    opened = []
    monkeypatch.setattr(
        "ecar_dist.runtime.checkpoint.reader.open_fragments",
        lambda path, manifest, file, *more: (opened.append(file.name), open_fragments(path, manifest, file, *more))[1],
    )
    load(config, 2)
    # 37 values: 10 in each file, 19 for each reader. Both readers need the second file
    assert sorted(opened) == [f"state-{rank:05d}-of-00004.safetensors" for rank in (0, 1, 1, 2, 3)]


def test_a_file_name_in_a_manifest_cannot_leave_the_folder(config, folder):
    save(config)
    manifest = json.loads((folder / OLD / MANIFEST).read_text())
    manifest["files"][0]["name"] = "../../secret"
    text = json.dumps(manifest)
    (folder / OLD / MANIFEST).write_text(text)
    (folder / OLD / MARKER).write_bytes(checkpoint_files.marker_of(text.encode()))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        load(config)


def test_emas_are_matched_by_description_when_the_config_moves_them(tmp_path):
    before = make_config(tmp_path, ema={"half_life_samples": [100, 200], "sigma_rel": [0.1]})
    after = make_config(tmp_path, ema={"half_life_samples": [100, 300, 400], "sigma_rel": [0.1]})

    def numbered(world):
        state = State(0, 1, seed=1)
        ema = ShardedEma(state.partitions, before.ema)
        for number, kind in enumerate(ema.by_kind):
            ema.by_kind[kind][0].fill_(number)
        with store_of(before, world) as store:
            store.begin(Progress(64, 4), state, ema, {})
            store.finish()

    Ranks(1)(numbered)
    restored, state, ema = load(after)[0]
    ours = {kind: average[0][0].item() for kind, average in ema.by_kind.items()}
    # "ema3" is now the power function, which was "ema2" before; the new "ema1" continues from the old "ema1"
    assert ours == {"ema": 0.0, "ema1": 1.0, "ema2": state.partitions[0][0].item(), "ema3": 2.0}
    changed, new = restored.conversion.split("; ")
    assert re.search("half-life 300, .* from .* half-life 200, ", changed)
    assert re.search("half-life 400, .* new", new)
    assert restored.ema_since == {"ema": 0, "ema1": 4, "ema2": 4, "ema3": 0}  # a fit needs to know this
    save(after, step=6, restore=True)
    manifest = read_manifest(newest(tmp_path / "tiny/checkpoints"))
    assert manifest.ema_since == restored.ema_since
    assert load(after)[0][0].ema_since == restored.ema_since
    fewer = load(make_config(tmp_path, ema={"half_life_samples": 100}))[0][0]
    assert re.search("sigma_rel 0.1 .*dropped", fewer.conversion)


def test_a_checkpoint_of_another_run_needs_a_flag(tmp_path):
    config = make_config(tmp_path)
    save(config, run_id="one")
    with pytest.raises(CheckpointError, match=r"another run \(one,.* two\); .*--adopt"):
        load(config, run_id="two")
    assert load(config, run_id="one")[0][0].conversion is None
    assert load(config, run_id="two", adopt=True)[0][0].conversion == "adopted from run one"


def test_precision_is_named_where_it_changes(tmp_path):
    config = make_config(tmp_path)
    save(config)
    bf16 = config.model_copy(update={"deepspeed": config.deepspeed.model_copy(update={"precision": "bf16"})})
    said = "written by 1 rank with ZeRO-2 in fp32, read by 1 rank with ZeRO-2 in bf16"
    assert load(bf16)[0][0].conversion == said


def test_a_start_killed_while_it_claims_the_directory_can_be_repeated(tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path / "run")
    monkeypatch.setattr("pathlib.Path.mkdir", dying_after_two(monkeypatch))
    with pytest.raises(KeyboardInterrupt):
        directory.open_for_training()
    monkeypatch.undo()
    (directory.path / ".lineage.json.host.1.ab.tmp").write_text("")
    directory.open_for_training()
    assert directory.attempts() == []


def dying_after_two(monkeypatch):
    mkdir, calls = Path.mkdir, []

    def make(self, *options, **more):
        if len(calls) == 2:  # the run's own folder and the first folder in it
            raise KeyboardInterrupt
        calls.append(self)
        mkdir(self, *options, **more)

    return make
