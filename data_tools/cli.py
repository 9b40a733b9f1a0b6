"""`ecar-data`: make latent shards from images and upload them. Exit status 1 is an error that the user can fix."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

from data_tools.options import (
    add_background,
    add_classes,
    add_decoder_tuning,
    add_encoding,
    add_flip,
    add_holdout,
    add_labels,
    add_max_bad,
    add_source,
    add_vae,
    device,
    local,
)
from ecar_dist import __version__
from ecar_dist.command_line import EX_TEMPFAIL, CommandParser, finish_parser, positive, prepare_process, run_command
from ecar_dist.commands.examples import EXAMPLES


def main(argv: Sequence[str] | None = None) -> int:
    if argv is None:
        prepare_process()
    command = _parse(argv)

    def action() -> int:
        command()
        return 0

    return run_command("ecar-data", action)


def run(words: Sequence[str]) -> None:
    """Run one command inside another. Raises its errors."""
    _parse(words)()


def _parse(argv: Sequence[str] | None) -> Callable[[], None]:
    values = vars(_parser().parse_args(argv))
    return functools.partial(COMMANDS[values.pop("command")], **values)


# The commands. Each imports its module only when it runs: importing torch, DALI and diffusers takes seconds, and --help
# needs none of them. The arguments of a command are those of the function that it calls.


def _prepare(**values: Any) -> None:
    from data_tools.prepare import prepare

    prepare(**values)


def _import(**values: Any) -> None:
    from data_tools.foreign.run import import_latents

    import_latents(**values)


def _index(**values: Any) -> None:
    from data_tools.images.index import index

    index(**values)


def _shard(**values: Any) -> None:
    from data_tools.images.shard import shard

    shard(**values)


def _train_vae(**values: Any) -> None:
    from data_tools.autoencoder.train import train_vae

    train_vae(**values)


def _pyramid_check(**values: Any) -> None:
    from data_tools.autoencoder.pyramid_check import pyramid_check

    pyramid_check(**values)


def _plan(**values: Any) -> None:
    from data_tools.encode.settings import plan

    plan(**values)


def _encode(**values: Any) -> None:
    from data_tools.encode.run import encode

    encode(**values)


def _status(**values: Any) -> None:
    from data_tools.encode.status import status

    status(**values)


def _finalize(**values: Any) -> None:
    from data_tools.finalize import finalize

    finalize(**values)


def _fit_codebook(**values: Any) -> None:
    from data_tools.codebook.fit import fit_codebook
    from ecar_dist.runtime.peers import RemoteError

    try:
        fit_codebook(**values)
    except RemoteError as remote:  # the rank that hit the error prints it
        raise SystemExit(EX_TEMPFAIL if remote.again else 1) from None


def _verify(**values: Any) -> None:
    from data_tools.inspection import verify

    verify(**values)


def _stats(**values: Any) -> None:
    from data_tools.inspection import stats

    stats(**values)


def _preview(**values: Any) -> None:
    from data_tools.inspection import preview

    preview(**values)


def _push(**values: Any) -> None:
    from data_tools.push import push

    push(**values)


COMMANDS: dict[str, Callable[..., None]] = {
    "prepare": _prepare,
    "import": _import,
    "index": _index,
    "shard": _shard,
    "train-vae": _train_vae,
    "pyramid-check": _pyramid_check,
    "plan": _plan,
    "encode": _encode,
    "status": _status,
    "finalize": _finalize,
    "fit-codebook": _fit_codebook,
    "verify": _verify,
    "stats": _stats,
    "preview": _preview,
    "push": _push,
}


Subparsers = argparse._SubParsersAction  # argparse has no public name for what add_subparsers returns


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="ecar-data", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    _add_prepare(commands)
    _add_import(commands)
    _add_index(commands)
    _add_shard(commands)
    _add_train_vae(commands)
    _add_pyramid_check(commands)
    _add_plan(commands)
    _add_encode(commands)
    _add_status(commands)
    _add_finalize(commands)
    _add_fit_codebook(commands)
    _add_inspection(commands)
    _add_push(commands)
    finish_parser(parser, EXAMPLES)
    return parser


def _command(commands: Subparsers, name: str, help_text: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=help_text, description=help_text)


def _add_prepare(commands: Subparsers) -> None:
    command = _command(commands, "prepare", "shard, train-vae, encode and finalize in one command; run again to resume")
    add_source(command, ", or an index, or a built-in source such as `digits`", "folder to write, or an unfinished one")
    add_labels(command)
    add_holdout(command, 0.1, "OUT/images/heldout, the rest to OUT/images/train")
    command.add_argument(
        "--vae",
        default="dct-f8",
        help="dct-f8 or dct-f32, which have no weights and give blurry images; identity-f1: the pixels themselves; "
        "folder or hub name of an AutoencoderKL or AutoencoderDC; train: train a small AutoencoderKL on the images",
    )
    command.add_argument("--vae-steps", type=positive, default=250, help="optimizer steps of --vae train")
    command.add_argument("--vae-channels", type=positive, default=4, help="channels of the latents of --vae train")
    command.add_argument(
        "--image-size",
        type=positive,
        default=None,
        help="side of the square images, in pixels (default: the largest power of 2 that is at most the median of "
        "their shorter sides, but at least 4 latent pixels and at most 256 pixels)",
    )
    command.add_argument("--seed", type=int, default=0, help="seed of all steps, an integer")
    add_flip(command)
    add_background(command)
    command.add_argument("--device", type=device, default="auto", help="auto (the GPU if there is one), cpu or cuda")
    add_max_bad(command)


def _add_import(commands: Subparsers) -> None:
    command = _command(commands, "import", "convert latents of another program into latent shards; run again to resume")
    command.add_argument("source", type=local, help="file, folder of files, or class folders with a file per sample")
    command.add_argument("out", type=local, help="folder for the latent shards")
    command.add_argument("--vae", required=True, help="autoencoder that made the latents, as for encode (required)")
    command.add_argument(
        "--scale", type=float, default=1.0, help="factor of the stored values, which are (raw - SHIFT) x SCALE"
    )
    command.add_argument("--shift", type=float, default=0.0, help="value that was subtracted from the raw values")
    command.add_argument(
        "--labels",
        default=None,
        help="for arrays: .npy, .pt or text file of labels; none: one class (default: the labels in the source)",
    )
    add_classes(command)
    command.add_argument("--samples-per-shard", type=positive, default=4096, help="samples per tar")
    command.add_argument("--seed", type=int, default=0, help="seed for the order of the samples, an integer")


def _add_index(commands: Subparsers) -> None:
    command = _command(commands, "index", "record the position, size and label of every image; copies nothing")
    add_source(command, "")
    add_labels(command)
    command.add_argument("--task", type=int, default=0, help="number of this worker, from 0 to TASKS - 1")
    command.add_argument("--tasks", type=positive, default=1, help="workers that share the tars (default: 1)")


def _add_shard(commands: Subparsers) -> None:
    command = _command(commands, "shard", "copy images into image shards; every image is decoded once to check it")
    add_source(command, ", or an index, or a built-in source such as `digits`")
    add_labels(command)
    add_holdout(command, 0.0, "OUT/heldout, the rest to OUT/train")
    command.add_argument("--shuffle", action="store_true", help="shuffle the images, for training on them directly")
    command.add_argument("--seed", type=int, default=0, help="seed for --holdout and --shuffle, an integer")
    command.add_argument("--samples-per-shard", type=positive, default=10_000, help="images per tar")
    add_max_bad(command)


def _add_train_vae(commands: Subparsers) -> None:
    command = _command(commands, "train-vae", "train a small KL autoencoder on image shards; run again to resume")
    command.add_argument("shards", type=local, help="folder of image shards, or an index")
    command.add_argument("out", type=local, help="folder for the autoencoder; must be new, empty or unfinished")
    command.add_argument("--image-size", type=positive, default=32, help="side of the square images, in pixels")
    command.add_argument(
        "--downsample", type=positive, default=4, help="image pixels per side of a latent pixel, a power of 2"
    )
    command.add_argument("--latent-channels", type=positive, default=4, help="channels of the latents")
    command.add_argument(
        "--channels", type=positive, default=16, help="width of the network at full resolution; twice that below it"
    )
    command.add_argument("--steps", type=positive, default=250, help="optimizer steps")
    command.add_argument("--batch-size", type=positive, default=32, help="images per step")
    command.add_argument(
        "--learning-rate", type=float, default=2e-3, help="peak learning rate of the one-cycle schedule"
    )
    command.add_argument("--kl-weight", type=float, default=1e-3, help="weight of the KL divergence per latent value")
    command.add_argument(
        "--seed", type=int, default=0, help="seed for weights, order and posterior samples, an integer"
    )
    # On the CPU, the threads of DALI and torch compete for the cores. Steps on 2 cores were 3 to 4 times slower.
    command.add_argument("--decoder", choices=("dali", "pil"), default="pil", help="library that decodes the images")
    command.add_argument("--device", type=device, default="auto", help="auto (the GPU if there is one), cpu or cuda")
    add_background(command)
    add_max_bad(command)


def _add_pyramid_check(commands: Subparsers) -> None:
    command = _command(
        commands, "pyramid-check", "print for each stage whether the latents of an autoencoder pool like images"
    )
    command.add_argument("source", help="images, as for shard: a folder, tars, image shards, an index or `digits`")
    command.add_argument("--flat", action="store_true", help="treat all images below the folder as one class")
    add_vae(command)
    command.add_argument("--image-size", type=positive, required=True, help="side of the square images (required)")
    command.add_argument("--stages", type=positive, default=3, help="stages of the flow: flow.num_stages of the runs")
    command.add_argument("--count", type=positive, default=256, help="number of images, chosen at random")
    command.add_argument("--device", type=device, default="auto", help="auto (the GPU if there is one), cpu or cuda")
    command.add_argument("--json", dest="as_json", action="store_true", help="print a line of JSON instead of a table")


def _add_plan(commands: Subparsers) -> None:
    command = _command(commands, "plan", "write and print the plan of an encoding, with the command for each task")
    add_encoding(command, "device of the workers: auto (the GPU if this machine has one), cpu or cuda")
    command.add_argument("--tasks", type=positive, default=1, help="number of workers that will encode")


def _add_encode(commands: Subparsers) -> None:
    command = _command(commands, "encode", "encode images into latent shards; run again to resume")
    add_encoding(command, "auto (the GPU if there is one), cpu, cuda or cuda:N")
    command.add_argument("--task", type=int, default=0, help="number of this worker, from 0 to TASKS - 1")
    command.add_argument("--tasks", type=positive, default=1, help="number of workers")
    command.add_argument("--batch-size", type=positive, default=64, help="images per forward pass of the autoencoder")
    add_max_bad(command)


def _add_status(commands: Subparsers) -> None:
    command = _command(commands, "status", "print the progress of an encoding: shards, rates, time left")
    command.add_argument("out", type=local, help="folder of the latent shards")
    command.add_argument(
        "--tasks", type=positive, default=None, help="number of workers; prints one line for each (default: no lines)"
    )


def _add_finalize(commands: Subparsers) -> None:
    command = _command(commands, "finalize", "check that the latent shards are complete, and write manifest.json")
    command.add_argument("out", type=local, help="folder of the latent shards")
    add_max_bad(command)


def _add_fit_codebook(commands: Subparsers) -> None:
    command = _command(
        commands,
        "fit-codebook",
        "fit a codebook to a finished set, for model.kind=par and hybrid; also runs under torchrun or srun",
    )
    command.add_argument("out", type=local, help="folder of latent shards with a manifest.json")
    command.add_argument(
        "--size", type=positive, required=True, help="number of codes: model.codebook_size of the runs (required)"
    )
    command.add_argument(
        "--patch-size", type=positive, default=2, help="side of a token in latent pixels: model.patch_size of the runs"
    )
    command.add_argument("--iterations", type=positive, default=20, help="k-means passes at most; may stop earlier")
    command.add_argument(
        "--max-samples", type=positive, default=20_000, help="samples to read, an equal share of each shard"
    )
    command.add_argument("--seed", type=int, default=0, help="seed of the initial codes and of --hybrid, an integer")
    add_decoder_tuning(command)


def _add_inspection(commands: Subparsers) -> None:
    for name, help_text in (
        ("verify", "check hashes, structure and every sample of latent or image shards"),
        ("stats", "print the manifest of latent shards"),
    ):
        command = _command(commands, name, help_text)
        command.add_argument("folder", type=local, help="folder with a manifest.json")
    command.add_argument(
        "--spectrum",
        action="store_true",
        help="also print the largest eigenvalues of the latents, and a forecast of the calls that they need in 1, 2 "
        "and 3 stages; takes seconds to a minute",
    )
    command = _command(commands, "preview", "decode 64 samples into one image")
    command.add_argument("folder", type=local, help="folder of latent shards with a manifest.json")
    command.add_argument("--out", type=local, required=True, help="image to write, e.g. sheet.png (required)")
    command.add_argument(
        "--vae",
        default=None,
        help="dct-f8, dct-f32, identity-f1, or folder or hub name of the autoencoder (default: that of the manifest)",
    )


def _add_push(commands: Subparsers) -> None:
    command = _command(commands, "push", "upload a finished set to a bucket; run again to resume")
    command.add_argument("folder", type=local, help="folder of latent or image shards with a manifest.json")
    command.add_argument("url", help="s3://bucket/set, or another fsspec URL")
    command.add_argument("--threads", type=positive, default=8, help="files to upload in parallel")
