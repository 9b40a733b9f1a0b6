"""`ecar-data index`: record the position, size and label of every image of a source. The images are not copied."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data_tools.images.indexing import IndexedTar, IndexFolder
from data_tools.images.sources import ClassFolders, Tars, find_source
from data_tools.images.tar_samples import LabelRule, index_image_tar
from data_tools.progress import progress
from ecar_dist.data.images.names import readable
from ecar_dist.data.images.table import UNKNOWN_HASH, ImageRow, write_table
from ecar_dist.data.shards.entries import ImageEntry
from ecar_dist.data.shards.manifest import MANIFEST_NAME, ImageManifest, write_manifest
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.storage.atomic import temporary_beside
from ecar_dist.storage.daemon_pool import DaemonPool
from ecar_dist.storage.redaction import redact
from ecar_dist.storage.retries import Transfer

_TARS_AT_ONCE = 4  # threads; each reads one tar from start to end, and hashing releases the interpreter lock


def index(
    source: str,
    out: Path,
    *,
    label: str = "cls",
    classes: Path | None = None,
    flat: bool = False,
    task: int = 0,
    tasks: int = 1,
) -> None:
    """Write OUT/manifest.json and a table for each tar or class folder. OUT appears only once all is written.

    Finished tars survive a kill or an error, and the same command continues. Several tasks may share the tars.
    Raises DataError if OUT is occupied or the source is damaged or ambiguous, ConfigError for a wrong `label` or task.
    """
    # Checks that do not need the source.
    if not 0 <= task < tasks:
        raise ConfigError(f"--task {task} is outside 0..{tasks - 1} for --tasks {tasks}; count tasks from 0")
    rule = LabelRule.parse(label, read_class_names(classes))
    if tasks > 1 and (out / MANIFEST_NAME).exists():
        print(f"{out} is finished")
        return
    refuse_occupied(out)

    # Tars are indexed in parts that survive a kill; class folders are listed in one step.
    transfer = Transfer()
    found = find_source(source, transfer, flat=flat)
    if isinstance(found, Tars):
        manifest = _index_in_parts(source, found, out, rule, transfer, task, tasks)
    elif tasks > 1:
        raise ConfigError(f"--tasks {tasks} is for tars, and {redact(source)} has class folders; leave it out")
    else:
        with new_folder(out) as working:
            manifest = _write(source, found, working, *_index_folders(found, working, rule))

    # Report, if this task is the one that finished the set.
    if manifest is not None:
        places = "tars" if manifest.in_tars else "class folders"
        print(
            f"{out}: {manifest.count} images of {manifest.num_classes} classes in {len(manifest.shards)} {places}; "
            f"next: ecar-data encode {out} LATENTS --vae NAME --image-size SIDE"
        )


def write_index(source: str, folder: Path, rule: LabelRule, *, flat: bool = False) -> ImageManifest:
    """Index a source into an existing folder, and print what is left out."""
    transfer = Transfer()
    found = find_source(source, transfer, flat=flat)
    if isinstance(found, ClassFolders):
        return _write(source, found, folder, *_index_folders(found, folder, rule))
    done: dict[int, IndexedTar] = {}
    _index_tars(found, range(len(found.files)), folder, rule, transfer, done.__setitem__)
    return _write(source, found, folder, *_of_tars([done[place] for place in sorted(done)], found, rule))


def _write(
    source: str, found: Tars | ClassFolders, folder: Path, entries: list[ImageEntry], names: list[str]
) -> ImageManifest:
    """Write the manifest, and print what is left out."""
    _print_left_out(found)
    count = sum(entry.count for entry in entries)
    # A URL may contain secrets. They are not stored: each reader has its own credentials.
    manifest = ImageManifest(redact(source), count, len(names), names, entries, redact(found.location))
    write_manifest(folder, manifest)
    return manifest


def _index_in_parts(
    source: str, found: Tars, out: Path, rule: LabelRule, transfer: Transfer, task: int, tasks: int
) -> ImageManifest | None:
    """Index this task's tars that are not done; then, if all tars are, make OUT. None if other tasks have tars left."""
    # This task takes every tasks-th tar, except those that are done.
    shared = IndexFolder(out, found, rule, alone=tasks == 1)
    todo = [place for place in range(task, len(found.files), tasks) if shared.record(place) is None]
    try:
        _index_tars(found, todo, shared.path, rule, transfer, shared.add)
        done = shared.all_done()
        if done is None:
            share = f"{shared.number_done()} of {len(found.files)} tars are indexed"
            print(f"{out}: task {task} of {tasks} is done, {share}; other tasks make the rest")
            return None

        # All tars are done. The last task to notice this writes the manifest.
        try:
            manifest = _write(source, found, shared.path, *_of_tars(done, found, rule))
        except DataError:
            shared.drop()  # no tar is left to index, so another run would fail in the same way
            raise
        shared.finish()
    except DataError:
        if not shared.number_done():
            shared.drop()
        raise
    except OSError as error:
        if (out / MANIFEST_NAME).exists():  # another task was first
            print(f"{out} is finished")
            return None
        if error.filename:
            raise
        raise OSError(error.errno, error.strerror, str(out)) from None  # the error of a full disk names no path
    return manifest


def read_class_names(path: Path | None) -> tuple[str, ...] | None:
    """Names in the order of the labels. Raises ConfigError if the file is missing or empty, or repeats a name."""
    if path is None:
        return None
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read --classes {path} ({error}); give a text file with one class name per line"
        ) from None
    if not names or len(set(names)) != len(names):
        raise ConfigError(
            f"--classes {path} has {len(names)} names, {len(set(names))} different; give one or more classes, each once"
        )
    return names


def refuse_occupied(out: Path) -> None:
    """Raises DataError if `out` exists and is not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is not empty; remove it or give another folder")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `out` at the end, or removed after an error.

    Raises DataError if `out` exists and is not an empty folder.
    """
    refuse_occupied(out)
    working = temporary_beside(out)
    try:
        working.mkdir(parents=True)
        yield working
        os.rename(working, out)
    except OSError as error:
        if error.filename:
            raise
        raise OSError(error.errno, error.strerror, str(out)) from None  # the error of a full disk names no path
    finally:
        shutil.rmtree(working, ignore_errors=True)


def _index_tars(
    found: Tars,
    places: Sequence[int],
    folder: Path,
    rule: LabelRule,
    transfer: Transfer,
    done: Callable[[int, IndexedTar], None],
) -> None:
    """Write the tables of the tars at these places, and call `done(place, tar)` for each."""

    def read(place: int) -> None:
        file = found.files[place]
        tar = index_image_tar(found.location, file.name, file.size, rule, foreign=True, transfer=transfer)
        table = f"{place:06d}.npy"
        digest = write_table(folder / table, tar.rows)
        entry = ImageEntry(file.name, tar.size, len(tar.rows), 0, tar.xxh3_128, tar.sha256, table, digest, "tar")
        largest = max((row.label for row in tar.rows), default=-1)
        done(place, IndexedTar(entry if tar.rows else None, largest))

    # Several tars at once.
    bar = progress(len(places), "tar", "index")
    pool = DaemonPool(_TARS_AT_ONCE, "index-tar")
    with bar, pool, transfer.stopped_by_errors():
        for _ in pool.map(read, places):
            bar.update()


def _of_tars(done: Sequence[IndexedTar], found: Tars, rule: LabelRule) -> tuple[list[ImageEntry], list[str]]:
    """An entry for each tar with images, in the order of the tars, and the class names."""
    largest = max((one.largest for one in done), default=-1)
    entries = [one.entry for one in done if one.entry is not None]
    return _number(entries, found.location), list(rule.class_names or map(str, range(largest + 1)))


def _index_folders(found: ClassFolders, folder: Path, rule: LabelRule) -> tuple[list[ImageEntry], list[str]]:
    """An entry for each class folder, and the class names. `none` makes all folders one class."""
    if rule.kind == "json":
        raise ConfigError("--label json:FIELD is for tars; give --label cls (a class per folder) or none")
    names = ["0"] if rule.kind == "none" else list(rule.class_names or found.classes)
    unknown = sorted(set(found.classes) - set(names)) if rule.kind == "cls" else []
    if unknown:
        listed = ", ".join(unknown[:10]) + (", ..." if len(unknown) > 10 else "")
        raise DataError(
            f"{redact(found.location)}: class folder {listed} is not in --classes; add it to the file, or move it out"
        )

    # The images are not read, so the table has no hashes of them.
    entries = []
    for place, (name, files) in enumerate(found.classes.items()):
        label = 0 if rule.kind == "none" else names.index(name)
        table = f"{place:06d}.npy"
        digest = write_table(folder / table, [ImageRow(file.name, label, 0, file.size, UNKNOWN_HASH) for file in files])
        size = sum(file.size for file in files)
        entries.append(ImageEntry(name, size, len(files), 0, "", "", table, digest, "files"))
    return _number(entries, found.location), names


def _print_left_out(found: Tars | ClassFolders) -> None:
    place = redact(found.location)
    if found.left_out:
        counts = found.left_out.most_common()
        kinds = ", ".join(f"{count} {readable(kind) or 'without extension'}" for kind, count in counts)
        print(f"{place}: left out: {kinds}")
    if isinstance(found, ClassFolders):
        if found.empty:
            listed = ", ".join(map(readable, found.empty[:10])) + (", ..." if len(found.empty) > 10 else "")
            print(f"{place}: skipped {len(found.empty)} class folders without images: {listed}")
        for note in found.notes:
            print(f"{place}: {note}")


def _number(entries: list[ImageEntry], location: str) -> list[ImageEntry]:
    """The entries, each with the index of its first image."""
    numbered = []
    first = 0
    for entry in entries:
        numbered.append(dataclasses.replace(entry, first_index=first))
        first += entry.count
    if not numbered:
        raise DataError(f"{redact(location)} has no images; check the source")
    return numbered
