"""The options that several commands of `ecar-data` share, and the types of their values."""

from __future__ import annotations

import argparse
from pathlib import Path

from ecar_dist.command_line import above_zero, positive


def local(text: str) -> Path:
    """A local path. `Path` alone would turn a URL into a folder named `s3:`."""
    if "://" in text and not text.startswith("file://"):
        raise argparse.ArgumentTypeError(
            f"{text} is a URL, this must be a local folder; to upload a finished set, use `ecar-data push FOLDER URL`"
        )
    return Path(text.removeprefix("file://"))


def device(text: str) -> str:
    if text.partition(":")[0] not in ("auto", "cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text} is not a device; give auto, cpu, cuda or cuda:N")
    return text


def add_source(
    command: argparse.ArgumentParser, also: str, out: str = "folder to write; it must be new or empty"
) -> None:
    what = f"folder of class folders, or tars (a folder of them, or a-{{000..123}}.tar), local or s3://{also}"
    command.add_argument("source", help=what)
    command.add_argument("out", type=local, help=out)


def add_holdout(command: argparse.ArgumentParser, share: float, where: str) -> None:
    command.add_argument(
        "--holdout",
        type=float,
        default=share,
        help=f"share of each class that goes to {where}, from 0 to below 1; 0: no split",
    )


def add_labels(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--label",
        default="cls",
        help="for tars: the member that contains the label, cls or json:FIELD; none: all images are one class",
    )
    add_classes(command)
    command.add_argument("--flat", action="store_true", help="treat all images below the folder as one class")


def add_classes(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--classes",
        type=local,
        default=None,
        help="text file with one class name per line, in the order of the labels (default: sorted folder names, "
        "or the label numbers)",
    )


def add_vae(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--vae",
        required=True,
        help="dct-f8, dct-f32, identity-f1, or folder or hub name of an AutoencoderKL or AutoencoderDC (required)",
    )


def add_encoding(command: argparse.ArgumentParser, device_help: str) -> None:
    """The options that determine the bytes of the shards."""
    command.add_argument("shards", help="folder of image shards or an index, local or s3://")
    command.add_argument("out", type=local, help="folder for the latent shards; the same one for all workers")
    add_vae(command)
    command.add_argument(
        "--image-size",
        type=positive,
        default=argparse.SUPPRESS,  # without the option, an error proposes a size that fits the images
        help="side of the square images, in pixels: the shorter side is resized to it, then the centre is cropped "
        "(required)",
    )
    command.add_argument("--samples-per-shard", type=positive, default=4096, help="samples per tar")
    command.add_argument("--seed", type=int, default=0, help="seed for the order of the samples, an integer")
    command.add_argument(
        "--chunk",
        type=positive,
        default=None,
        help="consecutive images of the source that stay in one shard and are read at once; 1: all are permuted one by "
        "one (default: for 10 million images in tars or more 32, but at least 64 chunks per shard; otherwise 1)",
    )
    command.add_argument(
        "--decoder",
        choices=("auto", "dali", "dali-cpu", "pil"),
        default="auto",
        help="library that decodes the images; auto: DALI, or PIL for --resize adm; dali-cpu: DALI without the GPU",
    )
    command.add_argument(
        "--resize",
        choices=("cubic", "adm"),
        default="cubic",
        help="resize filter; adm: that of the reference code of ADM and DiT, computed by PIL on the CPU",
    )
    add_background(command)
    command.add_argument("--device", type=device, default="auto", help=device_help)
    command.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="arithmetic of the autoencoder")
    add_flip(command)


def add_flip(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--flip", choices=("none", "store"), default="none", help="store: also store the moments of mirrored images"
    )


def add_background(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--background", default="white", help="colour behind transparent pixels: white, black or #rrggbb"
    )


def add_max_bad(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--max-bad",
        type=float,
        default=1e-3,
        help="share of images that may be left out and listed in errors.jsonl, from 0 to 1",
    )


def add_decoder_tuning(command: argparse.ArgumentParser) -> None:
    """The options of `fit-codebook --hybrid`."""
    command.add_argument(
        "--hybrid",
        type=local,
        metavar="IMAGES",
        default=None,
        help="then tune the decoder of the autoencoder on these image shards, to decode codes as well as latents; "
        "only an L1 loss, no perceptual or adversarial one; writes OUT/decoder-pP-vV (default: no tuning)",
    )
    command.add_argument("--vae", default=None, help="--hybrid: autoencoder of OUT (default: that of the manifest)")
    command.add_argument("--steps", type=positive, default=500, help="--hybrid: optimizer steps")
    command.add_argument("--batch-size", type=positive, default=32, help="--hybrid: images per step")
    command.add_argument(
        "--learning-rate", type=above_zero, default=5e-4, help="--hybrid: peak rate of the one-cycle schedule"
    )
