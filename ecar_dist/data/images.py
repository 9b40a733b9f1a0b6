"""Encoded images -> RGB arrays, by DALI or by PIL, behind one contract.

Both decode to the same bytes on the CPU; their resizing differs slightly, so a manifest records which one was used.
EXIF orientation is applied, grey becomes three equal channels, alpha is dropped.
"""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError

from ecar_dist.data.dali import import_dali
from ecar_dist.errors import ConfigError, DataError

MAX_PIXELS = 64 << 20  # a decompression bomb is refused before it is decoded
RESIZES = {
    "cubic": "shorter side to the target, cubic, antialiased",
    "adm": "halved by box means while the shorter side is twice the target or more, then bicubic, as ADM and DiT do",
}
_DEEP_MODES = ("I", "F")  # PIL would clip these to 8 bits


@dataclass(frozen=True)
class Separated:
    """The good and the bad of a batch of encoded images."""

    pixels: np.ndarray  # uint8 [G, S, S, 3], of the good ones
    good: list[int]  # their places in the batch, rising
    failures: dict[int, str]  # by the places of the bad ones: a sentence that names the image


class ImageDecoder(ABC):
    """A bad image never spoils another one, and leaves the decoder usable."""

    name: str  # what a manifest calls it
    resize: str  # of RESIZES
    library: str  # name and version of the code that decides on the pixels

    def decode(self, blobs: Sequence[bytes], keys: Sequence[str]) -> list[np.ndarray]:
        """One uint8 [H, W, 3] for each blob. Raises DataError naming the first bad image by its key."""
        arrays, failures = self._try_all(blobs, keys, None)
        _raise_first(failures)
        return list(arrays.values())

    def decode_to_batch(self, blobs: Sequence[bytes], keys: Sequence[str], image_size: int) -> np.ndarray:
        """uint8 [B, S, S, 3]: the shorter side resized to S, then the centre cropped. Raises as `decode` does."""
        separated = self.separate(blobs, keys, image_size)
        _raise_first(separated.failures)
        return separated.pixels

    def separate(self, blobs: Sequence[bytes], keys: Sequence[str], image_size: int) -> Separated:
        """As `decode_to_batch`, but of the good images only, and with a sentence on each bad one."""
        arrays, failures = self._try_all(blobs, keys, image_size)
        pixels = np.stack(list(arrays.values())) if arrays else np.empty((0, image_size, image_size, 3), np.uint8)
        return Separated(pixels, list(arrays), failures)

    def _try_all(
        self, blobs: Sequence[bytes], keys: Sequence[str], image_size: int | None
    ) -> tuple[dict[int, np.ndarray], dict[int, str]]:
        """Arrays and failures by place. All at once where that works; else one by one, to learn which are bad."""
        faults = [_header_fault(blob, key) for blob, key in zip(blobs, keys, strict=True)]
        failures = {place: fault for place, fault in enumerate(faults) if fault is not None}
        places = [place for place in range(len(blobs)) if place not in failures]
        if not places:
            return {}, failures
        try:
            converted = self._convert([blobs[place] for place in places], image_size)
            return dict(zip(places, converted, strict=True)), failures
        except Exception as error:
            _raise_if_device_fault(error)
        arrays = {}
        for place in places:
            try:
                (arrays[place],) = self._convert([blobs[place]], image_size)
            except Exception as error:
                _raise_if_device_fault(error)
                failures[place] = _unreadable(keys[place], error)
        return arrays, failures

    @abstractmethod
    def _convert(self, blobs: Sequence[bytes], image_size: int | None) -> list[np.ndarray]:
        """Decode, and unless image_size is None resize and crop. Any exception means that some blob is bad."""


class PilDecoder(ImageDecoder):
    """The reference, everywhere: an image a thread, as PIL lets go of the interpreter's lock."""

    name = "pil"
    library = f"pillow {PIL.__version__}"

    def __init__(self, resize: str = "cubic") -> None:
        self.resize = resize

    def _convert(self, blobs: Sequence[bytes], image_size: int | None) -> list[np.ndarray]:
        convert_one = partial(self._convert_one, image_size=image_size)
        return list((self._threads.map if len(blobs) > 1 else map)(convert_one, blobs))

    def _convert_one(self, blob: bytes, image_size: int | None) -> np.ndarray:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(blob))).convert("RGB")
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

    `device="cpu"` needs neither GPU nor driver; `"mixed"` decodes and resizes on the GPU.
    """

    resize = "cubic"

    def __init__(self, device: str) -> None:
        dali = import_dali()
        self.name, self.library = f"dali-{device}", f"dali {dali.version}"
        self._device = "gpu" if device == "mixed" else "cpu"
        self._dynamic, self._types = dali.dynamic, dali.types

    def _convert(self, blobs: Sequence[bytes], image_size: int | None) -> list[np.ndarray]:
        dynamic, types = self._dynamic, self._types
        encoded = dynamic.Batch([np.frombuffer(blob, dtype=np.uint8) for blob in blobs])
        images = dynamic.decoders.image(encoded, device=self._device, output_type=types.RGB)
        if image_size is not None:
            size, cubic = [image_size, image_size], types.INTERP_CUBIC
            images = dynamic.resize(images, size=size, mode="not_smaller", interp_type=cubic, antialias=True)
            images = dynamic.crop(images, crop=size, crop_pos_x=0.5, crop_pos_y=0.5, rounding="truncate")
        return [np.array(image) for image in images.cpu().tensors]


def open_decoder(kind: str, device: str = "cpu", resize: str = "cubic") -> ImageDecoder:
    """`kind` is "dali" or "pil"; `device` ("cpu" or "mixed") is DALI's; `resize` is one of RESIZES.

    Raises ConfigError for another name, and for "adm", whose two filters only PIL has, on DALI.
    """
    if kind not in ("dali", "pil") or device not in ("cpu", "mixed"):
        raise ConfigError(f"decoder {kind!r} on {device!r}: use dali or pil, on cpu or (dali only) mixed")
    if resize not in RESIZES or (kind == "dali" and resize != "cubic"):
        raise ConfigError(f"resize {resize!r} with decoder {kind}: use cubic, or adm with decoder pil")
    return PilDecoder(resize) if kind == "pil" else DaliDecoder(device)


def _halve(image: Image.Image, image_size: int) -> Image.Image:
    """The first half of `center_crop_arr` (openai/guided-diffusion, guided_diffusion/image_datasets.py)."""
    while min(image.size) >= 2 * image_size:
        width, height = image.size
        image = image.resize((width // 2, height // 2), Image.Resampling.BOX)
    return image


def _header_fault(blob: bytes, key: str) -> str | None:
    """What the header alone tells against an image."""
    try:
        with Image.open(io.BytesIO(blob)) as image:
            (width, height), mode = image.size, image.mode
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return _unreadable(key, error)
    if width * height > MAX_PIXELS:
        return f"image {key} is {width} x {height}, the limit is {MAX_PIXELS} pixels; shrink it or leave it out"
    if mode.startswith(_DEEP_MODES):
        return f"image {key} has mode {mode}, more than 8 bits a channel; convert it to 8 bits"
    return None


def _unreadable(key: str, error: Exception) -> str:
    known = not isinstance(error, UnidentifiedImageError)  # its own text holds a memory address
    reason = (
        (str(error).strip().split("\n")[0].rstrip(" :") or type(error).__name__) if known else "no known image format"
    )
    return f"image {key} cannot be decoded ({reason}); repair it or leave it out"


def _raise_first(failures: dict[int, str]) -> None:
    if failures:
        raise DataError(failures[min(failures)])


def _raise_if_device_fault(error: Exception) -> None:
    """A machine at its limits says nothing about an image."""
    if isinstance(error, MemoryError) or any(word in str(error).lower() for word in ("cuda", "out of memory")):
        raise error
