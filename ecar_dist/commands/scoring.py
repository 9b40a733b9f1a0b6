"""evaluate: score samples against real images. Imports what it needs when it runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecar_dist.command_line import AddCommand, positive
from ecar_dist.commands.drawing import add_drawing, draw, open_model, settings, with_private_cache
from ecar_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ecar_dist.evaluate.frechet import Gaussian
    from ecar_dist.evaluate.networks import FeatureNetwork
    from ecar_dist.evaluate.score import LabelledImages
    from ecar_dist.sample.load import TrainedModel

NEIGHBOURS_SHOWN = 3  # training images below a sample


def add_commands(add: AddCommand) -> None:
    scoring = add("evaluate", evaluate, "score samples against held-out real images; writes scores.json")
    add_drawing(scoring)
    scoring.add_argument("--train-images", help="image shards to train the classifier on (default: data.train_images)")
    scoring.add_argument("--heldout-images", help="image shards to compare with (default: data.heldout_images)")
    scoring.add_argument("--count", type=positive, help="number of samples to draw (default: one per training image)")
    scoring.add_argument(
        "--background",
        help="color behind transparent pixels: white, black or #rrggbb (default: that of the latents)",
    )
    scoring.add_argument(
        "--features",
        action="append",
        default=[],
        metavar="NETWORK",
        help="also score with the features of a frozen network, effnet-lite0 or inception (FID); may be given twice",
    )
    scoring.add_argument(
        "--feature-weights", type=Path, help="file with the weights of the network (default: those of its package)"
    )
    scoring.add_argument(
        "--reference",
        type=Path,
        help=".npz file with mu and sigma to use instead of the held-out images, as from ADM (default: none)",
    )
    scoring.add_argument(
        "--sampling-seeds",
        type=positive,
        default=3,
        help="number of sample sets to draw, with --seed and the seeds after it: scores are means over the sets, and "
        "distances have a spread (default: 3)",
    )
    scoring.add_argument(
        "--neighbours",
        type=Path,
        metavar="PNG",
        help="also write a picture: a sample of each class above its three nearest training images (default: none)",
    )
    scoring.add_argument("--out", type=Path, help="file for the scores (default: scores.json in the run or export)")


@with_private_cache
def evaluate(parsed: argparse.Namespace) -> int:
    from ecar_dist.evaluate.frozen import frozen_scores
    from ecar_dist.evaluate.images import reconstruct
    from ecar_dist.evaluate.score import Scorer, seeds_scores
    from ecar_dist.runtime.run.directory import RunDirectory
    from ecar_dist.runtime.run.metrics import log_scores
    from ecar_dist.storage.atomic import write_json

    # The model, the networks to score with, and the real images. Missing ones are reported before anything is drawn.
    if parsed.neighbours and parsed.neighbours.suffix.lower() != ".png":
        raise ConfigError(f"--neighbours {parsed.neighbours}: the picture is a PNG; give a name that ends in .png")
    trained = open_model(parsed)
    networks = _open_networks(parsed, trained.device)
    real, heldout, source = _real_images(trained, parsed)

    # Samples of the same classes in the same shares, one set per seed. Only one set is in memory at a time.
    number, count = len(real.labels), parsed.count or len(real.labels)
    labels = [int(real.labels[i * number // count]) for i in range(count)]
    seeds = range(parsed.seed, parsed.seed + parsed.sampling_seeds)
    features: list[list[np.ndarray]] = [[] for _ in networks]

    def sample_sets() -> Iterator[LabelledImages]:
        for seed in seeds:
            samples = _drawn_images(trained, parsed, labels, seed)
            if parsed.neighbours and seed == parsed.seed:
                _draw_neighbours(parsed.neighbours, samples, real, trained)
            for (network, _), of_network in zip(networks, features, strict=True):
                of_network.append(network(samples.pixels))
            yield samples

    # Score them as they are drawn.
    rebuilt = reconstruct(trained.codec, real, trained.device)
    scores = seeds_scores(Scorer(rebuilt, real, heldout, source, trained.device), sample_sets())
    for (network, reference), drawn in zip(networks, features, strict=True):
        scores |= frozen_scores(
            network,
            drawn=drawn,
            train=real.pixels,
            heldout=heldout.pixels,
            reconstructions=rebuilt.pixels,
            reference=reference,
        )
    scores |= _origin(trained, parsed) | {"sampling seeds": list(seeds)}

    # Report: on the screen, in a file, and in TensorBoard if it is a run.
    out = parsed.out or trained.home / "scores.json"
    print(json.dumps(scores, indent=1))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, scores)
    if (directory := RunDirectory(trained.home)).lineage.exists():
        log_scores(directory, trained.progress.step, scores)
    print(f"scores written to {out}")
    return 0


def _real_images(trained: TrainedModel, parsed: argparse.Namespace) -> tuple[LabelledImages, LabelledImages, str]:
    """Training and held-out images at the size of the samples, and the short name of the set."""
    from ecar_dist.data.images.formats import parse_background
    from ecar_dist.evaluate.images import background_of, read_images

    # Find them.
    config = trained.config
    folders = {
        "--train-images": parsed.train_images or config.data.train_images,
        "--heldout-images": parsed.heldout_images or config.data.heldout_images,
    }
    for flag, folder in folders.items():
        if folder is None:
            raise ConfigError(f"evaluate needs real images: give {flag} or set data.{flag[2:].replace('-', '_')}")

    # Read them.
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
    return real, heldout, source


def _origin(trained: TrainedModel, parsed: argparse.Namespace) -> dict[str, Any]:
    """What was scored: weights, guidance, seed, and the settings that differ from the run's."""
    return {
        "guidance_scale": trained.config.sample.guidance_scale,
        "seed": parsed.seed,
        "model": str(trained.source),
        "samples_seen": trained.progress.samples_seen,
        "weights": trained.weights,
        "settings": settings(parsed),
    }


def _open_networks(parsed: argparse.Namespace, device: torch.device) -> list[tuple[FeatureNetwork, Gaussian | None]]:
    """The networks of --features, each with the moments of --reference if there are any."""
    from ecar_dist.evaluate.frozen import read_reference
    from ecar_dist.evaluate.networks import NETWORKS

    # Unknown names, and options that need exactly one network.
    names = list(dict.fromkeys(parsed.features))
    for name in names:
        if name not in NETWORKS:
            raise ConfigError(f"--features {name} is not known; use one of {', '.join(NETWORKS)}")
    for flag, value in (("--feature-weights", parsed.feature_weights), ("--reference", parsed.reference)):
        if value is not None and len(names) != 1:
            raise ConfigError(f"{flag} needs exactly one network, --features names {len(names)}; name one")

    opened = [NETWORKS[name](parsed.feature_weights, device) for name in names]
    return [(each, read_reference(parsed.reference, each) if parsed.reference else None) for each in opened]


def _drawn_images(trained: TrainedModel, parsed: argparse.Namespace, labels: list[int], seed: int) -> LabelledImages:
    import numpy as np

    from ecar_dist.evaluate.score import LabelledImages
    from ecar_dist.vae.pixels import to_pixels

    pixels = [to_pixels(trained.codec.decode(stages[-1])) for stages in draw(trained, parsed, labels, seed)]
    return LabelledImages(np.concatenate(pixels), np.array(labels))


def _draw_neighbours(path: Path, samples: LabelledImages, train: LabelledImages, trained: TrainedModel) -> None:
    """A sheet with a column for each class: its first sample, and its nearest training images."""
    import numpy as np

    from ecar_dist.evaluate.classifier import inputs_of
    from ecar_dist.evaluate.neighbours import nearest_images
    from ecar_dist.sample.pictures import GRID_COLUMNS, labelled_grid, save_picture
    from ecar_dist.sample.preview import SMALLEST_SIDE

    # The samples, and their nearest training images of any class.
    classes, first = np.unique(samples.labels, return_index=True)
    chosen = samples.pixels[first[:GRID_COLUMNS]]
    seen, references = (inputs_of(pixels, trained.device) for pixels in (chosen, train.pixels))
    places = nearest_images(seen, references, NEIGHBOURS_SHOWN).cpu().numpy()  # [columns, shown]

    rows = [list(chosen), *(list(train.pixels[column]) for column in places.T)]
    titles = [trained.classes.title(int(label)) for label in classes[:GRID_COLUMNS]]
    scale = max(1, SMALLEST_SIDE // chosen.shape[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_picture(path, labelled_grid(rows, titles, ["sample", "nearest", "2nd", "3rd"][: len(rows)], scale=scale))
