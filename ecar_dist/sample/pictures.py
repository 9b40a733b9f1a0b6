"""Tensors to PNG: labelled grids and stage strips."""

from __future__ import annotations

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


def labelled_grid(columns: Sequence[Sequence[np.ndarray]], names: Sequence[str], scale: int = 1) -> np.ndarray:
    """One column per class under its name; images enlarged `scale` times."""
    # The images, and above them a strip for the names.
    rows = [[enlarge(column[i], scale) for column in columns] for i in range(min(map(len, columns)))]
    sheet = tile(rows)
    page = Image.new("RGB", (sheet.shape[1], sheet.shape[0] + LABEL_HEIGHT), "white")
    page.paste(Image.fromarray(sheet), (0, LABEL_HEIGHT))

    # Each name centred above its column.
    pen = ImageDraw.Draw(page)
    step = rows[0][0].shape[1] + MARGIN
    for j, name in enumerate(names):
        pen.text((MARGIN + j * step + (step - MARGIN) // 2, LABEL_HEIGHT // 2), name, fill="black", anchor="mm")
    return np.asarray(page)


def save_picture(path: Path, picture: np.ndarray) -> None:
    """Write uint8 [H, W, 3] as a PNG file. Raises OSError that names the file."""
    with naming(path):
        Image.fromarray(picture).save(path)


def enlarge(picture: np.ndarray, scale: int) -> np.ndarray:
    return picture.repeat(scale, axis=0).repeat(scale, axis=1)
