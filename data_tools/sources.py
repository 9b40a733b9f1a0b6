"""What an image source consists of: tars, or a directory per class, on a file system or behind a URL.

Names are sorted by code point on either, so the enumeration is the same wherever a set was copied to.
"""

from __future__ import annotations

import fnmatch
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from braceexpand import braceexpand

from ecar_dist.data.image_shards import IMAGE_EXTENSIONS
from ecar_dist.errors import DataError
from ecar_dist.storage import remote
from ecar_dist.storage.daemon_pool import DaemonPool
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.retries import Transfer

_LOOKUPS = 16  # at once
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True)
class FoundFile:
    name: str  # relative to its folder
    size: int


@dataclass(frozen=True)
class Tars:
    location: str  # absolute path or URL of the folder that holds them
    files: list[FoundFile]


@dataclass(frozen=True)
class ClassFolders:
    location: str  # absolute path or URL of the folder that holds the class directories
    classes: dict[str, list[FoundFile]]
    skipped: int  # files in them that are no images


def find_source(text: str, transfer: Transfer | None = None) -> Tars | ClassFolders:
    """A tar, a brace or glob pattern of tars, a folder of tars, or a folder with a directory per class.

    Raises DataError for a folder that is neither or both, and for images that such a reading would leave out.
    """
    transfer = transfer or Transfer()
    if names_tars(text):
        return _match_tars(text, transfer)
    _refuse_compressed([text])
    location = _absolute(text)
    top, classes = _remote_tree(location, transfer) if remote.is_remote(location) else _local_tree(Path(location), text)
    tars = [file for file in top if file.name.endswith(".tar")]
    loose = next((file.name for file in top if is_image(file.name)), None)
    if tars and any(classes.values()):
        raise DataError(f"{text} holds both {tars[0].name} and class folders; give `{text}/*.tar`, or move one of them")
    if not classes:
        _refuse_compressed([file.name for file in top])
    if tars:
        return Tars(location, tars)
    if loose and classes:
        raise DataError(f"{text} holds the image {loose} beside its class folders; move it into one of them")
    return _class_folders(location, classes, text)


def names_tars(text: str) -> bool:
    """Whether the text is a tar, or a pattern of them, rather than a folder."""
    return text.endswith(".tar") or any(mark in text for mark in "{*?")


def _refuse_compressed(names: Sequence[str]) -> None:
    name = next((name for name in names if name.endswith(_COMPRESSED)), None)
    if name is not None:
        unpack = "gunzip" if name.endswith("gz") else "unpack"
        raise DataError(f"{redact(name)} is compressed, its images have no places of their own; {unpack} it to a .tar")


def is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _class_folders(location: str, found: dict[str, list[FoundFile]], text: str) -> ClassFolders:
    if not found:
        raise DataError(f"{text} has no class folders and no tars; put the images of each class into its own directory")
    classes = {name: [file for file in found[name] if is_image(file.name)] for name in sorted(found)}
    for name, files in classes.items():
        if not files:
            listed = ", ".join(IMAGE_EXTENSIONS)
            raise DataError(f"class folder {text}/{name} has no image ({listed}); fill or remove it")
    return ClassFolders(location, classes, sum(map(len, found.values())) - sum(map(len, classes.values())))


def _local_tree(root: Path, text: str) -> tuple[list[FoundFile], dict[str, list[FoundFile]]]:
    """Files of the folder, and of each directory in it; names that begin with a dot are left out."""
    if not root.is_dir():
        if meant := remote.meant_url(text):
            raise DataError(f"image source {text} is no folder; did you mean {meant}?")
        raise DataError(f"image source {text} is no folder; give one of tars or of a directory per class, or `digits`")
    top: list[FoundFile] = []
    classes: dict[str, list[FoundFile]] = {}
    for entry in _visible(root):
        if entry.is_dir():
            classes[entry.name] = [_file_in_class(file, root) for file in _visible(Path(entry.path))]
        else:
            top.append(FoundFile(entry.name, entry.stat().st_size))
    return top, classes


def _visible(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"cannot list {folder} ({error.strerror}); check its permissions") from None


def _file_in_class(entry: os.DirEntry[str], root: Path) -> FoundFile:
    if entry.is_dir():
        raise _too_deep(str(root), os.path.relpath(entry.path, root))
    try:
        return FoundFile(entry.name, entry.stat().st_size)
    except OSError as error:
        raise DataError(f"cannot read {entry.path} ({error.strerror}); restore or remove it") from None


def _remote_tree(url: str, transfer: Transfer) -> tuple[list[FoundFile], dict[str, list[FoundFile]]]:
    top: list[FoundFile] = []
    classes: dict[str, list[FoundFile]] = {}
    for path, size in remote.list_files(url, transfer):
        parts = path.split("/")
        if any(part.startswith(".") for part in parts):
            continue
        if len(parts) > 2:
            raise _too_deep(redact(url), "/".join(parts[:2]))
        if len(parts) == 1:
            top.append(FoundFile(path, size))
        else:
            classes.setdefault(parts[0], []).append(FoundFile(parts[1], size))
    return top, {name: sorted(files, key=lambda file: file.name) for name, files in classes.items()}


def _too_deep(root: str, folder: str) -> DataError:
    return DataError(
        f"{root}: {folder} is a folder inside a class folder; give the folder that holds the class directories"
    )


def _match_tars(text: str, transfer: Transfer) -> Tars:
    """The tars that a path, brace or glob pattern means, in the order of their names."""
    try:
        patterns = list(braceexpand(text))
    except ValueError as error:
        raise DataError(f"{text} is no brace pattern ({error}); give e.g. train-{{000..123}}.tar") from None
    _refuse_compressed(patterns)
    folders = {pattern.rpartition("/")[0] if "/" in pattern else "." for pattern in patterns}
    folder = folders.pop()
    if folders or any(mark in folder for mark in "*?"):
        raise DataError(f"{text} names tars in several folders; index each folder by itself")
    location = _absolute(folder)
    names = [pattern.rpartition("/")[2] for pattern in patterns]
    globs = [name for name in names if "*" in name or "?" in name]
    plain = [name for name in names if name not in globs]
    with DaemonPool(_LOOKUPS, "look-up") as pool, transfer.stopped_by_errors():
        files = list(pool.map(lambda name: FoundFile(name, _size(remote.join(location, name), transfer)), plain))
    if globs:
        there = _files_in(location, text, transfer)
        files += [file for file in there if any(fnmatch.fnmatchcase(file.name, glob) for glob in globs)]
    if not files:
        raise DataError(f"no file matches {text}; check the pattern")
    ordered = sorted(files, key=lambda file: file.name)
    twice = next((a.name for a, b in itertools.pairwise(ordered) if a.name == b.name), None)
    if twice:
        raise DataError(f"{text} names {twice} twice; mend the pattern")
    return Tars(location, ordered)


def _files_in(location: str, text: str, transfer: Transfer) -> list[FoundFile]:
    if remote.is_remote(location):
        return [FoundFile(name, size) for name, size in remote.list_files(location, transfer) if "/" not in name]
    if not Path(location).is_dir():
        raise DataError(f"no file matches {text}; check the pattern")
    return [FoundFile(entry.name, entry.stat().st_size) for entry in _visible(Path(location)) if entry.is_file()]


def _size(path: str, transfer: Transfer) -> int:
    if not remote.is_remote(path):
        try:
            return os.stat(path).st_size
        except OSError as error:
            raise DataError(f"cannot read {path} ({error.strerror}); check the path") from None
    size = remote.stat(path, transfer).size
    if size is None:
        raise DataError(f"the store does not say how long {redact(path)} is; copy the data to one that does")
    return size


def _absolute(text: str) -> str:
    return text.rstrip("/") if remote.is_remote(text) else str(remote.local_path(text).absolute())
