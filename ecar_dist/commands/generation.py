"""sample and evaluate: draw images with trained weights. Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecar_dist.command_line import AddCommand, not_negative, positive
from ecar_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from ecar_dist.evaluate.score import LabelledImages
    from ecar_dist.sample.load import TrainedModel

Command = Callable[[argparse.Namespace], int]


def add_commands(add: AddCommand) -> None:
    # Options of sample.
    drawing = add("sample", sample, "draw images with the EMA weights of a run or an export")
    drawing.add_argument("--labels", help="class numbers, e.g. 0,1,2 (default: all classes)")
    drawing.add_argument(
        "--count", type=positive, help="number of images, over the labels in turn (default: 8 per label)"
    )
    drawing.add_argument("--out", required=True, type=Path, help="folder for grid.png, stages.png and images/")

    # Options of evaluate.
    scoring = add("evaluate", evaluate, "score samples against held-out real images; writes scores.json")
    scoring.add_argument("--train-images", help="image shards to train the classifier on (default: data.train_images)")
    scoring.add_argument("--heldout-images", help="image shards to compare with (default: data.heldout_images)")
    scoring.add_argument("--count", type=positive, help="number of samples to draw (default: as many as train images)")
    scoring.add_argument(
        "--background",
        help="color behind transparent pixels: white, black or #rrggbb (default: as the latents were encoded)",
    )
    scoring.add_argument("--out", type=Path, help="file for the scores (default: scores.json in the run)")

    # Options of both.
    for command in (drawing, scoring):
        command.add_argument(
            "run_or_export", type=Path, metavar="RUN|EXPORT", help="run directory, or folder of an export"
        )
        command.add_argument("--seed", type=int, default=0, help="seed of the noise")
        command.add_argument(
            "--guidance-scale",
            type=not_negative,
            help="weight of classifier-free guidance (default: sample.guidance_scale of the run)",
        )
        command.add_argument("--batch-size", type=positive, default=64, help="images drawn at once")
        command.add_argument(
            "--compile", action="store_true", help="compile the model first: takes minutes, then batches are faster"
        )


def _with_private_cache(command: Command) -> Command:
    """Give a command a compiler cache of its own for `--compile`."""

    @functools.wraps(command)
    def run(parsed: argparse.Namespace) -> int:
        if not parsed.compile:
            return command(parsed)
        from ecar_dist.runtime.compiler import private_cache

        with private_cache():
            return command(parsed)

    return run


@_with_private_cache
def sample(parsed: argparse.Namespace) -> int:
    from ecar_dist.sample.pictures import GRID_COLUMNS, GRID_ROWS, decode_stages, labelled_grid, save_picture
    from ecar_dist.sample.preview import SMALLEST_SIDE, stage_strip

    # The model and the labels to draw.
    if parsed.out.exists() and any(parsed.out.iterdir()):
        raise ConfigError(f"{parsed.out} is not empty; choose another --out, or remove it")
    trained = _open(parsed)
    classes = _labels(parsed.labels, trained.config.data.num_classes)
    count = parsed.count or 8 * len(classes)
    labels = [classes[i % len(classes)] for i in range(count)]

    # Draw batch after batch. Every image is a file; the first of each class are also columns of the grid.
    columns: dict[int, list[Any]] = {label: [] for label in classes[:GRID_COLUMNS]}
    first_stages: list[Any] = []
    batches = _draw(trained, parsed, labels)
    done = 0
    (parsed.out / "images").mkdir(parents=True)
    for stages in batches:
        pictures = decode_stages(trained.codec, stages[-1:] if first_stages else stages)
        first_stages = first_stages or [stage[: len(columns)] for stage in pictures]
        for picture in pictures[-1]:
            save_picture(parsed.out / "images" / f"{done:06d}-class{labels[done]}.png", picture)
            column = columns.get(labels[done])
            if column is not None and len(column) < GRID_ROWS:
                column.append(picture)
            done += 1

    # The grid, and the stages of its first row.
    scale = max(1, SMALLEST_SIDE // first_stages[-1].shape[1])
    drawn = [label for label, column in columns.items() if column]  # with fewer images than classes some are missing
    grid = labelled_grid([columns[label] for label in drawn], [str(label) for label in drawn], scale)
    save_picture(parsed.out / "grid.png", grid)
    save_picture(parsed.out / "stages.png", stage_strip(first_stages))
    print(f"{done} images of {trained.source}: {parsed.out / 'grid.png'}, {parsed.out / 'stages.png'}")
    return 0


@_with_private_cache
def evaluate(parsed: argparse.Namespace) -> int:
    from ecar_dist.data.images.formats import parse_background
    from ecar_dist.evaluate.images import background_of, read_images, reconstruct
    from ecar_dist.evaluate.score import Scorer
    from ecar_dist.runtime.run.directory import RunDirectory
    from ecar_dist.runtime.run.metrics import log_scores
    from ecar_dist.storage.atomic import write_json

    # Find the real images.
    trained = _open(parsed)
    config = trained.config
    folders = {
        "--train-images": parsed.train_images or config.data.train_images,
        "--heldout-images": parsed.heldout_images or config.data.heldout_images,
    }
    for flag, folder in folders.items():
        if folder is None:
            raise ConfigError(f"evaluate needs real images: give {flag} or set data.{flag[2:].replace('-', '_')}")

    # Read them at the size of the samples.
    size = config.data.latent_size * trained.codec.identity.downsample
    background = parse_background(parsed.background) if parsed.background else background_of(config.data)
    (real, source), (heldout, _) = (
        read_images(str(folder), size, background=background) for folder in folders.values()
    )
    if real.labels.max() >= config.data.num_classes:
        raise DataError(
            f"{folders['--train-images']} has label {real.labels.max()}, the model knows 0.."
            f"{config.data.num_classes - 1}; give images of its classes"
        )

    # Draw samples of the same classes and score them.
    labels = [int(real.labels[i % len(real.labels)]) for i in range(parsed.count or len(real.labels))]
    samples = _drawn_images(trained, parsed, labels)
    rebuilt = reconstruct(trained.codec, real, trained.device)
    scores = Scorer(rebuilt, real, heldout, source, trained.device).score(samples)
    scale = config.sample.guidance_scale if parsed.guidance_scale is None else parsed.guidance_scale
    scores.update(
        guidance_scale=scale, seed=parsed.seed, model=str(trained.source), samples_seen=trained.progress.samples_seen
    )

    # Report: on the screen, in a file, and in TensorBoard if it is a run.
    out = parsed.out or parsed.run_or_export / "scores.json"
    print(json.dumps(scores, indent=1))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, scores)
    if (directory := RunDirectory(parsed.run_or_export)).lineage.exists():
        log_scores(directory, trained.progress.step, scores)
    print(f"scores written to {out}")
    return 0


def _open(parsed: argparse.Namespace) -> TrainedModel:
    import torch

    from ecar_dist.sample.load import open_trained

    return open_trained(parsed.run_or_export, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _labels(text: str | None, num_classes: int) -> list[int]:
    try:
        classes = list(range(num_classes)) if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--labels {text!r} is not a list of class numbers, such as 0,1,2; give one") from None
    outside = [label for label in classes if not 0 <= label < num_classes]
    if outside:
        raise ConfigError(
            f"--labels {outside[0]} is outside 0..{num_classes - 1}; the model knows {num_classes} classes"
        )
    return classes


def _draw(trained: TrainedModel, parsed: argparse.Namespace, labels: list[int]) -> Iterator[Any]:
    """The stages of each batch, with a progress bar. Errors are raised by the call, not with the first batch."""
    import torch

    from ecar_dist.sample.fast import prepare
    from ecar_dist.sample.generate import generate_in_batches
    from ecar_dist.sample.sampling_plan import SamplingPlan

    # Everything that can fail comes before the progress bar.
    settings = SamplingPlan.from_config(trained.config, trained.device, guidance_scale=parsed.guidance_scale)
    model = prepare(trained.model, settings, trained.device, compiles=parsed.compile)
    wanted = torch.tensor(labels, device=trained.device)
    batches = generate_in_batches(model, settings, wanted, parsed.seed, parsed.batch_size, fill=parsed.compile)
    return _with_progress(batches, len(labels))


def _with_progress(batches: Iterator[Any], total: int) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(total=total, unit="image", desc="sampling", mininterval=2) as bar:
        for stages in batches:
            yield stages
            bar.update(stages[-1].shape[0])


def _drawn_images(trained: TrainedModel, parsed: argparse.Namespace, labels: list[int]) -> LabelledImages:
    import numpy as np

    from ecar_dist.evaluate.score import LabelledImages
    from ecar_dist.vae.pixels import to_pixels

    pixels = [to_pixels(trained.codec.decode(stages[-1])) for stages in _draw(trained, parsed, labels)]
    return LabelledImages(np.concatenate(pixels), np.array(labels))
