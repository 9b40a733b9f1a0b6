import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from ecar_dist.data.images import decode as images_module
from ecar_dist.data.images.decode import open_decoder
from ecar_dist.data.images.formats import IMAGE_EXTENSIONS, background_name, image_extension, parse_background
from ecar_dist.errors import ConfigError, DataError

CHINA, FLOWER = load_sample_images().images  # uint8 [427, 640, 3]


def encoded(pixels, kind, **settings):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **settings)
    return buffer.getvalue()


def encoded_image(image, kind, **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def exif_rotated(kind="JPEG"):
    exif = Image.Exif()
    exif[274] = 6
    return encoded(CHINA, kind, exif=exif.tobytes())


def rotated_at_the_end():
    """The same PNG with the orientation after the pixels."""
    data = exif_rotated("PNG")
    start = data.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(data[start : start + 4], "big")
    return data[:start] + data[stop:-12] + data[start:stop] + data[-12:]


def animated(kind):
    return encoded(FLOWER, kind, save_all=True, append_images=[Image.fromarray(CHINA)])


RGBA = np.dstack([CHINA, FLOWER[..., 0]])
GREY_16 = (CHINA[..., 0].astype(np.uint16) << 8) + CHINA[..., 1]


BLOBS = {
    "jpeg": encoded(CHINA, "JPEG", quality=90),
    "jpeg of odd sides": encoded(FLOWER[:401, :333], "JPEG", quality=70),
    "progressive jpeg": encoded(FLOWER, "JPEG", progressive=True),
    "grey jpeg": encoded(CHINA[..., 0], "JPEG"),
    "rotated by exif": exif_rotated(),
    "png": encoded(FLOWER, "PNG"),
    "png with alpha": encoded(np.dstack([CHINA, FLOWER[..., 0]]), "PNG"),
    "grey 8x8 png": encoded(CHINA[100:108, 200:208, 0], "PNG"),
    "webp": encoded(CHINA, "WEBP", quality=90),
    "twice 207": encoded(CHINA[:414, :520], "PNG"),
    "palette png": encoded_image(Image.fromarray(CHINA).quantize(64), "PNG"),
    "palette png with transparency": encoded_image(Image.fromarray(RGBA).quantize(64), "PNG"),
    "grey png with alpha": encoded_image(Image.fromarray(RGBA).convert("LA"), "PNG"),
    "png with a transparent colour": encoded(FLOWER, "PNG", transparency=tuple(FLOWER[5, 5].tolist())),
    "webp with alpha": encoded(RGBA, "WEBP", lossless=True),
    "png rotated by exif": exif_rotated("PNG"),
    "png rotated at its end": rotated_at_the_end(),
    "webp rotated by exif": exif_rotated("WEBP"),
    "cmyk jpeg": encoded_image(Image.fromarray(CHINA).convert("CMYK"), "JPEG"),
    "16 bit grey": encoded(GREY_16, "PNG"),
    "16 bit tiff": encoded(GREY_16, "TIFF"),
    "black and white": encoded_image(Image.fromarray(CHINA).convert("1"), "PNG"),
    "gif": encoded(FLOWER, "GIF"),
    "tiff": encoded(CHINA, "TIFF"),
    "cmyk tiff": encoded_image(Image.fromarray(CHINA).convert("CMYK"), "TIFF"),
    "bmp": encoded(FLOWER, "BMP"),
    "avif": encoded(CHINA, "AVIF"),
    "animated gif": animated("GIF"),
    "animated webp": animated("WEBP"),
    "animated png": animated("PNG"),
    "two pictures in a jpeg": animated("MPO"),
    "1x1": encoded(CHINA[:1, :1], "PNG"),
    "1x1 jpeg": encoded(CHINA[:1, :1], "JPEG"),
}


@pytest.fixture(scope="module", params=["pil", "dali"])
def decoder(request):
    return open_decoder(request.param)


@pytest.mark.parametrize("kind", BLOBS)
def test_dali_and_pil_decode_to_the_same_bytes(kind):
    ours, reference = (open_decoder(name).decode([BLOBS[kind]], [kind])[0] for name in ("dali", "pil"))
    assert ours.dtype == np.uint8
    assert np.array_equal(ours, reference)


def test_shapes_orientation_and_channels(decoder):
    arrays = decoder.decode([BLOBS["png"], BLOBS["grey 8x8 png"], BLOBS["rotated by exif"]], ["a", "b", "c"])
    assert np.array_equal(arrays[0], FLOWER)
    assert np.array_equal(arrays[1], np.repeat(CHINA[100:108, 200:208, :1], 3, axis=2))
    assert arrays[2].shape == (640, 427, 3)


# noise pixel by pixel, which the two resizes treat differently: only their decoding is compared
DITHERED = ("black and white", "gif", "animated gif")


@pytest.mark.parametrize("size", [32, 256])
def test_resizes_differ_little(size):
    """Measured 38 dB and more over sides from 40 to 640; a crop off by one pixel gives 21 dB."""
    names = [name for name in BLOBS if name not in DITHERED]
    blobs = [BLOBS[name] for name in names]
    ours, reference = (open_decoder(name).decode_to_batch(blobs, names, size) for name in ("dali", "pil"))
    assert ours.shape == reference.shape == (len(blobs), size, size, 3)
    errors = np.maximum(np.square(ours.astype(float) - reference).mean(axis=(1, 2, 3)), 1e-9)
    assert (10 * np.log10(255**2 / errors)).min() > 37


WITH_ALPHA = {
    "rgba png": encoded(RGBA, "PNG"),
    "rgba webp": encoded(RGBA, "WEBP", lossless=True, exact=True),
    "rgba tiff": encoded(RGBA, "TIFF"),
}
COLOURS = {"white": (255, 255, 255), "black": (0, 0, 0), "#10ff80": (16, 255, 128)}


@pytest.mark.parametrize("kind", ["pil", "dali"])
@pytest.mark.parametrize("name", COLOURS)
def test_transparency_is_composited_on_the_background(kind, name):
    """A regression: a red background that is fully transparent came out as solid red."""
    decoder = open_decoder(kind, background=parse_background(name))
    alpha = RGBA[..., 3:].astype(float) / 255
    expected = alpha * CHINA + (1 - alpha) * np.array(COLOURS[name])
    for array in decoder.decode(list(WITH_ALPHA.values()), list(WITH_ALPHA)):
        assert np.abs(array - expected).max() <= 1.0
    hidden = encoded(np.full((9, 9, 4), (255, 0, 0, 0), np.uint8), "PNG")
    assert (decoder.decode_to_batch([hidden], ["red"], 4) == COLOURS[name]).all()


def test_integers_in_the_range_of_16_bits_are_16_bits(decoder):
    grey, integers = decoder.decode([BLOBS["16 bit grey"], encoded(GREY_16.astype(np.int32), "TIFF")], ["a", "b"])
    np.testing.assert_array_equal(grey, integers)


@pytest.mark.parametrize("mode", ["LA", "P", "PA"])
def test_transparency_of_grey_and_palette_images(decoder, mode):
    image = Image.new("RGBA", (8, 6), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 4, 6))
    kind = "TIFF" if mode == "PA" else "PNG"
    (array,) = decoder.decode([encoded_image(image.quantize(4) if mode == "P" else image.convert(mode), kind)], ["a"])
    assert (array[:, 4:] == 255).all()
    assert np.abs(array[0, 0].astype(int) - ((29, 29, 29) if mode == "LA" else (0, 0, 255))).max() <= 1


@pytest.mark.parametrize("kind", ["pil", "dali"])
def test_without_a_background_alpha_is_dropped_as_earlier_versions_did(kind):
    decoder = open_decoder(kind, background=None)
    assert np.array_equal(decoder.decode([WITH_ALPHA["rgba png"]], ["a"])[0], CHINA)


@pytest.mark.parametrize("text", ["", "red", "#fff", "#gggggg", "255,255,255", "white\n"])
def test_backgrounds_that_are_none(text):
    with pytest.raises(ConfigError, match="#rrggbb"):
        parse_background(text)


def test_a_background_has_one_name():
    assert [background_name(parse_background(text)) for text in ("white", "#FFFFFF", "#000000", "#10FF80")] == [
        "white",
        "white",
        "black",
        "#10ff80",
    ]


def test_16_bits_are_scaled_not_clipped(decoder):
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    for kind in ("PNG", "TIFF"):
        (array,) = decoder.decode([encoded(ramp, kind)], [kind])
        assert np.abs(array[..., 1] - ramp / 257.0).max() <= 1.0


def test_the_first_frame_is_taken_and_counted():
    for kind in ("pil", "dali"):
        decoder = open_decoder(kind)
        names = ["animated webp", "png", "animated png", "two pictures in a jpeg"]
        arrays = decoder.decode([BLOBS[name] for name in names], names)
        assert np.abs(arrays[0].astype(int) - FLOWER).mean() < 5
        assert np.array_equal(arrays[2], FLOWER)
        assert decoder.animated == 2


def test_1x1_becomes_one_colour(decoder):
    batch = decoder.decode_to_batch([BLOBS["1x1"]], ["a"], 16)
    assert (batch == CHINA[0, 0]).all()


def test_formats_are_recognised_by_their_first_bytes():
    names = ["png", "jpeg", "webp", "gif", "tiff", "bmp", "avif"]
    assert [image_extension(BLOBS[name]) for name in names] == ["png", "jpg", "webp", "gif", "tif", "bmp", "avif"]
    assert [image_extension(data) for data in (b"", b"<svg></svg>", encoded(CHINA, "ICO"))] == [None] * 3
    assert {"gif", "tif", "tiff", "bmp", "avif", "jpeg"} < set(IMAGE_EXTENSIONS)


def test_checking_decodes_each_image_and_keeps_none():
    names = [*BLOBS, *BAD]
    faults = open_decoder("pil").check([{**BLOBS, **BAD}[name] for name in names], names)
    assert [names[place] for place in faults] == list(BAD)
    assert all(faults[place].startswith(f"image {names[place]} ") for place in faults)


def test_the_centre_is_cropped(decoder):
    stripes = np.zeros((20, 60, 3), np.uint8)
    stripes[:, 20:40] = 200
    batch = decoder.decode_to_batch([encoded(stripes, "PNG")] * 2, ["a", "b"], 20)
    assert batch.shape == (2, 20, 20, 3)
    assert (batch == 200).all()


BAD = {
    "garbage": b"garbage" * 100,
    "nothing": b"",
    "cut jpeg": BLOBS["jpeg"][:5000],
    "cut png": BLOBS["png"][:5000],
    "32 bit": encoded(CHINA[..., 0].astype(np.float32), "TIFF"),
    "integers beyond 16 bits": encoded(GREY_16.astype(np.int32) * 9, "TIFF"),
    "negative integers": encoded(GREY_16.astype(np.int32) - 9, "TIFF"),
    "another format": encoded(CHINA, "ICO"),
    "cut gif": BLOBS["gif"][:5000],
    "cut tiff": BLOBS["tiff"][:5000],
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_named_and_the_decoder_lives_on(decoder, kind):
    with pytest.raises(DataError, match="the bad one") as caught:
        decoder.decode_to_batch([BLOBS["jpeg"], BAD[kind], BLOBS["png"]], ["first", "the bad one", "last"], 32)
    assert "\n" not in str(caught.value)
    assert "0x" not in str(caught.value)
    assert np.array_equal(decoder.decode([BLOBS["png"]], ["good"])[0], FLOWER)


def test_the_good_are_separated_from_the_bad(decoder):
    """The good ones are the same arrays as in a batch without the bad ones."""
    blobs, keys = [*BLOBS.values(), *BAD.values()], [*BLOBS, *BAD]
    mixed = np.random.default_rng(0).permutation(len(blobs)).tolist()
    blobs, keys = [blobs[place] for place in mixed], [keys[place] for place in mixed]
    separated = decoder.separate(blobs, keys, 32)
    assert separated.good == [place for place, key in enumerate(keys) if key in BLOBS]
    assert sorted(separated.failures) == [place for place, key in enumerate(keys) if key in BAD]
    for place, text in separated.failures.items():
        assert text.startswith(f"image {keys[place]} ")
    alone = decoder.decode_to_batch([blobs[place] for place in separated.good], [keys[p] for p in separated.good], 32)
    assert np.array_equal(separated.pixels, alone)


def test_a_batch_of_bad_images_only(decoder):
    separated = decoder.separate(list(BAD.values()), list(BAD), 16)
    assert separated.pixels.shape == (0, 16, 16, 3)
    assert separated.good == []
    assert sorted(separated.failures) == list(range(len(BAD)))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA error 2: out of memory")])
def test_an_error_of_the_machine_is_not_a_bad_image(decoder, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(type(decoder), "_convert", fail)
    with pytest.raises(type(error)):
        decoder.separate([BLOBS["jpeg"]], ["good"], 32)


def center_crop_arr(pixels, size):
    """What ADM and DiT do to an image, in one pass of numpy and PIL; odd sides lose a row when they are halved."""
    while min(pixels.shape[:2]) >= 2 * size:
        half = (pixels.shape[1] // 2, pixels.shape[0] // 2)
        pixels = np.asarray(Image.fromarray(pixels).resize(half, Image.Resampling.BOX))
    scale = size / min(pixels.shape[:2])
    target = (round(pixels.shape[1] * scale), round(pixels.shape[0] * scale))
    pixels = np.asarray(Image.fromarray(pixels).resize(target, Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("size", [32, 100, 207, 256])
def test_adm_is_box_halving_then_bicubic(size):
    """207 is half of one image's shorter side: after one halving, it has the right size."""
    names = ["jpeg", "jpeg of odd sides", "twice 207"]
    batch = open_decoder("pil", resize="adm").decode_to_batch([BLOBS[name] for name in names], names, size)
    for name, found in zip(names, batch, strict=True):
        assert np.array_equal(found, center_crop_arr(open_decoder("pil").decode([BLOBS[name]], [name])[0], size))


# dB between ADM's resize and DALI's cubic with antialiasing, on the two photographs
ADM_AGAINST_CUBIC = {256: (45.37, 51.86), 128: (38.55, 41.79)}


@pytest.mark.parametrize("size", ADM_AGAINST_CUBIC)
def test_the_difference_between_the_two_resizes(size):
    blobs, keys = [BLOBS["jpeg"], BLOBS["png"]], ["china", "flower"]
    adm = open_decoder("pil", resize="adm").decode_to_batch(blobs, keys, size).astype(float)
    cubic = open_decoder("dali").decode_to_batch(blobs, keys, size)
    psnr = 10 * np.log10(255**2 / np.square(adm - cubic).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(psnr, ADM_AGAINST_CUBIC[size], atol=0.5)


def test_a_bomb_is_refused_before_it_is_decoded(decoder, monkeypatch):
    monkeypatch.setattr(images_module, "MAX_PIXELS", 427 * 640 - 1)
    monkeypatch.setattr(type(decoder), "_convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match=r"\bbig is 640 x 427\b.* 273279 "):
        decoder.decode([BLOBS["jpeg"]], ["big"])


def test_a_strip_that_resizing_would_blow_up_is_refused(decoder):
    """1 x 60000 at 256 is 256 x 15,360,000 pixels, 11 GiB."""
    strip = encoded(np.zeros((1, 60_000, 3), np.uint8), "PNG")
    separated = decoder.separate([strip, BLOBS["png"]], ["strip", "png"], 256)
    assert separated.good == [1]
    assert "60000 x 1" in separated.failures[0]


@pytest.mark.parametrize(("kind", "device"), [("cv2", "cpu"), ("dali", "cuda")])
def test_unknown_decoders(kind, device):
    with pytest.raises(ConfigError, match=rf"'{kind}'.*'{device}'"):
        open_decoder(kind, device)


@pytest.mark.parametrize(("kind", "resize"), [("dali", "adm"), ("pil", "lanczos")])
def test_resizes_that_a_decoder_does_not_have(kind, resize):
    with pytest.raises(ConfigError, match=rf"'{resize}'.* {kind}\b"):
        open_decoder(kind, resize=resize)
