"""One bad image never kills a worker; too many do."""

import json

import numpy as np
import pytest
import torch

from data_tools import failures as failures_module
from data_tools.encode import settings as settings_module
from data_tools.encode.commit import CommittedFailures
from data_tools.encode.plan import read_plan
from data_tools.finalize import finalize
from data_tools.inspection import verify
from ecar_dist.data.images.decode import PilDecoder
from ecar_dist.data.images.shards import ImageShards
from ecar_dist.data.shards.manifest import load_manifest
from ecar_dist.data.shards.read import open_latent_shard
from ecar_dist.errors import DataError
from ecar_dist.vae.dct import DctCodec
from tests.data_tools.bad_images import BAD, write_bad_image_shards
from tests.data_tools.image_folders import CLASSES, content, encode_small, write_image_shards


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_bad_image_shards(tmp_path_factory.mktemp("bad"))


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """The same images, undamaged, as latents."""
    folder = tmp_path_factory.mktemp("clean")
    encode_small(write_image_shards(folder), folder / "latents")
    finalize(folder / "latents")
    return folder / "latents"


def bad_rows(out):
    plan = read_plan(out)
    order = np.concatenate([plan.source_indices(index) for index in range(plan.num_shards)])
    return sorted(np.flatnonzero(np.isin(order, BAD)).tolist())


def errors_of(out, name="errors.jsonl"):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def samples_of(folder):
    """Row of the plan -> moments and label."""
    manifest, found = load_manifest(folder), {}
    for entry in manifest.shards:
        shard = open_latent_shard(folder / entry.name, entry, manifest)
        found.update(zip(entry.rows.tolist(), zip(shard.moments, shard.labels, strict=True), strict=True))
    return found


@pytest.mark.parametrize("decoder", ["pil", "dali"])
def test_bad_images_are_left_out_listed_and_counted(images, clean, tmp_path, decoder, capsys):
    out = tmp_path / "latents"
    for task in (1, 0):
        encode_small(images, out, decoder=decoder, max_bad=0.125, task=task, tasks=2, flip="store")
    said = capsys.readouterr().err
    finalize(out, max_bad=0.125)
    verify(out)
    manifest, missing = load_manifest(out), bad_rows(out)
    assert manifest.count == 21
    assert manifest.failures == {"count": 3, "file": "errors.jsonl"}
    assert sorted(row for entry in manifest.shards for row in entry.missing) == missing
    assert [entry.first_index for entry in manifest.shards] == np.cumsum(
        [0, *(entry.count for entry in manifest.shards[:-1])]
    ).tolist()
    listed = errors_of(out)
    assert [error["row"] for error in listed] == missing
    assert {error["key"] for error in listed} == {f"{index:012d}" for index in BAD}
    assert {error["stage"] for error in listed} == {"decode"}
    assert all(error["shard"] == f"00000{int(error['key']) // 10}.tar" for error in listed)
    assert all("cannot be decoded (image file is truncated" in error["error"] for error in listed), "PIL's words"
    names = {f"{index:012d}": f"{CLASSES[index // 8]}/{index % 8}.{'png' if index % 2 else 'jpeg'}" for index in BAD}
    assert {error["key"]: error["name"] for error in listed} == names
    assert all(names[error["key"]] in error["error"] for error in listed)
    assert all(f"left out: {error['error']}" in said for error in listed)
    with_bad, without = samples_of(out), samples_of(clean)
    assert sorted(with_bad) == sorted(set(without) - set(missing))
    if decoder == "pil":
        for row, (moments, label) in with_bad.items():
            np.testing.assert_allclose(moments, without[row][0], atol=2e-3)
            assert label == without[row][1]


@pytest.mark.parametrize(("max_bad", "allowed"), [(0.0, 0), (1e-3, 0), (0.09, 2), (2 / 24, 2)])
def test_too_many_bad_images(images, tmp_path, max_bad, allowed):
    out = tmp_path / "latents"
    with pytest.raises(DataError, match=rf" of 24 images .*--max-bad .* {allowed}; .* image 0000000000") as caught:
        encode_small(images, out, max_bad=max_bad, batch_size=1)
    assert "\n" not in str(caught.value)
    assert f"{out}/errors.jsonl" in str(caught.value)
    assert [error["row"] for error in errors_of(out)] == bad_rows(out)[: allowed + 1]
    assert str(errors_of(out)[-1]["error"]) in str(caught.value) or allowed


def test_failures_of_other_tasks_count(images, tmp_path):
    out = tmp_path / "latents"
    encode_small(images, tmp_path / "probe", max_bad=1.0)
    shards = [row // 5 for row in bad_rows(tmp_path / "probe")]
    assert len(set(shards)) == 3
    encode_small(images, out, max_bad=2 / 24, task=shards[0], tasks=5)
    encode_small(images, out, max_bad=2 / 24, task=shards[1], tasks=5)
    with pytest.raises(DataError, match=rf"3 of 24 images .*{out}/errors-{shards[2]}-of-5\.jsonl"):
        encode_small(images, out, max_bad=2 / 24, task=shards[2], tasks=5)


def test_each_task_lists_the_failures_of_its_shards_and_finalize_those_of_all(images, tmp_path, capsys):
    out = tmp_path / "latents"
    for task in (2, 0, 1):
        for _ in range(2):  # the second run reads them from the markers
            encode_small(images, out, max_bad=0.2, task=task, tasks=3)
    lists = {path.name: [error["row"] for error in errors_of(out, path.name)] for path in out.glob("errors*")}
    by_task = {task: [row for row in bad_rows(out) if row // 5 % 3 == task] for task in range(3)}
    assert lists == {f"errors-{task}-of-3.jsonl": rows for task, rows in by_task.items() if rows}
    assert len(lists) > 1
    finalize(out, max_bad=0.2)
    assert [error["row"] for error in errors_of(out)] == bad_rows(out)
    encode_small(images, out, max_bad=0.2, task=0, tasks=3)  # a late task of the array
    assert [path.name for path in out.glob("errors*")] == ["errors.jsonl"]


def test_the_shard_in_work_counts_once(images, tmp_path):
    """Another worker commits it while this one still has its own failures of it."""
    out = tmp_path / "latents"
    encode_small(images, out, max_bad=0.2)
    committed = CommittedFailures(out)
    assert committed() == 3
    committed.begin(bad_rows(out)[0] // 5)
    assert committed() == 2


def test_a_higher_bound_takes_up_where_the_lower_one_ended(images, tmp_path):
    with pytest.raises(DataError, match="--max-bad"):
        encode_small(images, tmp_path / "out", max_bad=0.0)
    encode_small(images, tmp_path / "out", max_bad=0.2)
    with pytest.raises(DataError, match=r"3 of 24 images .*--max-bad 0\.001 allows 0"):
        finalize(tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()
    finalize(tmp_path / "out", max_bad=0.2)
    encode_small(images, tmp_path / "at once", max_bad=0.2)
    finalize(tmp_path / "at once", max_bad=0.2)
    assert content(tmp_path / "out") == content(tmp_path / "at once")


def test_many_bad_images_in_a_row_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(failures_module, "MAX_IN_A_ROW", 8)
    images = write_bad_image_shards(tmp_path, bad=tuple(range(24)))
    with pytest.raises(DataError, match=r"9 images .* 8 are allowed"):
        encode_small(images, tmp_path / "out", max_bad=1.0, samples_per_shard=24, batch_size=3)


def test_a_good_image_ends_the_row(images, tmp_path, monkeypatch):
    monkeypatch.setattr(failures_module, "MAX_IN_A_ROW", 2)
    encode_small(images, tmp_path / "out", max_bad=0.2)
    rows = [error["row"] for error in errors_of(tmp_path / "out")]
    assert len(rows) == 3
    assert np.diff(rows).max() > 1


def test_a_shard_that_would_be_empty(tmp_path):
    images = write_bad_image_shards(tmp_path, bad=tuple(range(24)))
    with pytest.raises(DataError, match=r"shard 000000 .* 5 images"):
        encode_small(images, tmp_path / "out", max_bad=1.0)
    assert len(errors_of(tmp_path / "out")) == 5


class Broken(DctCodec):
    """Returns moments that do not fit fp16 for images with a bright left half."""

    value = 0.0

    def encode(self, images):
        moments = super().encode(images)
        moments[images[:, :, :, : images.shape[-1] // 2].mean((1, 2, 3)) > 0.02, 3, 0, 1] = self.value
        return moments


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 65505.0, -1e5])
def test_moments_that_fp16_cannot_hold(tmp_path, monkeypatch, value):
    images, broken, listed = write_image_shards(tmp_path), Broken(8, torch.device("cpu")), {}
    broken.value = value
    monkeypatch.setattr(settings_module, "open_codec_by_spec", lambda *_: broken)
    for flip in ("none", "store"):
        out = tmp_path / flip
        encode_small(images, out, max_bad=0.9, flip=flip)
        finalize(out, max_bad=0.9)
        verify(out)
        assert load_manifest(out).count == 24 - len(errors_of(out))
        assert {error["stage"] for error in errors_of(out)} == {"encode"}
        assert all("65504" in error["error"] for error in errors_of(out))
        listed[flip] = {error["row"] for error in errors_of(out)}
    assert len(listed["none"]) > 0
    assert listed["none"] < listed["store"], "a mirrored image with a bright left half is bad as well"


def test_a_damaged_source_is_not_a_bad_image(tmp_path):
    images = write_image_shards(tmp_path)
    path = images / "000001.tar"
    image = ImageShards(images).read(10).data
    path.write_bytes(path.read_bytes().replace(image, image[:-40] + bytes(40)))
    with pytest.raises(DataError, match=r"000001\.tar.*its table says"):
        encode_small(images, tmp_path / "out", max_bad=1.0)
    assert not (tmp_path / "out/errors.jsonl").exists()


def test_a_decoder_out_of_memory_is_not_a_bad_image(tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(PilDecoder, "_convert", fail)
    with pytest.raises(MemoryError):
        encode_small(write_image_shards(tmp_path), tmp_path / "out", max_bad=1.0)
