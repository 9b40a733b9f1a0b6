"""Encoded images -> RGB arrays, by DALI or by PIL, behind one contract.

Both decode to the same bytes on the CPU; their resizing differs slightly, so a manifest records which one was used.
EXIF orientation is applied, grey becomes three equal channels, 16 bits a channel become the upper 8, transparency is
composited on a background, and of an animation the first frame is taken.
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

MAX_PIXELS = 64 << 20  # a decompression bomb is refused before it is decoded
RESIZES = {
    "cubic": "shorter side to the target, cubic, antialiased",
    "adm": "halved by box means while the shorter side is twice the target or more, then bicubic, as ADM and DiT do",
}
WHITE = (255, 255, 255)
_PNG_DEPTH = 24  # the byte of a PNG that says how many bits a channel has
_DALI_FORMATS = ("JPEG", "MPO", "PNG", "WEBP")  # MPO: a JPEG with further pictures behind it


Background = tuple[int, int, int] | None  # red, green, blue; None: transparency is dropped


@dataclass(frozen=True)
class Separated:
    """The good and the bad of a batch of encoded images."""

    pixels: np.ndarray  # uint8 [G, S, S, 3], of the good ones
    good: list[int]  # their places in the batch, rising
    failures: dict[int, str]  # by the places of the bad ones: a sentence that names the image


@dataclass(frozen=True)
class _Encoded:
    """An encoded image whose header raises no objection."""

    data: bytes
    plain: bool  # 8-bit grey or RGB, one opaque frame: what DALI decodes to the same bytes as PIL


class ImageDecoder(ABC):
    """A bad image never affects another one, and leaves the decoder usable.

    `keys` name the images in messages, by their `str`.
    """

    name: str  # what a manifest calls it
    resize: str  # of RESIZES
    library: str  # name and version of the code that decides on the pixels

    def __init__(self) -> None:
        self.animated = 0  # images so far of which only the first frame is used

    def decode(self, blobs: Sequence[bytes], keys: Sequence[object]) -> list[np.ndarray]:
        """One uint8 [H, W, 3] for each blob. Raises DataError naming the first bad image by its key."""
        arrays, failures = self._try_all(blobs, keys, None)
        _raise_first(failures)
        return list(arrays.values())

    def decode_to_batch(self, blobs: Sequence[bytes], keys: Sequence[object], image_size: int) -> np.ndarray:
        """uint8 [B, S, S, 3]: the shorter side resized to S, then the centre cropped. Raises as `decode` does."""
        separated = self.separate(blobs, keys, image_size)
        _raise_first(separated.failures)
        return separated.pixels

    def separate(self, blobs: Sequence[bytes], keys: Sequence[object], image_size: int) -> Separated:
        """As `decode_to_batch`, but of the good images only, and with a sentence on each bad one."""
        arrays, failures = self._try_all(blobs, keys, image_size)
        pixels = np.stack(list(arrays.values())) if arrays else np.empty((0, image_size, image_size, 3), np.uint8)
        return Separated(pixels, list(arrays), failures)

    def _try_all(
        self, blobs: Sequence[bytes], keys: Sequence[object], image_size: int | None
    ) -> tuple[dict[int, np.ndarray], dict[int, str]]:
        """Arrays and failures by place. All at once where that works; else one by one, to learn which are bad."""
        failures: dict[int, str] = {}
        images: dict[int, _Encoded] = {}
        for place, (blob, key) in enumerate(zip(blobs, keys, strict=True)):
            try:
                images[place] = self._look_at(blob, key, image_size)
            except DataError as error:
                failures[place] = str(error)
        if not images:
            return {}, failures
        try:
            converted = self._convert(list(images.values()), image_size)
            return dict(zip(images, converted, strict=True)), failures
        except Exception as error:
            _raise_if_device_fault(error)
        arrays = {}
        for place, image in images.items():
            try:
                (arrays[place],) = self._convert([image], image_size)
            except Exception as error:
                _raise_if_device_fault(error)
                failures[place] = self._reason(image, keys[place], error)
        return arrays, failures

    def _reason(self, image: _Encoded, key: object, error: Exception) -> str:
        return _unreadable(key, error)

    def _look_at(self, blob: bytes, key: object, image_size: int | None) -> _Encoded:
        """Judge an image by its header alone. Raises DataError naming it where that is enough to refuse it."""
        try:
            with _open(blob) as image:
                animated = getattr(image, "is_animated", False) and image.format != "MPO"
                plain = not animated and _is_plain(image, blob)
                (width, height), mode = image.size, image.mode
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            raise DataError(_unreadable(key, error)) from None
        if width * height > MAX_PIXELS:
            raise DataError(
                f"image {key} is {width} x {height}, the limit is {MAX_PIXELS} pixels; shrink it or leave it out"
            )
        if image_size is not None and max(width, height) * image_size**2 > MAX_PIXELS * min(width, height):
            raise DataError(
                f"image {key} is {width} x {height}; with its shorter side resized to {image_size} it would have more "
                f"than {MAX_PIXELS} pixels; crop it or leave it out"
            )
        if mode in ("I", "F"):
            raise DataError(
                f"image {key} has mode {mode}, 32 bits a channel without a known range; convert it to 8 or 16 bits"
            )
        self.animated += animated
        return _Encoded(blob, plain)

    @abstractmethod
    def _convert(self, images: Sequence[_Encoded], image_size: int | None) -> list[np.ndarray]:
        """Decode, and unless image_size is None resize and crop. Any exception means that some image is bad."""


class PilDecoder(ImageDecoder):
    """The reference, everywhere: an image a thread, as PIL lets go of the interpreter's lock."""

    name = "pil"
    library = f"pillow {PIL.__version__}"

    def __init__(self, resize: str = "cubic", background: Background = WHITE) -> None:
        super().__init__()
        self.resize = resize
        self._background = background

    def check(self, blobs: Sequence[bytes], keys: Sequence[object]) -> dict[int, str]:
        """Decode each image and keep none: by the place of each bad one, a sentence that names it."""
        faults = self._threads.map(self._fault, blobs, keys)
        return {place: fault for place, fault in enumerate(faults) if fault is not None}

    def _fault(self, blob: bytes, key: object) -> str | None:
        try:
            self._decode_one(self._look_at(blob, key, None).data)
        except DataError as error:
            return str(error)
        except Exception as error:
            _raise_if_device_fault(error)
            return _unreadable(key, error)
        return None

    def _convert(self, images: Sequence[_Encoded], image_size: int | None) -> list[np.ndarray]:
        convert_one = partial(self._convert_one, image_size=image_size)
        return list((self._threads.map if len(images) > 1 else map)(convert_one, [image.data for image in images]))

    def _decode_one(self, blob: bytes) -> Image.Image:
        return _to_rgb(ImageOps.exif_transpose(_open(blob)), self._background)

    def _convert_one(self, blob: bytes, image_size: int | None) -> np.ndarray:
        image = self._decode_one(blob)
        if image_size is None:
            return np.asarray(image)
        if self.resize == "adm":
            image = _halve(image, image_size)
        scale = image_size / min(image.size)
        width, height = (max(image_size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - image_size) // 2, (height - image_size) // 2
        return np.asarray(image.crop((left, top, left + image_size, top + image_size)))

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="pil-decoder")


class DaliDecoder(ImageDecoder):
    """NVIDIA DALI's dynamic mode: a bad image raises on its own batch and leaves nothing to rebuild.

    `device="cpu"` needs neither GPU nor driver; `"mixed"` decodes and resizes on the GPU. DALI drops transparency and
    does not read all formats: PIL decodes what is not plain, and DALI resizes it like the others.
    """

    resize = "cubic"

    def __init__(self, device: str, background: Background = WHITE) -> None:
        super().__init__()
        dali = import_dali()
        self._pil = PilDecoder(background=background)
        self.name, self.library = f"dali-{device}", f"dali {dali.version}"
        self._device = "gpu" if device == "mixed" else "cpu"
        self._dynamic, self._types = dali.dynamic, dali.types

    def _convert(self, images: Sequence[_Encoded], image_size: int | None) -> list[np.ndarray]:
        arrays: list[np.ndarray | None] = [None] * len(images)
        for plain in (True, False):
            places = [place for place, image in enumerate(images) if image.plain == plain]
            if places:
                batch = self._batch([images[place] for place in places], plain)
                for place, array in zip(places, self._finished(batch, image_size), strict=True):
                    arrays[place] = array
        return [array for array in arrays if array is not None]

    def _batch(self, images: Sequence[_Encoded], plain: bool) -> Any:
        """A batch of DALI's, uint8 [H, W, 3] each."""
        if not plain:
            batch = self._dynamic.Batch(self._pil._convert(images, None), layout="HWC")
            return batch.gpu() if self._device == "gpu" else batch
        encoded = self._dynamic.Batch([np.frombuffer(image.data, dtype=np.uint8) for image in images])
        return self._dynamic.decoders.image(encoded, device=self._device, output_type=self._types.RGB)

    def _reason(self, image: _Encoded, key: object, error: Exception) -> str:
        """In PIL's words where it fails too: DALI's are numbers."""
        return self._pil.check([image.data], [key]).get(0) or _unreadable(key, error)

    def _finished(self, images: Any, image_size: int | None) -> list[np.ndarray]:
        if image_size is not None:
            size, cubic = [image_size, image_size], self._types.INTERP_CUBIC
            images = self._dynamic.resize(images, size=size, mode="not_smaller", interp_type=cubic, antialias=True)
            images = self._dynamic.crop(images, crop=size, crop_pos_x=0.5, crop_pos_y=0.5, rounding="truncate")
        return [np.array(image) for image in images.cpu().tensors]


def open_decoder(kind: str, device: str = "cpu", resize: str = "cubic", background: Background = WHITE) -> ImageDecoder:
    """`kind` is "dali" or "pil"; `device` ("cpu" or "mixed") is DALI's; `resize` is one of RESIZES.

    Transparency is composited on `background`; None drops it and keeps the colours behind it, as versions without a
    background did. Raises ConfigError for another name, and for "adm", whose two filters only PIL has, on DALI.
    """
    if kind not in ("dali", "pil") or device not in ("cpu", "mixed"):
        raise ConfigError(f"decoder {kind!r} on {device!r}: use dali or pil, on cpu or (dali only) mixed")
    if resize not in RESIZES or (kind == "dali" and resize != "cubic"):
        raise ConfigError(f"resize {resize!r} with decoder {kind}: use cubic, or adm with decoder pil")
    return PilDecoder(resize, background) if kind == "pil" else DaliDecoder(device, background)


def image_sides(blob: bytes) -> tuple[int, int] | None:
    """Width and height, from the header; None where it cannot be read."""
    try:
        with _open(blob) as image:
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _open(blob: bytes) -> Image.Image:
    return Image.open(io.BytesIO(blob), formats=PIL_NAMES)


def _is_plain(image: Image.Image, blob: bytes) -> bool:
    """Whether DALI, which drops transparency and turns JPEGs alone, decodes to the same bytes as PIL."""
    if image.format not in _DALI_FORMATS or image.mode not in ("L", "RGB") or image.has_transparency_data:
        return False
    if image.format == "PNG":
        return blob[_PNG_DEPTH] == 8 and not _png_may_be_turned(blob)
    return image.format != "WEBP" or b"EXIF" not in blob


def _png_may_be_turned(blob: bytes) -> bool:
    """Whether a chunk may hold an orientation; it may stand behind the pixels, where opening does not see it."""
    at = 8  # behind the signature; a chunk is its length, its kind, the payload and a CRC of four bytes
    while at + 8 <= len(blob):
        kind, payload = blob[at + 4 : at + 8], blob[at + 8 : at + 28]
        if kind == b"eXIf" or payload.startswith((b"Raw profile type", b"XML:com.adobe.xmp")):
            return True
        at += 12 + int.from_bytes(blob[at : at + 4], "big")
    return False


def _to_rgb(image: Image.Image, background: Background) -> Image.Image:
    if image.mode.startswith("I;16"):  # PIL would clip to 8 bits; of 16-bit colour it takes the upper 8 too
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
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
    if isinstance(error, UnidentifiedImageError):  # its own text holds a memory address
        reason = f"not one of the formats {', '.join(IMAGE_EXTENSIONS)}"
    else:
        reason = str(error).strip().split("\n")[0].rstrip(" :") or type(error).__name__
    return f"image {key} cannot be decoded ({reason}); repair it or leave it out"


def _raise_first(failures: dict[int, str]) -> None:
    if failures:
        raise DataError(failures[min(failures)])


def _raise_if_device_fault(error: Exception) -> None:
    """A machine at its limits says nothing about an image."""
    if isinstance(error, MemoryError) or any(word in str(error).lower() for word in ("cuda", "out of memory")):
        raise error
