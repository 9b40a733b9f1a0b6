"""What other tools see in our image shards, and in latent shards with gaps: the same samples, in the same order."""

import io
import shutil
import subprocess

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_tools.images.shard import shard
from ecar_dist.data.images.shards import ImageShards
from ecar_dist.data.shards.write import ShardContent, write_latent_shard
from tests.data.image_sets import encoded

NAME = "000001.tar"  # neither the first shard nor a full one


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of seven JPEG and PNG images, in shards of eight and six."""
    root = tmp_path_factory.mktemp("compatible")
    for label in range(2):
        (root / f"in/{label}").mkdir(parents=True)
        for place in range(7):
            kind = "PNG" if place % 3 == 0 else "JPEG"
            (root / f"in/{label}/{place}.{kind}").write_bytes(encoded(10 * label + place, kind))
    shard(str(root / "in"), root / "out", samples_per_shard=8)
    return root / "out"


@pytest.fixture(scope="module")
def records(images):
    shards = ImageShards(images)
    first = shards.manifest.shards[1].first_index
    return shards.read_many(range(first, len(shards)))


def test_webdataset_sees_exactly_count(images, records):
    urls = sorted(str(path) for path in images.glob("*.tar"))
    manifest = ImageShards(images).manifest
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == manifest.count == 14
    assert [sample["__key__"] for sample in samples] == [f"{place:012d}" for place in range(14)]
    assert [int(sample["cls"]) for sample in samples[8:]] == [record.label for record in records]
    assert [sample.get("jpg") or sample["png"] for sample in samples[8:]] == [record.data for record in records]


def test_webdataset_decodes_them(images, records):
    decoded = list(webdataset.WebDataset(str(images / NAME), shardshuffle=False).decode("rgb8"))
    for sample, record in zip(decoded, records, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(record.data)).convert("RGB"))
        assert np.array_equal(sample.get("jpg", sample.get("png")), pixels)
        assert sample["cls"] == record.label


@pytest.mark.parametrize("with_index", [True, False])
def test_dali_sees_exactly_count(images, records, with_index):
    from nvidia.dali import fn, pipeline_def, types

    index = {"index_paths": [str(images / "000001.idx")]} if with_index else {}

    @pipeline_def(batch_size=6, num_threads=1, device_id=None)
    def pipeline():
        read = {"ext": ["jpg;png", "cls"], "missing_component_behavior": "error", **index}
        encoded_image, label = fn.readers.webdataset(paths=[str(images / NAME)], **read)
        return fn.decoders.image(encoded_image, output_type=types.RGB), label

    graph = pipeline()
    graph.build()
    assert list(graph.epoch_size().values()) == [len(records)]
    pixels, labels = graph.run()
    for row, record in enumerate(records):
        assert np.array_equal(np.array(pixels.at(row)), np.asarray(Image.open(io.BytesIO(record.data)).convert("RGB")))
        assert int(bytes(np.array(labels.at(row)))) == record.label


def test_the_index_equals_that_of_dalis_tool(images, tmp_path):
    from wds2idx import IndexCreator

    for path in sorted(images.glob("*.tar")):
        with IndexCreator(str(path), str(tmp_path / "theirs.idx"), verbose=False) as creator:
            creator.create_index()
        assert (tmp_path / "theirs.idx").read_bytes() == path.with_suffix(".idx").read_bytes()


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar program")
def test_tar_lists_and_extracts(images, records, tmp_path):
    listed = subprocess.run(["tar", "tf", images / NAME], capture_output=True, text=True, check=True)
    assert listed.stderr == ""
    assert len(listed.stdout.split()) == 2 * len(records)
    subprocess.run(["tar", "xf", images / NAME, "-C", tmp_path], check=True)
    for record in records:
        image = next(path for path in tmp_path.glob(f"{record.key}.*") if path.suffix != ".cls")
        assert image.read_bytes() == record.data
        assert int((tmp_path / f"{record.key}.cls").read_text()) == record.label


def test_numpy_reads_the_table(images, records):
    table = np.load(images / "000001.npy", allow_pickle=False)
    data = (images / NAME).read_bytes()
    for row, record in zip(table, records, strict=True):
        assert data[row["offset"] : row["offset"] + row["size"]] == record.data
        assert (row["key"].decode(), row["label"]) == (record.key, record.label)


@pytest.fixture
def gappy(tmp_path):
    """A latent shard of rows 40 to 48 except 41 and 47, with mirrored moments; and its content."""
    generator = np.random.default_rng(0)
    moments = generator.normal(size=(7, 4, 3, 2)).astype(np.float16)
    labels = generator.integers(0, 10, 7)
    content = ShardContent(40, moments, labels, moments[..., ::-1], missing=(41, 47))
    write_latent_shard(tmp_path, 0, content, {"encoder": {}, "plan_id": "p"})
    return tmp_path, moments, labels


KEYS = [f"{row:012d}" for row in (40, 42, 43, 44, 45, 46, 48)]


def test_a_latent_shard_with_gaps_for_webdataset(gappy):
    folder, moments, labels = gappy
    seen = list(webdataset.WebDataset(str(folder / "000000.tar"), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in seen] == KEYS
    assert np.array_equal(np.stack([sample["latent.npy"] for sample in seen]), moments)
    assert np.array_equal(np.stack([sample["latent_flip.npy"] for sample in seen]), moments[..., ::-1])
    assert [sample["cls"] for sample in seen] == labels.tolist()


@pytest.mark.parametrize("with_index", [True, False])
def test_a_latent_shard_with_gaps_for_dali(gappy, with_index):
    from nvidia.dali import fn, pipeline_def, types

    folder, moments, labels = gappy
    index = {"index_paths": [str(folder / "000000.idx")]} if with_index else {}

    @pipeline_def(batch_size=7, num_threads=1, device_id=None)
    def pipeline():
        read = {"ext": ["latent_flip.npy", "cls"], "missing_component_behavior": "error", **index}
        encoded_array, label = fn.readers.webdataset(paths=[str(folder / "000000.tar")], **read)
        return fn.decoders.numpy(encoded_array, dtype=types.FLOAT16), label

    graph = pipeline()
    graph.build()
    assert list(graph.epoch_size().values()) == [7]
    arrays, texts = graph.run()
    assert np.array_equal(np.stack([np.array(arrays.at(row)) for row in range(7)]), moments[..., ::-1])
    assert [int(bytes(np.array(texts.at(row)))) for row in range(7)] == labels.tolist()


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar program")
def test_a_latent_shard_with_gaps_for_tar_and_numpy(gappy, tmp_path):
    from wds2idx import IndexCreator

    folder, moments, _ = gappy
    with IndexCreator(str(folder / "000000.tar"), str(tmp_path / "theirs.idx"), verbose=False) as creator:
        creator.create_index()
    assert (tmp_path / "theirs.idx").read_bytes() == (folder / "000000.idx").read_bytes()
    subprocess.run(["tar", "xf", folder / "000000.tar", "-C", tmp_path], check=True)
    assert np.array_equal(np.stack([np.load(tmp_path / f"{key}.latent.npy") for key in KEYS]), moments)
