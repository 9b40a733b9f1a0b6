"""Tensors to PNG: labelled grids and stage strips."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from ecar_dist.storage.atomic import naming
from ecar_dist.vae.codec import LatentCodec
from ecar_dist.vae.pixels import to_pixels

MARGIN, LABEL_HEIGHT = 2, 14
GRID_ROWS, GRID_COLUMNS = 8, 16  # at most, so that the grid stays readable


def decode_stages(codec: LatentCodec, stages: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """X^e_k of every stage as full-size images, K of uint8 [B, H, W, 3]; coarse states are upsampled, then decoded."""
    size = stages[-1].shape[-2:]
    return [to_pixels(codec.decode(F.interpolate(state, size=size, mode="nearest"))) for state in stages]


def tile(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Images uint8 [H, W, 3], row by row, on one white sheet."""
    # The sheet, with a margin around every image.
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    sheet_size = (MARGIN + len(rows) * (height + MARGIN), MARGIN + columns * (width + MARGIN), 3)
    sheet = np.full(sheet_size, 255, np.uint8)

    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top, left = MARGIN + i * (height + MARGIN), MARGIN + j * (width + MARGIN)
            sheet[top : top + height, left : left + width] = picture
    return sheet


def labelled_grid(
    rows: Sequence[Sequence[np.ndarray]], names: Sequence[str], row_names: Sequence[str] = (), *, scale: int = 1
) -> np.ndarray:
    """One column for each of `names`, under its name; images enlarged `scale` times.

    row_names: shown to the left of the rows; none by default.
    """
    # The images, with a strip above for the names and one on the left for the row names.
    sheet = tile([[enlarge(picture, scale) for picture in row] for row in rows])
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = max((math.ceil(_width(measure, name)) + 2 * MARGIN for name in row_names), default=0)
    page = Image.new("RGB", (left + sheet.shape[1], sheet.shape[0] + LABEL_HEIGHT), "white")
    page.paste(Image.fromarray(sheet), (left, LABEL_HEIGHT))

    # Each name is centred above its column, or next to its row.
    pen = ImageDraw.Draw(page)
    height, width = (side * scale + MARGIN for side in rows[0][0].shape[:2])
    for j, name in enumerate(names):
        where = (left + MARGIN + j * width + (width - MARGIN) // 2, LABEL_HEIGHT // 2)
        pen.text(where, _fitted(pen, name, width - MARGIN), fill="black", anchor="mm")
    for i, name in enumerate(row_names):
        pen.text((MARGIN, LABEL_HEIGHT + i * height + height // 2), _drawable(name), fill="black", anchor="lm")
    return np.asarray(page)


def _fitted(pen: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """The beginning of the text that fits into a width in pixels."""
    while len(text) > 1 and _width(pen, text) > width:
        text = f"{text[:-2].rstrip('.')}."
    return _drawable(text)


def _width(pen: ImageDraw.ImageDraw, text: str) -> float:
    return pen.textlength(_drawable(text))


def _drawable(text: str) -> str:
    """The text in ASCII, all that Pillow's built-in font supports: no accents, "?" for other letters."""
    letters = (letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    return "".join(letters).encode("ascii", "replace").decode()


def save_picture(path: Path, picture: np.ndarray) -> None:
    """Write uint8 [H, W, 3] as a PNG file. Raises an OSError that names the file."""
    with naming(path):
        Image.fromarray(picture).save(path)


def enlarge(picture: np.ndarray, scale: int) -> np.ndarray:
    return picture.repeat(scale, axis=0).repeat(scale, axis=1)
