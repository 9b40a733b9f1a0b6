"""The supported image formats, with their file extensions and first bytes; and the background for transparency."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ecar_dist.errors import ConfigError


@dataclass(frozen=True)
class ImageFormat:
    pil_name: str
    extensions: tuple[str, ...]  # shards use the first one
    magic: re.Pattern[bytes]  # matches at the start of a file


_FORMATS = (
    ImageFormat("PNG", ("png",), re.compile(rb"\x89PNG\r\n\x1a\n")),
    ImageFormat("JPEG", ("jpg", "jpeg"), re.compile(rb"\xff\xd8\xff")),
    ImageFormat("WEBP", ("webp",), re.compile(rb"RIFF....WEBP", re.DOTALL)),
    ImageFormat("GIF", ("gif",), re.compile(rb"GIF8[79]a")),
    ImageFormat("TIFF", ("tif", "tiff"), re.compile(rb"II[*+]\x00|MM\x00[*+]")),
    ImageFormat("BMP", ("bmp",), re.compile(rb"BM")),
    ImageFormat("AVIF", ("avif",), re.compile(rb"....ftypavi[fs]", re.DOTALL)),
)
IMAGE_EXTENSIONS = tuple(extension for known in _FORMATS for extension in known.extensions)
PIL_NAMES = tuple(known.pil_name for known in _FORMATS)  # PIL's other plugins are never used: some run programs

_NAMED_COLOURS = {"white": (255, 255, 255), "black": (0, 0, 0)}


def image_extension(data: bytes) -> str | None:
    """The extension of the format, by the first bytes; None if unknown. Some file names are wrong, even in ImageNet."""
    return next((known.extensions[0] for known in _FORMATS if known.magic.match(data)), None)


def parse_background(text: str) -> tuple[int, int, int]:
    """(red, green, blue), 0 to 255, of `white`, `black` or `#rrggbb`. Raises ConfigError for any other text."""
    if text in _NAMED_COLOURS:
        return _NAMED_COLOURS[text]
    if not re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        raise ConfigError(f"--background {text!r} is not a colour; give white, black or #rrggbb, e.g. '#ff8000'")
    red, green, blue = bytes.fromhex(text[1:])
    return red, green, blue


def background_name(colour: tuple[int, int, int]) -> str:
    """The canonical name of a colour: `#FFFFFF` and `white` are the same background."""
    names = {value: name for name, value in _NAMED_COLOURS.items()}
    return names.get(colour, "#" + bytes(colour).hex())
