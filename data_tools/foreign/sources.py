"""The samples of a foreign set: class folders with one file per sample, or files with arrays of many samples."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.foreign.arrays import EXTENSIONS, Content, open_file, read_label_file
from ecar_dist.data.images.names import readable
from ecar_dist.errors import DataError

_IGNORED = ("latents_stats.pt",)  # LightningDiT's mean and std of its latents
_READERS = 8
_SHOWN = 10


@dataclass(frozen=True)
class ForeignSet:
    """Samples [0, count) with their labels. `read` gives latents and mirrored latents, float32 [n, C, H, W]."""

    identity: str  # sha256 of names and sizes of the files
    class_names: list[str]
    labels: np.ndarray  # int64 [count]
    shape: tuple[int, int, int]
    has_flip: bool
    left_out: Counter[str]  # files, by extension
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]

    @property
    def count(self) -> int:
        return len(self.labels)


def find_foreign(source: Path, labels: str | None, class_names: Sequence[str] | None) -> ForeignSet:
    """`labels`: a file, `none` for one class, or None for those in the files. Raises DataError for anything wrong."""
    if not source.exists():
        raise DataError(f"{source} does not exist; give a file or folder of latents ({', '.join(EXTENSIONS)})")
    files, left_out = _files(source)
    if not files:
        raise DataError(f"{source} has no latents ({', '.join(EXTENSIONS)}); check the path")
    root = source if source.is_dir() else source.parent
    nested = [path for path in files if path.parent != root]
    if nested and len(nested) < len(files):
        raise DataError(
            f"{source} has {len(files) - len(nested)} files next to {len(nested)} in folders; give either class "
            "folders with one file per sample, or files with arrays"
        )
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode("utf-8", "surrogateescape"))
    build = _class_folders if nested else _array_files
    return build(root, files, labels, class_names, digest.hexdigest(), left_out)


def _files(source: Path) -> tuple[list[Path], Counter[str]]:
    """The files of latents, sorted by path, and the number of others by extension. Hidden files are ignored."""
    if source.is_file():
        return ([source] if source.suffix in EXTENSIONS else []), Counter()
    there = sorted(path for path in source.rglob("*") if path.is_file())
    shown = [path for path in there if not any(part.startswith(".") for part in path.relative_to(source).parts)]
    taken = [path for path in shown if path.suffix in EXTENSIONS and path.name not in _IGNORED]
    return taken, Counter(path.suffix for path in set(shown) - set(taken))


def _class_folders(
    root: Path,
    files: list[Path],
    labels: str | None,
    class_names: Sequence[str] | None,
    identity: str,
    left_out: Counter[str],
) -> ForeignSet:
    """One sample per file. Only the first file is opened here; the others are checked when they are read."""
    if labels not in (None, "none"):
        raise DataError(f"{root} has class folders, which are the labels; leave out --labels, or give --labels none")
    folders = [path.relative_to(root).parts[0] for path in files]
    names = ["0"] if labels == "none" else list(class_names or sorted(set(folders)))
    if labels != "none" and (unknown := sorted(set(folders) - set(names))):
        raise DataError(f"{root}: class folder {readable(unknown[0])} is not in --classes; add it, or move it out")
    numbers = np.array([0 if labels == "none" else names.index(folder) for folder in folders], dtype=np.int64)

    first = _one_sample(root, files[0])
    shape, has_flip = _sample_shape(first), first.flipped is not None

    def read_one(index: int) -> tuple[np.ndarray, np.ndarray | None]:
        content = _one_sample(root, files[index])
        _check_like(content, shape, has_flip)
        return content.take(None)

    def read(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        with ThreadPoolExecutor(_READERS) as pool:
            return _joined(pool.map(_or_error(read_one), indices.tolist()))

    return ForeignSet(identity, list(names), numbers, shape, has_flip, left_out, read)


def _array_files(
    root: Path,
    files: list[Path],
    labels: str | None,
    class_names: Sequence[str] | None,
    identity: str,
    left_out: Counter[str],
) -> ForeignSet:
    """Many samples per file. All headers are read here."""
    # All files must contain samples like those of the first; all that do not are reported.
    contents = [open_file(path, readable(path.name)) for path in files]
    shape, has_flip = _sample_shape(contents[0]), contents[0].flipped is not None
    problems = []
    for content in contents:
        try:
            _check_like(content, shape, has_flip)
        except DataError as error:
            problems.append(str(error))
    _raise_all(problems)

    # Labels of all samples, and names for them.
    ends = np.cumsum([content.count for content in contents])
    numbers = _labels_of(root, contents, labels, int(ends[-1]))
    names = list(class_names or map(str, range(int(numbers.max()) + 1)))
    if numbers.max() >= len(names):
        raise DataError(f"{root} has label {numbers.max()}, --classes has {len(names)} names; add the missing ones")

    def read(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Read each file once, then restore the order of the samples."""
        places = np.searchsorted(ends, indices, side="right")
        order = np.argsort(places, kind="stable")

        def read_file(place: int) -> tuple[np.ndarray, np.ndarray | None]:
            rows = (indices[order][places[order] == place] - (ends[place] - contents[place].count)).tolist()
            return contents[place].take(rows if len(contents[place].shape) == 4 else None)

        straight, flipped = _joined(map(_or_error(read_file), np.unique(places).tolist()))
        back = np.argsort(order, kind="stable")
        return straight[back], None if flipped is None else flipped[back]

    return ForeignSet(identity, names, numbers, shape, has_flip, left_out, read)


def _labels_of(root: Path, contents: Sequence[Content], labels: str | None, count: int) -> np.ndarray:
    if labels == "none":
        return np.zeros(count, dtype=np.int64)
    if labels is not None:
        return read_label_file(Path(labels), count)
    without = [content.where for content in contents if content.labels is None]
    if without:
        raise DataError(
            f"{root}: {without[0]} has no labels; give --labels FILE (.npy, .pt, or text with a number per line), or "
            "--labels none to make one class"
        )
    return np.concatenate([content.labels for content in contents if content.labels is not None])


def _one_sample(root: Path, path: Path) -> Content:
    content = open_file(path, readable(str(path.relative_to(root))))
    if content.count != 1:
        raise DataError(
            f"{content.where} has {content.count} samples; in class folders each file is one sample: put files with "
            "arrays into one folder, and give --labels"
        )
    return content


def _sample_shape(content: Content) -> tuple[int, int, int]:
    channels, height, width = content.shape[-3:]
    return channels, height, width


def _check_like(content: Content, shape: tuple[int, int, int], has_flip: bool) -> None:
    """Raises DataError for a file unlike the first one."""
    if _sample_shape(content) != shape:
        raise DataError(f"{content.where} has samples of {list(_sample_shape(content))}, the first file {list(shape)}")
    if (content.flipped is not None) != has_flip:
        lacks = "lacks" if has_flip else "has"
        raise DataError(f"{content.where} {lacks} mirrored latents, unlike the first file")


Read = Callable[[int], tuple[np.ndarray, "np.ndarray | None"]]


def _or_error(read: Read) -> Callable[[int], tuple[np.ndarray, np.ndarray | None] | str]:
    """Return errors as text, so that all bad files of a shard are reported, not only the first."""

    def attempt(index: int) -> tuple[np.ndarray, np.ndarray | None] | str:
        try:
            return read(index)
        except DataError as error:
            return str(error)

    return attempt


def _joined(parts: Iterator[tuple[np.ndarray, np.ndarray | None] | str]) -> tuple[np.ndarray, np.ndarray | None]:
    found = list(parts)
    _raise_all([part for part in found if isinstance(part, str)])
    good = [part for part in found if not isinstance(part, str)]
    flipped = [part[1] for part in good if part[1] is not None]
    return np.concatenate([part[0] for part in good]), np.concatenate(flipped) if flipped else None


def _raise_all(problems: Sequence[str]) -> None:
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DataError("; ".join(problems[:_SHOWN]) + f"{more}; write these files again, or move them out")
