import dataclasses
import json

import numpy as np
import pytest

from data_tools import finalize as finalize_module
from data_tools.encode.commit import read_marker
from data_tools.encode.plan import read_plan
from data_tools.failures import Failure
from data_tools.finalize import finalize, prove_coverage
from data_tools.moments_statistics import combine, measure
from ecar_dist.data.shards.entries import ShardTable
from ecar_dist.data.shards.manifest import load_manifest
from ecar_dist.data.shards.read import open_latent_shard
from ecar_dist.errors import DataError
from ecar_dist.vae.codec import EncoderIdentity
from tests.data_tools.image_folders import content, encode_small, write_image_shards


@pytest.fixture
def encoded(tmp_path):
    encode_small(write_image_shards(tmp_path), tmp_path / "out")
    return tmp_path / "out"


def test_content_of_the_manifest(encoded):
    finalize(encoded)
    manifest = load_manifest(encoded)
    assert (manifest.count, manifest.num_classes, manifest.moments_shape) == (24, 3, (12, 2, 2))
    assert [entry.count for entry in manifest.shards] == [5, 5, 5, 5, 4]
    assert [entry.first_index for entry in manifest.shards] == [0, 5, 10, 15, 20]
    assert manifest.class_names == ["bird", "cat", "dog"]
    assert manifest.preprocessing["decoder"] == "pil"
    assert manifest.preprocessing["resize"].startswith("cubic: ")
    assert manifest.failures == {"count": 0, "file": None}
    shards = [open_latent_shard(encoded / entry.name, entry, manifest) for entry in manifest.shards]
    moments = np.concatenate([shard.moments for shard in shards]).astype(np.float64)
    assert np.allclose(manifest.statistics["raw_mean"], moments.mean((0, 2, 3)))
    assert np.allclose(manifest.statistics["raw_std"], moments.std((0, 2, 3)))
    scale = manifest.encoder["scaling_factor"]
    assert np.allclose(manifest.statistics["normalised_std"], moments.std((0, 2, 3)) * scale)


def test_a_folder_without_plan(tmp_path):
    with pytest.raises(DataError, match=r"plan\.json does not exist; make the shards with `ecar-data encode"):
        finalize(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("first_index", 6), ("first_row", 6), ("count", 4), ("missing", [7]), ("bytes", 10240), ("name", "000002.tar")],
)
def test_a_marker_that_is_not_its_tars_counts_as_missing_and_is_made_again(encoded, field, value):
    before = (encoded / "000001.json").read_bytes()
    marker = json.loads(before)
    marker["entry"][field] = value
    (encoded / "000001.json").write_text(json.dumps(marker))
    with pytest.raises(DataError, match=r"lacks 1 of 5 shards \(000001\)"):
        finalize(encoded)
    assert not (encoded / "manifest.json").exists()
    encode_small(encoded.parent / "images", encoded)
    assert (encoded / "000001.json").read_bytes() == before


def test_a_shard_in_the_place_of_another_is_made_again(encoded):
    """The sizes are equal: only the description in the tar reveals it."""
    before = content(encoded)
    for kind in ("tar", "idx", "json"):
        (encoded / f"000001.{kind}").write_bytes((encoded / f"000002.{kind}").read_bytes())
    with pytest.raises(DataError, match=r"lacks 1 of 5 shards \(000001\)"):
        finalize(encoded)
    encode_small(encoded.parent / "images", encoded)
    assert content(encoded) == before


def test_the_command_for_missing_shards_keeps_max_bad(encoded):
    (encoded / "000001.json").unlink()
    with pytest.raises(DataError, match=r"make them with: ecar-data encode .* --tasks 1 --max-bad 0\.2$"):
        finalize(encoded, max_bad=0.2)
    with pytest.raises(DataError, match=r"make them with: ecar-data encode .* --tasks 1$"):
        finalize(encoded)


def changed(marker, **changes):
    return dataclasses.replace(marker, entry=dataclasses.replace(marker.entry, **changes))


def test_samples_and_failures_must_cover_the_rows_of_a_shard(encoded):
    """Rows 5..9 are shard 1's."""
    plan, marker = read_plan(encoded), read_marker(encoded, 1)
    prove_coverage(encoded, plan, 1, marker)
    failed = dataclasses.replace(changed(marker, count=4, missing=(7,)), failures=(Failure(7, "k", "s", "", ""),))
    prove_coverage(encoded, plan, 1, failed)
    wrong = {
        "lost": (9, changed(marker, count=4)),
        "no failure for a gap": (7, changed(marker, count=4, missing=(7,))),
        "sampled and failed": (7, dataclasses.replace(failed, entry=marker.entry)),
        "another shard": (5, read_marker(encoded, 2)),
        "outside": (10, changed(marker, count=6)),
    }
    for name, (row, found) in wrong.items():
        with pytest.raises(DataError, match=rf"the first is {row}; delete 000001.*ecar-data encode"):
            prove_coverage(encoded, plan, 1, found)
        assert name


def test_finalize_checks_coverage_itself(encoded, monkeypatch):
    """A marker that agrees with a tar, although a row is lost."""
    marker = json.loads((encoded / "000001.json").read_text())
    marker["entry"] = {**marker["entry"], "count": 4, "missing": [7]}
    (encoded / "000001.json").write_text(json.dumps(marker))
    monkeypatch.setattr(finalize_module, "committed_marker", lambda out, index, _: read_marker(out, index))
    with pytest.raises(DataError, match=r"rows missing, .*: 1, the first is 7"):
        finalize(encoded)
    assert sorted(path.name for path in encoded.iterdir() if path.name[0] not in "0p") == []


def test_many_shards_have_a_table(encoded, monkeypatch):
    """The same set in both forms, with the sums added up in parts."""
    finalize(encoded)
    listed = load_manifest(encoded)
    monkeypatch.setattr(finalize_module, "TABLE_SHARDS", 4)
    monkeypatch.setattr(finalize_module, "_MOST_SUMS", 2)
    finalize(encoded)
    assert load_manifest(encoded) == listed  # a run that has started finds the same id
    (encoded / "manifest.json").unlink()
    finalize(encoded)
    manifest = load_manifest(encoded)
    assert isinstance(manifest.shards, ShardTable)
    assert list(manifest.shards) == listed.shards
    assert manifest.dataset_id != listed.dataset_id
    assert np.allclose(manifest.statistics["raw_std"], listed.statistics["raw_std"], rtol=1e-12)
    before = content(encoded)
    finalize(encoded)
    assert content(encoded) == before


def test_a_marker_of_another_plan_counts_as_missing(encoded):
    marker = json.loads((encoded / "000001.json").read_text())
    (encoded / "000001.json").write_text(json.dumps({**marker, "plan_id": "other"}))
    with pytest.raises(DataError, match=r"lacks 1 of 5 shards \(000001\)"):
        finalize(encoded)


def test_statistics_of_a_posterior():
    generator = np.random.default_rng(0)
    identity = EncoderIdentity("kl", "n", "w", "c", 2, 8, scaling_factor=0.5, shift_factor=1.0, deterministic=False)
    mean = generator.normal(3.0, 2.0, (400, 2, 4, 4))
    logvar = np.full((400, 2, 4, 4), 2 * np.log(0.1))
    moments = np.concatenate((mean, logvar), 1).astype(np.float16)
    whole = combine([measure(moments[:150], identity), measure(moments[150:], identity)], identity)
    assert np.allclose(whole["raw_mean"], 3.0, atol=0.1)
    assert np.allclose(whole["raw_std"], 2.0, atol=0.05)
    assert np.allclose(whole["normalised_mean"], 1.0, atol=0.05)
    assert np.allclose(whole["normalised_std"], np.sqrt(4.0 + 0.01) * 0.5, atol=0.03)
    assert whole["posterior_sharpness"] == pytest.approx(0.05, rel=0.05)
    assert whole["saturated_mean_share"] == whole["clamped_logvar_share"] == 0


def test_saturation_is_counted():
    identity = EncoderIdentity("kl", "n", "w", "c", 2, 8, scaling_factor=0.5, shift_factor=1.0, deterministic=False)
    moments = np.zeros((10, 4, 5, 2), np.float16)  # 200 means and 200 logvars
    moments[0, :2, 0] = [65504, -65504]
    moments[1, 2:, 0] = [-30, 20]
    moments[2, 2, :, 0] = -30
    whole = combine([measure(moments[:1], identity), measure(moments[1:], identity)], identity)
    assert whole["saturated_mean_share"] == 4 / 200
    assert whole["clamped_logvar_share"] == 9 / 200


def test_a_damaged_marker_counts_as_missing(encoded):
    (encoded / "000003.json").write_text("{")
    with pytest.raises(DataError, match=r"lacks 1 of 5 shards \(000003\)"):
        finalize(encoded)
