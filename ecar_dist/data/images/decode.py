"""Decode encoded images to RGB arrays, with DALI or with PIL.

Both decode to the same bytes on the CPU. Their resizing differs slightly, so a manifest records which one was used.
EXIF orientation is applied, grey becomes three equal channels, 16-bit channels keep their upper 8 bits, transparency is
composited on a background, and only the first frame of an animation is used.
"""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError

from ecar_dist.data.images.dali import import_dali
from ecar_dist.data.images.formats import IMAGE_EXTENSIONS, PIL_NAMES
from ecar_dist.errors import ConfigError, DataError

MAX_PIXELS = 64 << 20  # larger images (decompression bombs) are rejected before they are decoded
RESIZES = {
    "cubic": "shorter side to the target, cubic, antialiased",
    "adm": "halved by box means while the shorter side is twice the target or more, then bicubic, as ADM and DiT do",
}
WHITE = (255, 255, 255)
_PNG_DEPTH = 24  # offset of the byte of a PNG with the number of bits per channel
_DALI_FORMATS = ("JPEG", "MPO", "PNG", "WEBP")  # MPO: a JPEG followed by more pictures

Background = tuple[int, int, int] | None  # red, green, blue; None: transparency is dropped


@dataclass(frozen=True)
class Separated:
    """A batch of encoded images, separated into good and bad ones. Indices are relative to the batch."""

    pixels: np.ndarray  # uint8 [G, S, S, 3], of the good images
    good: list[int]  # indices of the good images, ascending
    failures: dict[int, str]  # for the index of each bad image, a message that names it


@dataclass(frozen=True)
class _Encoded:
    """An encoded image with an acceptable header."""

    data: bytes
    plain: bool  # one opaque frame of 8-bit grey or RGB, which DALI and PIL decode to the same bytes


class ImageDecoder(ABC):
    """Base class of the decoders. A bad image does not affect other images or later calls.

    `str(key)` names an image in messages.
    """

    name: str  # in manifests
    resize: str  # a key of RESIZES
    library: str  # name and version of the library that computes the pixels

    def __init__(self) -> None:
        self.animated = 0  # number of animated images so far

    def decode(self, blobs: Sequence[bytes], keys: Sequence[object]) -> list[np.ndarray]:
        """One uint8 [H, W, 3] for each blob. Raises DataError that names the first bad image."""
        arrays, failures = self._try_all(blobs, keys, None)
        _raise_first(failures)
        return list(arrays.values())

    def decode_to_batch(self, blobs: Sequence[bytes], keys: Sequence[object], image_size: int) -> np.ndarray:
        """uint8 [B, S, S, 3]: the shorter side resized to S, then a centre crop. Raises as `decode` does."""
        separated = self.separate(blobs, keys, image_size)
        _raise_first(separated.failures)
        return separated.pixels

    def separate(self, blobs: Sequence[bytes], keys: Sequence[object], image_size: int) -> Separated:
        """Like `decode_to_batch` for the good images, with a message for each bad one."""
        arrays, failures = self._try_all(blobs, keys, image_size)
        pixels = np.stack(list(arrays.values())) if arrays else np.empty((0, image_size, image_size, 3), np.uint8)
        return Separated(pixels, list(arrays), failures)

    def _try_all(
        self, blobs: Sequence[bytes], keys: Sequence[object], image_size: int | None
    ) -> tuple[dict[int, np.ndarray], dict[int, str]]:
        """Arrays of the good images and messages for the bad ones, by index."""
        # Some images are rejected by their header alone.
        failures: dict[int, str] = {}
        images: dict[int, _Encoded] = {}
        for index, (blob, key) in enumerate(zip(blobs, keys, strict=True)):
            try:
                images[index] = self._check_header(blob, key, image_size)
            except DataError as error:
                failures[index] = str(error)
        if not images:
            return {}, failures

        # Usually all others are good, and one call decodes them.
        try:
            converted = self._convert(list(images.values()), image_size)
            return dict(zip(images, converted, strict=True)), failures
        except Exception as error:
            _raise_if_device_fault(error)

        # Otherwise decode them one by one to find the bad ones.
        arrays = {}
        for index, image in images.items():
            try:
                (arrays[index],) = self._convert([image], image_size)
            except Exception as error:
                _raise_if_device_fault(error)
                failures[index] = self._reason(image, keys[index], error)
        return arrays, failures

    def _reason(self, image: _Encoded, key: object, error: Exception) -> str:
        """The message for an image that `_convert` failed on."""
        return _unreadable(key, error)

    def _check_header(self, blob: bytes, key: object, image_size: int | None) -> _Encoded:
        """Check an image by its header, without decoding it. Raises DataError that names it if it is rejected."""
        try:
            with _open(blob) as image:
                animated = getattr(image, "is_animated", False) and image.format != "MPO"
                plain = not animated and _is_plain(image, blob)
                width, height = image.size
                mode = image.mode
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            raise DataError(_unreadable(key, error)) from None

        # A long, narrow image may be small now and huge after its shorter side is enlarged.
        if width * height > MAX_PIXELS:
            raise DataError(
                f"image {key} is {width} x {height}, the limit is {MAX_PIXELS} pixels; shrink it or remove it"
            )
        if image_size is not None and max(width, height) * image_size**2 > MAX_PIXELS * min(width, height):
            raise DataError(
                f"image {key} is {width} x {height}; with its shorter side resized to {image_size} it would have more "
                f"than {MAX_PIXELS} pixels; crop it or remove it"
            )

        if mode == "F":
            raise DataError(f"image {key} has mode F, floats with an unknown range; convert it to 8 or 16 bits")
        self.animated += animated
        return _Encoded(blob, plain)

    @abstractmethod
    def _convert(self, images: Sequence[_Encoded], image_size: int | None) -> list[np.ndarray]:
        """Decode all images, then resize and crop them unless `image_size` is None.

        Any exception means that one of the images is bad.
        """


class PilDecoder(ImageDecoder):
    """The reference decoder, available on every machine. Decodes one image per thread: PIL releases the GIL."""

    name = "pil"
    library = f"pillow {PIL.__version__}"

    def __init__(self, resize: str = "cubic", background: Background = WHITE) -> None:
        super().__init__()
        self.resize = resize
        self._background = background

    def check(self, blobs: Sequence[bytes], keys: Sequence[object]) -> dict[int, str]:
        """Decode each image and discard it. Returns a message for each bad one, by index."""
        faults = self._threads.map(self._fault, blobs, keys)
        return {index: fault for index, fault in enumerate(faults) if fault is not None}

    def _fault(self, blob: bytes, key: object) -> str | None:
        try:
            self._decode_one(self._check_header(blob, key, None).data)
        except DataError as error:
            return str(error)
        except Exception as error:
            _raise_if_device_fault(error)
            return _unreadable(key, error)
        return None

    def _convert(self, images: Sequence[_Encoded], image_size: int | None) -> list[np.ndarray]:
        convert_one = partial(self._convert_one, image_size=image_size)
        blobs = [image.data for image in images]
        return list(self._threads.map(convert_one, blobs) if len(blobs) > 1 else map(convert_one, blobs))

    def _decode_one(self, blob: bytes) -> Image.Image:
        return _to_rgb(ImageOps.exif_transpose(_open(blob)), self._background)

    def _convert_one(self, blob: bytes, image_size: int | None) -> np.ndarray:
        image = self._decode_one(blob)
        if image_size is None:
            return np.asarray(image)

        # The shorter side to image_size.
        if self.resize == "adm":
            image = _halve(image, image_size)
        scale = image_size / min(image.size)
        width, height = (max(image_size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)

        # The centre of the longer side.
        left = (width - image_size) // 2
        top = (height - image_size) // 2
        return np.asarray(image.crop((left, top, left + image_size, top + image_size)))

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="pil-decoder")


class DaliDecoder(ImageDecoder):
    """NVIDIA DALI in its dynamic mode, in which a bad image fails only its own call: there is no pipeline to rebuild.

    `device="cpu"` needs no GPU and no driver; `"mixed"` decodes and resizes on the GPU. DALI drops transparency and
    cannot read all formats, so PIL decodes the images that are not plain. DALI resizes all of them.
    """

    resize = "cubic"

    def __init__(self, device: str, background: Background = WHITE) -> None:
        super().__init__()
        dali = import_dali()
        self._pil = PilDecoder(background=background)
        self.name = f"dali-{device}"
        self.library = f"dali {dali.version}"
        self._device = "gpu" if device == "mixed" else "cpu"
        self._dynamic = dali.dynamic
        self._types = dali.types

    def _convert(self, images: Sequence[_Encoded], image_size: int | None) -> list[np.ndarray]:
        # Plain and other images are decoded by different libraries, then put back in their order.
        arrays: dict[int, np.ndarray] = {}
        for plain in (True, False):
            indices = [index for index, image in enumerate(images) if image.plain == plain]
            if indices:
                batch = self._batch([images[index] for index in indices], plain)
                arrays.update(zip(indices, self._resized(batch, image_size), strict=True))
        return [arrays[index] for index in range(len(images))]

    def _batch(self, images: Sequence[_Encoded], plain: bool) -> Any:
        """The decoded images as a DALI batch, uint8 [H, W, 3] each."""
        if not plain:
            batch = self._dynamic.Batch(self._pil._convert(images, None), layout="HWC")
            return batch.gpu() if self._device == "gpu" else batch
        encoded = self._dynamic.Batch([np.frombuffer(image.data, dtype=np.uint8) for image in images])
        return self._dynamic.decoders.image(encoded, device=self._device, output_type=self._types.RGB)

    def _reason(self, image: _Encoded, key: object, error: Exception) -> str:
        """PIL's message if PIL fails too: DALI's messages are error numbers."""
        return self._pil.check([image.data], [key]).get(0) or _unreadable(key, error)

    def _resized(self, images: Any, image_size: int | None) -> list[np.ndarray]:
        """The arrays of a DALI batch, resized and cropped unless `image_size` is None."""
        if image_size is not None:
            size = [image_size, image_size]
            cubic = self._types.INTERP_CUBIC
            images = self._dynamic.resize(images, size=size, mode="not_smaller", interp_type=cubic, antialias=True)
            images = self._dynamic.crop(images, crop=size, crop_pos_x=0.5, crop_pos_y=0.5, rounding="truncate")
        return [np.array(image) for image in images.cpu().tensors]


def open_decoder(kind: str, device: str = "cpu", resize: str = "cubic", background: Background = WHITE) -> ImageDecoder:
    """A decoder: `kind` is "dali" or "pil", `device` is "cpu" or (DALI only) "mixed", `resize` is a key of RESIZES.

    Transparency is composited on `background`. None drops it and keeps the colours behind it, as earlier versions did.
    Raises ConfigError for other names, and for resize "adm" with DALI, because only PIL has the two filters it needs.
    """
    if kind not in ("dali", "pil") or device not in ("cpu", "mixed"):
        raise ConfigError(f"decoder {kind!r} on {device!r}: use dali or pil, on cpu or (dali only) mixed")
    if resize not in RESIZES or (kind == "dali" and resize != "cubic"):
        raise ConfigError(f"resize {resize!r} with decoder {kind}: use cubic, or adm with decoder pil")
    return PilDecoder(resize, background) if kind == "pil" else DaliDecoder(device, background)


def image_sides(blob: bytes) -> tuple[int, int] | None:
    """Width and height from the header; None if it cannot be read."""
    try:
        with _open(blob) as image:
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _open(blob: bytes) -> Image.Image:
    return Image.open(io.BytesIO(blob), formats=PIL_NAMES)


def _is_plain(image: Image.Image, blob: bytes) -> bool:
    """Whether DALI and PIL decode to the same bytes. DALI drops transparency, and orientation except in JPEGs."""
    if image.format not in _DALI_FORMATS or image.mode not in ("L", "RGB") or image.has_transparency_data:
        return False
    if image.format == "PNG":
        return blob[_PNG_DEPTH] == 8 and not _png_may_have_orientation(blob)
    return image.format != "WEBP" or b"EXIF" not in blob


def _png_may_have_orientation(blob: bytes) -> bool:
    """Whether a chunk may contain an orientation. It may follow the pixels, where PIL does not read it on opening."""
    # After the signature of 8 bytes come chunks: 4 bytes length, 4 bytes kind, payload, 4 bytes CRC.
    at = 8
    while at + 8 <= len(blob):
        kind = blob[at + 4 : at + 8]
        payload = blob[at + 8 : at + 28]
        if kind == b"eXIf" or payload.startswith((b"Raw profile type", b"XML:com.adobe.xmp")):
            return True
        at += 12 + int.from_bytes(blob[at : at + 4], "big")
    return False


def _to_rgb(image: Image.Image, background: Background) -> Image.Image:
    # PIL keeps the upper 8 bits of 16-bit colour, but clips 16-bit grey. Treat both the same.
    # 16-bit grey may also come as 32-bit integers.
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError(f"its values range from {values.min()} to {values.max()}, outside 0 to 65535 (16 bits)")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if background is None or not image.has_transparency_data:
        return image.convert("RGB")

    canvas = Image.new("RGBA", image.size, background)
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas.convert("RGB")


def _halve(image: Image.Image, image_size: int) -> Image.Image:
    """The first half of `center_crop_arr` (openai/guided-diffusion, guided_diffusion/image_datasets.py)."""
    while min(image.size) >= 2 * image_size:
        width, height = image.size
        image = image.resize((width // 2, height // 2), Image.Resampling.BOX)
    return image


def _unreadable(key: object, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its text contains a memory address
        reason = f"not one of the formats {', '.join(IMAGE_EXTENSIONS)}"
    else:
        reason = str(error).strip().split("\n")[0].rstrip(" :") or type(error).__name__
    return f"image {key} cannot be decoded ({reason}); repair it or remove it"


def _raise_first(failures: dict[int, str]) -> None:
    if failures:
        raise DataError(failures[min(failures)])


def _raise_if_device_fault(error: Exception) -> None:
    """Raise errors of the machine, such as running out of memory. They do not mean that an image is bad."""
    if isinstance(error, MemoryError) or any(word in str(error).lower() for word in ("cuda", "out of memory")):
        raise error
