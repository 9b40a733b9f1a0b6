"""Encoded images -> RGB arrays, by DALI or by PIL, behind one contract.

Both decode to the same bytes on the CPU; their resizing differs slightly, so a manifest records which one was used.
EXIF orientation is applied, grey becomes three equal channels, alpha is dropped.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError

from ecar_dist.errors import ConfigError, DataError

MAX_PIXELS = 64 << 20  # a decompression bomb is refused before it is decoded
_DEEP_MODES = ("I", "F")  # PIL would clip these to 8 bits


class ImageDecoder(ABC):
    """Raises DataError naming the first bad image by its key; the decoder stays usable afterwards."""

    name: str  # what a manifest calls it
    library: str  # name and version of the code that decides on the pixels

    def decode(self, blobs: Sequence[bytes], keys: Sequence[str]) -> list[np.ndarray]:
        """One uint8 [H, W, 3] for each blob."""
        self._check(blobs, keys)
        return self._run(blobs, keys, None)

    def decode_to_batch(self, blobs: Sequence[bytes], keys: Sequence[str], image_size: int) -> np.ndarray:
        """uint8 [B, S, S, 3]: the shorter side resized to S (cubic, antialiased), then the centre cropped."""
        self._check(blobs, keys)
        return np.stack(self._run(blobs, keys, image_size))

    def _check(self, blobs: Sequence[bytes], keys: Sequence[str]) -> None:
        """Read the headers only."""
        for blob, key in zip(blobs, keys, strict=True):
            try:
                with Image.open(io.BytesIO(blob)) as image:
                    (width, height), mode = image.size, image.mode
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise _unreadable(key, error) from None
            if width * height > MAX_PIXELS:
                raise DataError(
                    f"image {key} is {width} x {height}, the limit is {MAX_PIXELS} pixels; shrink or remove it"
                )
            if mode.startswith(_DEEP_MODES):
                raise DataError(f"image {key} has mode {mode}, more than 8 bits a channel; convert it to 8 bits")

    def _run(self, blobs: Sequence[bytes], keys: Sequence[str], image_size: int | None) -> list[np.ndarray]:
        """All at once where that works; otherwise one by one, to learn which image is the bad one."""
        try:
            return self._convert(blobs, image_size)
        except Exception:
            for blob, key in zip(blobs, keys, strict=True):
                try:
                    self._convert([blob], image_size)
                except Exception as error:
                    raise _unreadable(key, error) from None
            raise

    @abstractmethod
    def _convert(self, blobs: Sequence[bytes], image_size: int | None) -> list[np.ndarray]:
        """Decode, and unless image_size is None resize and crop. Any exception means that some blob is bad."""


class PilDecoder(ImageDecoder):
    """The reference: single-threaded, exact, everywhere."""

    name = "pil"
    library = f"pillow {PIL.__version__}"

    def _convert(self, blobs: Sequence[bytes], image_size: int | None) -> list[np.ndarray]:
        return [self._convert_one(blob, image_size) for blob in blobs]

    @staticmethod
    def _convert_one(blob: bytes, image_size: int | None) -> np.ndarray:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(blob))).convert("RGB")
        if image_size is not None:
            scale = image_size / min(image.size)
            width, height = (max(image_size, round(side * scale)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
            left, top = (width - image_size) // 2, (height - image_size) // 2
            image = image.crop((left, top, left + image_size, top + image_size))
        return np.asarray(image)


class DaliDecoder(ImageDecoder):
    """NVIDIA DALI's dynamic mode: a bad image raises on its own batch and leaves nothing to rebuild.

    `device="cpu"` needs neither GPU nor driver; `"mixed"` decodes and resizes on the GPU.
    """

    def __init__(self, device: str) -> None:
        try:
            import nvidia.dali
            import nvidia.dali.experimental.dynamic as dynamic
            from nvidia.dali import types
        except ImportError as error:
            raise ConfigError(
                f"DALI does not import ({error}); install nvidia-dali-cuda130 or use --decoder pil"
            ) from None
        self.name, self.library = f"dali-{device}", f"dali {nvidia.dali.__version__}"
        self._device = "gpu" if device == "mixed" else "cpu"
        self._dynamic: Any = dynamic
        self._types: Any = types

    def _convert(self, blobs: Sequence[bytes], image_size: int | None) -> list[np.ndarray]:
        dynamic, types = self._dynamic, self._types
        encoded = dynamic.Batch([np.frombuffer(blob, dtype=np.uint8) for blob in blobs])
        images = dynamic.decoders.image(encoded, device=self._device, output_type=types.RGB)
        if image_size is not None:
            size, cubic = [image_size, image_size], types.INTERP_CUBIC
            images = dynamic.resize(images, size=size, mode="not_smaller", interp_type=cubic, antialias=True)
            images = dynamic.crop(images, crop=size, crop_pos_x=0.5, crop_pos_y=0.5, rounding="truncate")
        return [np.array(image) for image in images.cpu().tensors]


def open_decoder(kind: str, device: str = "cpu") -> ImageDecoder:
    """`kind` is "dali" or "pil"; `device` ("cpu" or "mixed") is DALI's. Raises ConfigError for another name."""
    if kind not in ("dali", "pil") or device not in ("cpu", "mixed"):
        raise ConfigError(f"decoder {kind!r} on {device!r}: use dali or pil, on cpu or (dali only) mixed")
    return PilDecoder() if kind == "pil" else DaliDecoder(device)


def _unreadable(key: str, error: Exception) -> DataError:
    known = not isinstance(error, UnidentifiedImageError)  # its own text holds a memory address
    reason = (str(error).strip().split("\n")[0] or type(error).__name__) if known else "no known image format"
    return DataError(f"image {key} cannot be decoded ({reason}); repair or remove it")
