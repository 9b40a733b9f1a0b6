"""The files of an image source: tars, or one folder per class; local, or at a URL.

Names are sorted by code point, so the order of the images is the same wherever a source is copied to. Sources that are
not files, such as `digits`, are listed in `reader.py`.
"""

from __future__ import annotations

import fnmatch
import itertools
import os
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from braceexpand import braceexpand

from ecar_dist.data.images.formats import IMAGE_EXTENSIONS
from ecar_dist.data.images.names import readable
from ecar_dist.data.images.table import MAX_IMAGE_BYTES
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.storage import remote
from ecar_dist.storage.daemon_pool import DaemonPool
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.retries import Transfer
from ecar_dist.storage.untrusted import UntrustedError, relative_name

_LOOKUPS = 16  # sizes of remote files that are requested at once
_DEEPEST = 50  # levels of nested folders
_SHOWN = 10  # problems named in an error
_LISTED = ", ".join(IMAGE_EXTENSIONS)
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True)
class FoundFile:
    name: str  # relative to its folder
    size: int


@dataclass(frozen=True)
class Tars:
    location: str  # absolute path or URL of their folder
    files: list[FoundFile]
    left_out: Counter[str] = field(default_factory=Counter, compare=False)  # other files, by extension


@dataclass(frozen=True)
class ClassFolders:
    """Images in one folder per class, at any depth below it."""

    location: str  # absolute path or URL of the folder that contains the class folders
    classes: dict[str, list[FoundFile]]
    left_out: Counter[str]  # files that are not images, by extension
    empty: list[str]  # class folders without images
    notes: list[str] = field(default_factory=list)  # possible mistakes of the user


@dataclass
class _Tree:
    """All files of a folder: those at the top, and those at any depth below each subfolder."""

    location: str
    top: list[FoundFile] = field(default_factory=list)
    folders: dict[str, list[FoundFile]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, parts: Sequence[str], size: int) -> None:
        """Add a file, given the parts of its relative path. Hidden files are ignored.

        An image with a name that readers refuse is a problem.
        """
        if any(part.startswith(".") for part in parts):
            return
        try:
            if is_image(parts[-1]):
                relative_name("/".join(parts))
        except UntrustedError as error:
            self.problems.append(f"{error}; rename it")
            return
        if len(parts) == 1:
            self.top.append(FoundFile(parts[0], size))
        else:
            self.folders.setdefault(parts[0], []).append(FoundFile("/".join(parts[1:]), size))

    def sorted(self) -> _Tree:
        """File systems and stores list files in different orders."""
        for files in [self.top, *self.folders.values()]:
            files.sort(key=lambda file: file.name)
        return self


def find_source(text: str, transfer: Transfer | None = None, *, flat: bool = False) -> Tars | ClassFolders:
    """Find the files of a tar, a brace or glob pattern of tars, a folder of tars, or a folder of class folders.

    `flat`: all images below the folder are one class. Raises DataError if a folder is neither or both, or if images
    would be left out. The error names all problems at once.
    """
    transfer = transfer or Transfer()
    if names_tars(text):
        if flat:
            raise ConfigError(
                f"--flat is for folders of images, {text} names tars; give --label none to make one class"
            )
        return _match_tars(text, transfer)

    _refuse_compressed([text])
    location = _absolute(text)
    tree = _remote_tree(location, transfer) if remote.is_remote(location) else _local_tree(Path(location), text)
    if flat:
        return _one_class(tree, text)

    # A folder of tars or a folder of class folders, but not both: one of them would be left out.
    tars = [file for file in tree.top if file.name.endswith(".tar")]
    if tars and any(is_image(file.name) for files in tree.folders.values() for file in files):
        raise DataError(f"{text} has both {tars[0].name} and class folders; give `{text}/*.tar`, or move one of them")
    if not tree.folders:
        _refuse_compressed([file.name for file in tree.top])
    if tars:
        return Tars(location, tars, _extensions(file.name for file in tree.top if file not in tars))
    return _class_folders(tree, text)


def names_tars(text: str) -> bool:
    """True for the name of a tar and for a pattern, False for a folder."""
    return text.endswith(".tar") or any(mark in text for mark in "{*?")


def _refuse_compressed(names: Sequence[str]) -> None:
    name = next((name for name in names if name.endswith(_COMPRESSED)), None)
    if name is not None:
        unpack = "gunzip" if name.endswith("gz") else "unpack"
        raise DataError(
            f"{redact(name)} is compressed, so images cannot be read from it one by one; {unpack} it to a .tar"
        )


def is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _class_folders(tree: _Tree, text: str) -> ClassFolders:
    if not tree.folders:
        _check(tree, {}, text)
        raise DataError(
            f"{text} has no class folders and no tars; put the images of each class into a folder of its own, or give "
            "--flat if there are no classes"
        )
    loose = [file.name for file in tree.top if is_image(file.name)]
    if loose:
        more = f" and {len(loose) - 1} more" if len(loose) > 1 else ""
        tree.problems.append(
            f"the image {loose[0]}{more} is next to the class folders; move it into one of them, or give --flat"
        )

    # The images of each class folder.
    classes = {name: [file for file in tree.folders[name] if is_image(file.name)] for name in sorted(tree.folders)}
    empty = [name for name, files in classes.items() if not files]
    _check(tree, classes, text)
    if len(empty) == len(classes):
        raise DataError(f"{text}: none of its {len(classes)} class folders has images ({_LISTED}); check the source")

    # What is left out.
    others = [file.name for files in [tree.top, *tree.folders.values()] for file in files if not is_image(file.name)]
    classes = {name: files for name, files in classes.items() if files}
    return ClassFolders(tree.location, classes, _extensions(others), empty, _nesting_notes(classes, text))


def _one_class(tree: _Tree, text: str) -> ClassFolders:
    """The folder itself is the only class folder, and its parent is the location of the source."""
    parent, _, name = tree.location.rpartition("/")
    if not name or parent.endswith("/"):
        raise DataError(
            f"--flat names the class after the folder, and {text} has no name; move the images into a folder"
        )
    below = [FoundFile(f"{folder}/{file.name}", file.size) for folder, files in tree.folders.items() for file in files]
    files = sorted(tree.top + below, key=lambda file: file.name)
    images = [file for file in files if is_image(file.name)]
    _check(tree, {name: images}, text)
    if not images:
        raise DataError(f"{text} has no images ({_LISTED}); check the source")
    left_out = _extensions(file.name for file in files if not is_image(file.name))
    return ClassFolders(parent or "/", {name: images}, left_out, [])


def _check(tree: _Tree, classes: dict[str, list[FoundFile]], text: str) -> None:
    """Raises DataError with all problems of a tree, so that they can be fixed together."""
    # Images that are too large, and class names that the manifest cannot hold.
    problems = list(tree.problems)
    for name, files in classes.items():
        large = (file for file in files if file.size > MAX_IMAGE_BYTES)
        problems += [
            f"{name}/{file.name} has {file.size} bytes, the limit for an image is {MAX_IMAGE_BYTES}; remove it"
            for file in large
        ]
        if _not_utf8(name):
            problems.append(f"the class folder {readable(name)} has a name that is not UTF-8; rename it")
    if not problems:
        return

    # One problem as it is, several as a numbered list.
    shown = "; ".join(f"({number}) {problem}" for number, problem in enumerate(problems[:_SHOWN], 1))
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    if len(problems) == 1:
        raise DataError(f"{text}: {problems[0]}")
    raise DataError(f"{text} has {len(problems)} problems: {shown}{more}")


def _nesting_notes(classes: dict[str, list[FoundFile]], text: str) -> list[str]:
    """A folder that contains train/ and val/ is read as two classes, which is rarely intended."""
    if not all("/" in file.name for files in classes.values() for file in files):
        return []
    first = next(iter(classes))
    names = ", ".join(list(classes)[:3])
    return [
        f"all images are in folders inside {names}, the class folders; if those are not classes, give {text}/{first}"
    ]


def _extensions(names: Iterable[str]) -> Counter[str]:
    """Number of files by extension in lower case; "" for files without one."""
    return Counter(os.path.splitext(name)[1].lower() for name in names)


def _not_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _local_tree(root: Path, text: str) -> _Tree:
    if not root.is_dir():
        if meant := remote.meant_url(text):
            raise DataError(f"image source {text} is not a folder; did you mean {meant}?")
        raise DataError(
            f"image source {text} is not a folder; give a folder of tars or of class folders, or a built-in source "
            "such as `digits`"
        )
    tree = _Tree(str(root))
    _walk(tree, root, (), (os.path.realpath(root),))
    return tree.sorted()


def _walk(tree: _Tree, folder: Path, parts: tuple[str, ...], above: tuple[str, ...]) -> None:
    """Add all files below a folder, also through links. `above`: the real paths of the folders that contain it."""
    for entry in _visible(folder, tree.problems):
        below = (*parts, entry.name)

        # A file: regular ones are added. An image that is a pipe or a broken link is a problem.
        try:
            if not entry.is_dir():
                about = entry.stat()
                if is_image(entry.name) and not stat.S_ISREG(about.st_mode):
                    tree.problems.append(f"{readable('/'.join(below))} is not a regular file; remove it")
                else:
                    tree.add(below, about.st_size)
                continue
        except OSError as error:
            tree.problems.append(f"cannot read {readable('/'.join(below))} ({error.strerror}); restore or remove it")
            continue

        # A folder: links may form a cycle, so remember the real paths on the way down.
        real = os.path.realpath(entry.path)
        if real in above:
            tree.problems.append(f"{readable('/'.join(below))} is a link to a folder that contains it; remove it")
            continue
        if len(below) > _DEEPEST:
            tree.problems.append(f"{readable(below[0])} has folders nested deeper than {_DEEPEST}; move them up")
            continue
        if not parts:
            tree.folders[entry.name] = []
        _walk(tree, Path(entry.path), below, (*above, real))


def _visible(folder: Path, problems: list[str]) -> list[os.DirEntry[str]]:
    """The entries of a folder that are not hidden, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        problems.append(f"cannot list {readable(str(folder))} ({error.strerror}); check its permissions")
        return []


def _remote_tree(url: str, transfer: Transfer) -> _Tree:
    tree = _Tree(url)
    for path, size in remote.list_files(url, transfer):
        tree.add(path.split("/"), size)
    return tree.sorted()


def _match_tars(text: str, transfer: Transfer) -> Tars:
    """The tars of a path, brace or glob pattern, sorted by name."""
    # Braces first: "a/{0..1}*.tar" is two globs.
    try:
        patterns = list(braceexpand(text))
    except ValueError as error:
        raise DataError(f"{text} is not a valid brace pattern ({error}); give e.g. train-{{000..123}}.tar") from None
    _refuse_compressed(patterns)

    # All patterns must name files of one folder.
    folders = {pattern.rpartition("/")[0] if "/" in pattern else "." for pattern in patterns}
    folder = folders.pop()
    if folders or any(mark in folder for mark in "*?"):
        raise DataError(f"{text} names tars in several folders; index each folder separately")

    # Plain names must exist, globs must match something.
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
        raise DataError(f"{text} names {twice} twice; fix the pattern")
    return Tars(location, ordered)


def _files_in(location: str, text: str, transfer: Transfer) -> list[FoundFile]:
    if remote.is_remote(location):
        return [FoundFile(name, size) for name, size in remote.list_files(location, transfer) if "/" not in name]
    if not Path(location).is_dir():
        raise DataError(f"no file matches {text}; check the pattern")
    problems: list[str] = []
    entries = _visible(Path(location), problems)
    if problems:
        raise DataError(problems[0])
    return [FoundFile(entry.name, entry.stat().st_size) for entry in entries if entry.is_file()]


def _size(path: str, transfer: Transfer) -> int:
    if not remote.is_remote(path):
        try:
            about = os.stat(path)
        except OSError as error:
            raise DataError(f"cannot read {path} ({error.strerror}); check the path") from None
        if not stat.S_ISREG(about.st_mode):  # opening a pipe would block
            raise DataError(f"{path} is not a regular file; give a tar, or a folder")
        return about.st_size
    size = remote.stat(path, transfer).size
    if size is None:
        raise DataError(f"the store does not report the size of {redact(path)}; copy the data to one that does")
    return size


def _absolute(text: str) -> str:
    return text.rstrip("/") if remote.is_remote(text) else str(remote.local_path(text).absolute())
