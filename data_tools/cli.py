"""`ecar-data`: images -> image shards -> autoencoder -> latent shards. Exit status 1 is an error a user can fix."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ecar_dist.errors import EcarError


def main(argv: Sequence[str] | None = None) -> int:
    values = vars(_parser().parse_args(argv))
    run = values.pop("run")
    try:
        run(**values)
    except EcarError as error:
        if os.environ.get("ECAR_TRACEBACK") == "1":
            raise
        print(f"ecar-data: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ecar-data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_shard(commands)
    _add_train_vae(commands)
    _add_encode(commands)
    _add_inspection(commands)
    return parser


Commands = argparse._SubParsersAction  # argparse has no public name for what add_subparsers returns


def _command(commands: Commands, name: str, run: object, help_text: str) -> argparse.ArgumentParser:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    command = commands.add_parser(name, help=help_text, description=help_text, formatter_class=formatter)
    command.set_defaults(run=run)
    return command


def _add_shard(commands: Commands) -> None:
    command = _command(commands, "shard", _run_shard, "image folder or `digits` -> image shards")
    command.add_argument("source", help="folder with a directory per class, or `digits`")
    command.add_argument("out", type=Path)
    command.add_argument("--holdout", type=float, default=0.0, help="share of each class that goes to OUT/heldout")
    command.add_argument("--seed", type=int, default=0, help="of the choice of held-out images")
    command.add_argument("--samples-per-shard", type=int, default=10_000)


def _add_train_vae(commands: Commands) -> None:
    command = _command(commands, "train-vae", _run_train_vae, "train a small KL autoencoder on image shards")
    command.add_argument("shards", type=Path)
    command.add_argument("out", type=Path, help="folder for the autoencoder")
    command.add_argument("--image-size", type=int, default=32)
    command.add_argument("--downsample", type=int, default=4, help="image pixels per latent pixel side, a power of 2")
    command.add_argument("--latent-channels", type=int, default=4)
    command.add_argument(
        "--channels", type=int, default=16, help="width at full size; deeper levels have up to twice that"
    )
    command.add_argument("--steps", type=int, default=250)
    command.add_argument("--batch-size", type=int, default=32)
    command.add_argument("--learning-rate", type=float, default=2e-3)
    command.add_argument("--kl-weight", type=float, default=1e-3, help="weight of the KL term per latent value")
    command.add_argument("--seed", type=int, default=0)
    # on the CPU, DALI's threads and torch's fight for the cores: measured 3 to 4 times slower steps on 2 cores
    command.add_argument("--decoder", choices=("dali", "pil"), default="pil")
    command.add_argument("--device", default="auto", help="auto, cpu or cuda")


def _add_encode(commands: Commands) -> None:
    command = _command(commands, "encode", _run_encode, "image shards -> latent shards; run again to resume")
    command.add_argument("shards", type=Path)
    command.add_argument("out", type=Path)
    command.add_argument("--vae", required=True, help="dct-f8, dct-f32, or folder or hub name of an AutoencoderKL")
    command.add_argument("--image-size", type=int, default=256)
    command.add_argument("--task", type=int, default=0, help="this worker's number, from 0")
    command.add_argument("--tasks", type=int, default=1, help="number of workers")
    command.add_argument("--samples-per-shard", type=int, default=4096)
    command.add_argument("--seed", type=int, default=0, help="of the shuffle at write time")
    command.add_argument("--batch-size", type=int, default=64)
    command.add_argument("--decoder", choices=("dali", "pil"), default="dali")
    command.add_argument("--device", default="auto", help="auto, cpu or cuda")
    command.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of the autoencoder's arithmetic"
    )
    command.add_argument("--flip", choices=("none", "store"), default="none", help="store: also the mirrored images")


def _add_inspection(commands: Commands) -> None:
    finalize = _command(commands, "finalize", _run_finalize, "prove that all shards are there, write manifest.json")
    finalize.add_argument("out", type=Path)
    verify = _command(commands, "verify", _run_verify, "hashes, structure and decodability of every sample")
    verify.add_argument("folder", type=Path)
    stats = _command(commands, "stats", _run_stats, "what the manifest says")
    stats.add_argument("folder", type=Path)
    preview = _command(commands, "preview", _run_preview, "decode 64 samples into one PNG")
    preview.add_argument("folder", type=Path)
    preview.add_argument("--out", type=Path, required=True, help="the PNG to write")
    preview.add_argument("--vae", default=None, help="where the autoencoder is now, if it has moved")


# The imports below wait for their command: torch, DALI and diffusers take seconds, and --help needs none of them.


def _run_shard(**values: Any) -> None:
    from data_tools.shard import shard

    shard(**values)


def _run_train_vae(**values: Any) -> None:
    from data_tools.train_vae import train_vae

    train_vae(**values)


def _run_encode(**values: Any) -> None:
    from data_tools.encode import encode

    encode(**values)


def _run_finalize(**values: Any) -> None:
    from data_tools.finalize import finalize

    finalize(**values)


def _run_verify(**values: Any) -> None:
    from data_tools.inspection import verify

    verify(**values)


def _run_stats(**values: Any) -> None:
    from data_tools.inspection import stats

    stats(**values)


def _run_preview(**values: Any) -> None:
    from data_tools.inspection import preview

    preview(**values)
