"""Checkpoints of many ranks: what the manifest lists, what each rank is sent, and what a reader must never find."""

import json
import os

import pytest
import torch

from ecar_dist.errors import CheckpointError
from ecar_dist.runtime.checkpoint import files as checkpoint_files
from ecar_dist.runtime.checkpoint.files import MANIFEST, MARKER, marker_of, read_manifest, verify
from ecar_dist.runtime.checkpoint.manifest import SCHEMA, Piece, even_pieces, parse_manifest
from ecar_dist.runtime.checkpoint.restore import needed_by
from ecar_dist.runtime.checkpoint.store import CheckpointStore
from ecar_dist.runtime.ema import ShardedEma
from ecar_dist.storage.untrusted import UntrustedError
from tests.runtime.checkpoint.worlds import SHAPES, State, ThreadWorld, checkpoints, load, make_config, save

OLD, NEW = "step-00000004", "step-00000008"


@pytest.fixture
def config(tmp_path):
    return make_config(tmp_path)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "tiny/checkpoints"


def edit(path, change):
    """Change a committed manifest, with a matching marker."""
    tree = json.loads((path / MANIFEST).read_text())
    change(tree)
    text = json.dumps(tree).encode()
    (path / MANIFEST).write_bytes(text)
    (path / MARKER).write_bytes(marker_of(text))


# equal shares of every parameter, as under ZeRO 3


@pytest.mark.parametrize(("written_by", "read_by"), [(1, 1), (3, 2), (2, 5), (4, 1), (30, 4), (4, 7)])
@pytest.mark.parametrize("read_shares", [True, False])
def test_any_layout_reads_equal_shares(config, folder, written_by, read_by, read_shares):
    save(config, written_by, seed=1, shares=True)
    verify(folder / OLD)
    for rank, (_, state, ema) in enumerate(load(config, read_by, shares=read_shares)):
        expected = State(rank, read_by, seed=1, shares=read_shares)
        ours, theirs = state.numbers(ema), expected.numbers(ShardedEma(expected.partitions, config.ema))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_equal_shares_are_read_from_the_old_layouts(config):
    save(config, 3, seed=1)
    for rank, (_, state, _) in enumerate(load(config, 4, shares=True)):
        assert torch.equal(state.partitions[0], State(rank, 4, seed=1, shares=True).partitions[0])


def test_a_manifest_of_equal_shares_lists_files_and_no_fragments(config, folder):
    save(config, 2, shares=True)
    tree = json.loads((folder / OLD / MANIFEST).read_text())
    assert [file["share"] for file in tree["files"]] == [[0, 2], [1, 2]]
    assert not any("fragments" in file for file in tree["files"])
    assert tree["schema"] != SCHEMA  # an earlier version must not call it damaged, and remove it


def test_the_manifest_grows_with_files_alone(config, folder):
    sizes = []
    for tensors in (3, 60):
        shapes = {f"block.{number}.weight": (8,) for number in range(tensors)}
        save(config, 4, shapes=shapes, shares=True)
        sizes.append(len(json.dumps(json.loads((folder / OLD / MANIFEST).read_text())["files"])))
    assert abs(sizes[0] - sizes[1]) < 20  # only the digits of the sizes differ


def test_other_fragments_under_zero_3_are_listed(config, folder):
    save(config, 2, zero_stage=3)  # cut like ZeRO 2
    assert all(file.share is None for file in read_manifest(folder / OLD).files)


@pytest.mark.parametrize("ranks", [1, 3, 5, 40])
def test_the_files_of_an_interval_follow_from_it(config, folder, ranks):
    save(config, ranks, shares=True)
    manifest = read_manifest(folder / OLD)
    for reader in range(3):
        fragments = State(reader, 3, 0, shares=True).fragments
        expected = [
            number
            for number in range(ranks)
            for piece in even_pieces(SHAPES, number, ranks)
            for one in fragments
            if one.name == piece.name and piece.start < one.start + one.numel and one.start < piece.start + piece.numel
        ]
        assert [manifest.files.index(file) for file in needed_by(fragments)(manifest)] == sorted(set(expected))


def test_even_pieces_are_every_value_once():
    pieces = [piece for share in range(7) for piece in even_pieces({"a": (4, 6), "b": (3,), "c": ()}, share, 7)]
    assert sum(piece.numel for piece in pieces) == 24 + 3 + 1
    assert Piece("a", 20, 4) in pieces


@pytest.mark.parametrize(
    "lie",
    [
        lambda tree: tree["files"][0].update(share=[1, 2]),  # twice
        lambda tree: tree["files"][0].update(share=[0, 3]),
        lambda tree: tree["files"][0].update(share=[2, 2]),
        lambda tree: tree["files"].pop(),
        lambda tree: tree["files"][0].update(fragments=["a:0:12"]),  # both
        lambda tree: tree["files"][0].pop("share"),  # neither
        lambda tree: (tree["files"][0].pop("share"), tree["files"][0].update(fragments=["a:0:12", "b:0:5", "c:0:2"])),
        lambda tree: tree["files"][0].update(bytes=1 << 40),
    ],
)
def test_shares_that_do_not_cover_every_value_once_are_refused(config, folder, lie):
    save(config, 2, shares=True)
    tree = json.loads((folder / OLD / MANIFEST).read_text())
    lie(tree)
    with pytest.raises(UntrustedError):
        parse_manifest(json.dumps(tree).encode())


def test_a_file_that_has_another_share_is_damaged(config, folder):
    save(config, 2, shares=True)
    edit(folder / OLD, lambda tree: [file.update(share=[1 - file["share"][0], 2]) for file in tree["files"]])
    with pytest.raises(CheckpointError, match=r"lacks \w+:a:"):
        verify(folder / OLD)


# what the ranks send each other


def test_only_the_first_rank_hears_of_the_files(config, monkeypatch):
    """A gather to all would be R entries on each of R ranks."""
    heard = []
    monkeypatch.setattr(ThreadWorld, "gather", lambda self, value: heard.append(value))
    save(config, 3, shares=True)
    assert not heard


# what no reader would accept


def limit_manifests(monkeypatch, limit):
    for place in ("manifest", "files", "bucket"):
        monkeypatch.setattr(f"ecar_dist.runtime.checkpoint.{place}.MAX_MANIFEST_BYTES", limit)


def test_a_manifest_beyond_the_readers_limit_is_never_committed(config, tmp_path, monkeypatch, capsys):
    save(config, step=4)
    limit_manifests(monkeypatch, 500)
    with pytest.raises(CheckpointError, match="readers accept 500"):
        save(config, step=8)
    assert checkpoints(tmp_path) == [OLD]


def test_a_newest_manifest_that_this_version_cannot_read_hides_no_older_one(config, folder, monkeypatch, capsys):
    save(config, seed=1, step=4)
    save(config, seed=2, step=8)
    size = (folder / NEW / MANIFEST).stat().st_size
    (folder / NEW / MANIFEST).write_bytes((folder / NEW / MANIFEST).read_bytes() + b" " * 100)
    limit_manifests(monkeypatch, size + 50)
    restored, state, _ = load(config)[0]
    assert restored.progress.step == 4
    assert torch.equal(state.partitions[0], State(0, 1, 1).partitions[0])
    assert "cannot be read now" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["large", "cut", "other schema"])
def test_the_last_readable_checkpoint_stays(tmp_path, folder, monkeypatch, fault):
    """No matter how many newer ones cannot be read: unreadable ones do not count as kept."""
    config = make_config(tmp_path, keep=2)
    save(config, seed=1, step=4)
    for step in (8, 12):
        path = folder / f"step-{step:08d}"
        os.makedirs(path)
        for file in (folder / OLD).iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        edit(path, lambda tree, step=step: tree["progress"].update(step=step))
        if fault == "large":
            content = (path / MANIFEST).read_bytes() + b" " * 10_000
            (path / MANIFEST).write_bytes(content)
            (path / MARKER).write_bytes(marker_of(content))
        if fault == "cut":
            file = next(path.glob("*.safetensors"))
            os.truncate(file, file.stat().st_size - 8)
        if fault == "other schema":
            edit(path, lambda tree: tree.update(schema="ecar-checkpoint-v9"))
    if fault == "large":
        limit_manifests(monkeypatch, (folder / OLD / MANIFEST).stat().st_size + 1_000)

    # A committed save that no reader accepts any more, e.g. because of a disk fault.
    clean = CheckpointStore._remove_old

    def damaged_at_once(store, newest):
        file = next((folder / newest).glob("*.safetensors"))
        os.truncate(file, file.stat().st_size - 8)
        clean(store, newest)

    monkeypatch.setattr(CheckpointStore, "_remove_old", damaged_at_once)
    save(config, seed=2, step=16)
    assert OLD in checkpoints(tmp_path)
    assert load(config)[0][0].progress.step == 4
    assert checkpoint_files.verify(folder / OLD) is None
