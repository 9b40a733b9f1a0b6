"""`ecar-data`: images -> latent shards -> a bucket. Exit status 1 is an error a user can fix."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ecar_dist import __version__
from ecar_dist.command_line import CommandParser, positive, prepare_process, run_command


def main(argv: Sequence[str] | None = None) -> int:
    if argv is None:
        prepare_process()
    values = vars(_parser().parse_args(argv))
    run = values.pop("run")
    return run_command("ecar-data", lambda: _call(run, values))


def _call(run: str, values: dict[str, Any]) -> int:
    # imported now: torch, DALI and diffusers take seconds, and --help needs none of them
    module, _, function = run.partition(":")
    getattr(importlib.import_module(f"data_tools.{module}"), function)(**values)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="ecar-data", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_index, _add_shard, _add_train_vae, _add_plan, _add_encode, _add_status, _add_finalize):
        add(commands)
    for name, help_text in (
        ("verify", "hashes, structure and decodability of every sample"),
        ("stats", "what the manifest says"),
    ):
        command = _command(commands, name, f"inspection:{name}", help_text)
        command.add_argument("folder", type=_local, help="folder with a manifest.json, of latent or image shards")
    _add_preview(commands)
    _add_push(commands)
    return parser


def _local(text: str) -> Path:
    """A path of this machine. `Path` would make a folder named `s3:` of a URL."""
    if "://" in text and not text.startswith("file://"):
        raise argparse.ArgumentTypeError(
            f"{text} is a URL, this must be a local folder; work there, then `ecar-data push FOLDER URL`"
        )
    return Path(text.removeprefix("file://"))


def _device(text: str) -> str:
    if text.partition(":")[0] not in ("auto", "cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text} is none of auto, cpu, cuda, cuda:N")
    return text


Commands = argparse._SubParsersAction  # argparse has no public name for what add_subparsers returns


def _command(commands: Commands, name: str, run: str, help_text: str) -> argparse.ArgumentParser:
    """`run` is module:function in data_tools; the function takes the arguments by name."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    command = commands.add_parser(name, help=help_text, description=help_text, formatter_class=formatter)
    command.set_defaults(run=run)
    return command


def _add_source(command: argparse.ArgumentParser, also: str = "") -> None:
    what = f"folder with a directory per class, or tars (folder, a-{{000..123}}.tar), local or s3://{also}"
    command.add_argument("source", help=what)
    command.add_argument("out", type=_local, help="folder to make; must not exist or be empty")
    command.add_argument("--label", default="cls", help="tars: member that holds the label: cls, json:FIELD or none")
    command.add_argument("--classes", type=_local, default=None, help="text file with a class name a line")
    command.add_argument("--flat", action="store_true", help="all images below the folder are one class")


def _add_index(commands: Commands) -> None:
    command = _command(commands, "index", "images.index:index", "record where each image lies; copies nothing")
    _add_source(command)


def _add_shard(commands: Commands) -> None:
    command = _command(commands, "shard", "images.shard:shard", "images -> image shards, each image decoded once")
    _add_source(command, ", or an index, or `digits`")
    command.add_argument("--holdout", type=float, default=0.0, help="share of each class that goes to OUT/heldout")
    command.add_argument("--shuffle", action="store_true", help="mix the images; for training straight from them")
    command.add_argument("--seed", type=int, default=0, help="of the choice of held-out images, and of --shuffle")
    command.add_argument("--samples-per-shard", type=positive, default=10_000, help="images in a tar")
    _add_max_bad(command)


def _add_train_vae(commands: Commands) -> None:
    command = _command(
        commands, "train-vae", "train_vae:train_vae", "train a small KL autoencoder on image shards; again to resume"
    )
    command.add_argument("shards", type=_local, help="image shards or an index")
    command.add_argument("out", type=_local, help="folder for the autoencoder")
    command.add_argument("--image-size", type=positive, default=32, help="side of the square images, in pixels")
    command.add_argument(
        "--downsample", type=positive, default=4, help="image pixels per latent pixel side, a power of 2"
    )
    command.add_argument("--latent-channels", type=positive, default=4, help="channels of a latent pixel")
    command.add_argument(
        "--channels", type=positive, default=16, help="width at full size; deeper levels have up to twice that"
    )
    command.add_argument("--steps", type=positive, default=250, help="steps of the optimizer")
    command.add_argument("--batch-size", type=positive, default=32, help="images a step")
    command.add_argument("--learning-rate", type=float, default=2e-3, help="highest rate of the one-cycle schedule")
    command.add_argument("--kl-weight", type=float, default=1e-3, help="weight of the KL term per latent value")
    command.add_argument("--seed", type=int, default=0, help="of weights, order and posterior samples")
    # on the CPU, DALI's threads and torch's fight for the cores: measured 3 to 4 times slower steps on 2 cores
    command.add_argument("--decoder", choices=("dali", "pil"), default="pil", help="library that decodes the images")
    command.add_argument("--device", type=_device, default="auto", help="auto, cpu or cuda")
    _add_background(command)
    _add_max_bad(command)


def _add_plan(commands: Commands) -> None:
    command = _command(commands, "plan", "encode.encode:plan", "settle what encode will make, and print it")
    _add_encoding(command)
    command.add_argument("--tasks", type=positive, default=1, help="number of workers there will be")


def _add_encode(commands: Commands) -> None:
    command = _command(commands, "encode", "encode.encode:encode", "images -> latent shards; run again to resume")
    _add_encoding(command)
    command.add_argument("--task", type=int, default=0, help="this worker's number, from 0")
    command.add_argument("--tasks", type=positive, default=1, help="number of workers")
    command.add_argument("--batch-size", type=positive, default=64, help="images that are encoded at once")
    _add_max_bad(command)


def _add_encoding(command: argparse.ArgumentParser) -> None:
    """All that decides on the bytes."""
    command.add_argument("shards", help="image shards or an index, local or s3://")
    command.add_argument("out", type=_local, help="folder for the latent shards; the same one for all workers")
    command.add_argument(
        "--vae", required=True, help="dct-f8, dct-f32, or folder or hub name of an AutoencoderKL or AutoencoderDC"
    )
    command.add_argument(
        "--image-size",
        type=positive,
        default=argparse.SUPPRESS,  # no default: without it, an error proposes one that fits the images
        help="side of the square images, in pixels: the shorter side is resized to it, then the centre cropped "
        "(required)",
    )
    command.add_argument("--samples-per-shard", type=positive, default=4096, help="samples in a tar")
    command.add_argument("--seed", type=int, default=0, help="of the shuffle at write time")
    command.add_argument(
        "--decoder",
        choices=("auto", "dali", "dali-cpu", "pil"),
        default="auto",
        help="library that decodes the images; auto: DALI, or PIL for adm",
    )
    command.add_argument(
        "--resize", choices=("cubic", "adm"), default="cubic", help="adm: the reference of ADM and DiT, on CPU threads"
    )
    _add_background(command)
    command.add_argument(
        "--device", type=_device, default="auto", help="auto, cpu or cuda; for plan: that of the workers"
    )
    command.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of the autoencoder's arithmetic"
    )
    command.add_argument("--flip", choices=("none", "store"), default="none", help="store: also the mirrored images")


def _add_background(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--background", default="white", help="colour behind transparent pixels: white, black or #rrggbb"
    )


def _add_max_bad(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--max-bad",
        type=float,
        default=1e-3,
        help="share of images that may be left out and listed in errors.jsonl, from 0 to 1",
    )


def _add_status(commands: Commands) -> None:
    command = _command(commands, "status", "encode.status:status", "how far an encoding is: shards, rates, time left")
    command.add_argument("out", type=_local, help="folder of the latent shards")
    command.add_argument("--tasks", type=positive, default=None, help="number of workers: shows the share of each")


def _add_finalize(commands: Commands) -> None:
    command = _command(
        commands, "finalize", "finalize:finalize", "prove that all samples are there, write manifest.json"
    )
    command.add_argument("out", type=_local, help="folder of the latent shards")
    _add_max_bad(command)


def _add_preview(commands: Commands) -> None:
    command = _command(commands, "preview", "inspection:preview", "decode 64 samples into one PNG")
    command.add_argument("folder", type=_local, help="folder of latent shards with a manifest.json")
    command.add_argument("--out", type=_local, required=True, help="the PNG to write")
    command.add_argument("--vae", default=None, help="where the autoencoder is now, if it has moved")


def _add_push(commands: Commands) -> None:
    command = _command(commands, "push", "push:push", "send a finished set to a bucket; run again to resume")
    command.add_argument("folder", type=_local, help="folder of latent or image shards with a manifest.json")
    command.add_argument("url", help="s3://bucket/set, or another fsspec URL")
    command.add_argument("--threads", type=positive, default=8, help="files that are sent at once")
