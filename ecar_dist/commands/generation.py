"""sample and preview: draw images with trained weights. Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecar_dist.command_line import AddCommand, error_line, positive
from ecar_dist.commands.drawing import add_drawing, draw, open_model, with_private_cache
from ecar_dist.errors import ConfigError, EcarError
from ecar_dist.sample.options import WEIGHTS, parse_sweep

if TYPE_CHECKING:
    from ecar_dist.runtime.run.directory import RunDirectory
    from ecar_dist.sample.load import TrainedModel


def add_commands(add: AddCommand) -> None:
    drawing = add("sample", sample, "draw images with the EMA weights of a run, a checkpoint or an export")
    add_drawing(drawing)
    drawing.add_argument(
        "--labels",
        help="classes to draw: numbers, ranges, names, or none for no class, e.g. 0-3,7 or cats,dogs (default: all)",
    )
    drawing.add_argument(
        "--count",
        type=positive,
        help="number of images, cycling through the labels (default: 8 per label; with --sweep 1 per label and row)",
    )
    drawing.add_argument(
        "--sweep",
        metavar="OPTION=V1,V2,...",
        help="draw the same noise with several values of one sampler option, of step or of ema: one row per value in "
        "sweep.png; separate the items of a list with colons (default: one value)",
    )
    drawing.add_argument(
        "--out", required=True, type=Path, help="new folder for grid.png and stages.png, or sweep.png, and images/"
    )

    previewing = add("preview", preview, "draw the previews of checkpoints that have none, during training or later")
    previewing.add_argument("run_directory", type=Path, metavar="RUN", help="run directory")
    previewing.add_argument(
        "--watch",
        type=positive,
        metavar="SECONDS",
        help="look for new checkpoints every SECONDS seconds, until the last one of the run is drawn (default: once)",
    )


def preview(parsed: argparse.Namespace) -> int:
    """Exit status 1 if a checkpoint could not be drawn."""
    from ecar_dist.runtime.run.directory import RunDirectory

    directory = RunDirectory(parsed.run_directory)
    if not parsed.watch:
        failed: set[str] = set()
        _draw_new(directory, failed)
        return 1 if failed else 0
    with contextlib.suppress(KeyboardInterrupt):
        return _watch(directory, parsed.watch)
    return 0


def _watch(directory: RunDirectory, seconds: int) -> int:
    """Draw each checkpoint as soon as it exists, up to the last one of the run."""
    failed: set[str] = set()
    if not directory.config.exists():
        print("waiting for the run to start", flush=True)
    while True:
        try:
            if directory.config.exists() and _draw_new(directory, failed):
                return 1 if failed else 0
        except (EcarError, OSError) as error:  # unavailable storage may come back
            print(error_line(error), file=sys.stderr, flush=True)
        time.sleep(seconds)


def _draw_new(directory: RunDirectory, failed: set[str]) -> bool:
    """Draw the checkpoints without a picture, oldest first; True if the last one of the run is among those drawn.

    A checkpoint that cannot be drawn is reported, added to `failed`, and not tried again.
    """
    import torch

    from ecar_dist.runtime.checkpoint.files import step_of
    from ecar_dist.runtime.checkpoint.storage import open_storage
    from ecar_dist.runtime.run.metrics import log_preview
    from ecar_dist.sample.load import draw_preview

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = directory.load_config()
    with contextlib.closing(open_storage(config, directory.path)) as storage:
        found = storage.complete()
        for name, _ in reversed(found):
            step = step_of(name)
            if name in failed or directory.preview(step).exists():
                continue
            try:
                picture = draw_preview(directory.path, step, device)
                path = log_preview(directory, step, picture, config.log.tensorboard)
                print(f"step {step:,}: {path}", flush=True)
            except (EcarError, OSError) as error:
                if name in storage.committed():  # otherwise it was removed in the meantime (checkpoint.keep)
                    failed.add(name)
                    print(error_line(error), file=sys.stderr, flush=True)
            finally:
                storage.release(name)
    return bool(found) and found[0][1] >= config.train.total_samples


@with_private_cache
def sample(parsed: argparse.Namespace) -> int:
    # Everything that can fail comes before the folder is created.
    if parsed.out.exists() and (not parsed.out.is_dir() or any(parsed.out.iterdir())):
        raise ConfigError(f"{parsed.out} is not empty; choose another --out, or remove it")
    if parsed.sweep is not None:
        return _sample_sweep(parsed)
    trained = open_model(parsed)
    classes = _classes(trained, parsed.labels)
    count = parsed.count or 8 * len(classes)
    labels = [classes[i % len(classes)] for i in range(count)]
    batches = draw(trained, parsed, labels)

    (parsed.out / "images").mkdir(parents=True)
    _draw_grid(trained, batches, classes, labels, parsed.out)
    print(f"{count} images of {trained.source}: {parsed.out / 'grid.png'}, {parsed.out / 'stages.png'}")
    return 0


def _draw_grid(trained: TrainedModel, batches: Iterator[Any], classes: list[int], labels: list[int], out: Path) -> None:
    """Write every image, the grid with a column for each of the first classes, and the stages of its first row."""
    from ecar_dist.sample.pictures import GRID_COLUMNS, GRID_ROWS, decode_stages, labelled_grid, save_picture
    from ecar_dist.sample.preview import SMALLEST_SIDE, stage_strip

    # Batch by batch. Every image is a file; the first ones of each class are also a column of the grid.
    columns: dict[int, list[Any]] = {label: [] for label in list(dict.fromkeys(classes))[:GRID_COLUMNS]}
    first_stages: list[Any] = []
    done = 0
    for stages in batches:
        pictures = decode_stages(trained.codec, stages[-1:] if first_stages else stages)
        first_stages = first_stages or [stage[: len(columns)] for stage in pictures]
        for picture in pictures[-1]:
            name = f"{done:06d}-{trained.classes.file_part(labels[done])}.png"
            save_picture(out / "images" / name, picture)
            column = columns.get(labels[done])
            if column is not None and len(column) < GRID_ROWS:
                column.append(picture)
            done += 1

    # The grid, and the stages of its first row.
    scale = max(1, SMALLEST_SIDE // first_stages[-1].shape[1])
    drawn = [label for label, column in columns.items() if column]  # with fewer images than classes some are missing
    rows = list(zip(*(columns[label] for label in drawn), strict=False))
    grid = labelled_grid(rows, [trained.classes.title(label) for label in drawn], scale=scale)
    save_picture(out / "grid.png", grid)
    titles = [trained.classes.title(label) for label in labels[: len(first_stages[-1])]]
    save_picture(out / "stages.png", stage_strip(first_stages, trained.config.stage_sizes, titles))


def _sample_sweep(parsed: argparse.Namespace) -> int:
    """Draw the same samples with each value of one option, one row of the sheet per value."""
    from ecar_dist.sample.pictures import GRID_COLUMNS, labelled_grid, save_picture
    from ecar_dist.sample.preview import SMALLEST_SIDE
    from ecar_dist.vae.pixels import to_pixels

    # Everything that can fail comes before the folder is created.
    option, values = parse_sweep(parsed.sweep)
    if parsed.compile:
        raise ConfigError("--sweep changes the compiled model in each row; leave --compile out")
    rows = _swept(parsed, option, values)
    first = rows[0]
    classes = _classes(first, parsed.labels)
    count = min(parsed.count or len(classes), GRID_COLUMNS)
    labels = [classes[i % len(classes)] for i in range(count)]

    sheet = []
    for value, trained in zip(values, rows, strict=True):
        drawn = [to_pixels(trained.codec.decode(stages[-1])) for stages in draw(trained, parsed, labels)]
        pictures = [picture for batch in drawn for picture in batch]
        folder = parsed.out / "images" / re.sub(r"[^A-Za-z0-9._-]+", "_", f"{option}-{value}")
        folder.mkdir(parents=True, exist_ok=True)
        for index, picture in enumerate(pictures):
            save_picture(folder / f"{index:06d}-{first.classes.file_part(labels[index])}.png", picture)
        sheet.append(pictures)

    scale = max(1, SMALLEST_SIDE // sheet[0][0].shape[0])
    titles = [first.classes.title(label) for label in labels]
    named = [f"{option} {value}" for value in values]
    save_picture(parsed.out / "sweep.png", labelled_grid(sheet, titles, named, scale=scale))
    print(f"{len(values)} x {count} images of {first.source}: {parsed.out / 'sweep.png'}")
    return 0


def _swept(parsed: argparse.Namespace, option: str, values: list[str]) -> list[TrainedModel]:
    """The model of each row: the same one with different settings, unless the weights are swept."""
    if option in WEIGHTS:
        return [open_model(parsed, **{option: value}) for value in values]
    trained = open_model(parsed)
    return [trained.with_settings({option: value}) for value in values]


def _classes(trained: TrainedModel, text: str | None) -> list[int]:
    return list(range(trained.config.data.num_classes)) if text is None else trained.classes.parse(text)
