"""Encoding in separate processes that die at a chosen place, or race each other."""

import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Barrier
from typing import Any

import torch

from data_tools.autoencoder import steps as training_steps
from data_tools.autoencoder import train
from data_tools.cli import main
from data_tools.encode import commit
from data_tools.encode import plan as encode_plan
from data_tools.encode import settings as encode_settings
from data_tools.finalize import finalize
from ecar_dist.data.shards import write as shard_writer
from ecar_dist.vae.dct import DctCodec
from tests.data_tools.image_folders import encode_small
from tests.fork_server import CONTEXT

SHARD = 2  # the shard at which a worker dies


def start(target: Callable[..., None], *values: object) -> BaseProcess:
    process = CONTEXT.Process(target=target, args=values)
    process.start()
    return process


def ecar_data() -> None:
    """`ecar-data` with the arguments of the process, for the ranks of `run_ranks`."""
    raise SystemExit(main(sys.argv[1:]))


def die_at(place: str, images: Path, out: Path, settings: dict[str, Any]) -> None:
    """Encode and finalize; SIGKILL to itself at `place`, one of PLACES."""
    PLACES[place]()
    encode_small(images, out, **settings)
    finalize(out, max_bad=1.0)


def die_in_training(step: int, arguments: list[str]) -> None:
    """`ecar-data train-vae` that saves after each step; SIGKILL to itself before its step `step`."""
    training_steps._SAVE_SECONDS = 0.0
    training_steps.time = Ticking()  # type: ignore[assignment]
    original = train._step
    steps = iter(range(1_000_000))

    def deadly(*values: Any, **more: Any) -> Any:
        if next(steps) == step:
            _die()
        return original(*values, **more)

    train._step = deadly
    main(arguments)


class Ticking:
    """A clock that stands still: writing a state takes no time, so the next one is due at once."""

    @staticmethod
    def monotonic() -> float:
        return 0.0


def race(barrier: Barrier, offset: float, images: Path, out: Path) -> None:
    """Encode with an autoencoder that adds `offset`; each shard is written at the same time as the other worker's."""

    class Shifted(DctCodec):
        def encode(self, batch: torch.Tensor) -> torch.Tensor:
            return super().encode(batch) + offset

    def write_together(*values: Any) -> Any:
        barrier.wait(timeout=60)
        return original(*values)

    original, commit.write_latent_shard = commit.write_latent_shard, write_together
    encode_settings.open_codec_by_spec = lambda *_: Shifted(8, torch.device("cpu"))
    encode_small(images, out)


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _of_the_shard(*values: Any) -> bool:
    return any(str(value).endswith(f"{SHARD:06d}.tar") for value in values)


def _replacing(name: str) -> Callable[..., bool]:
    return lambda source, target, **_: Path(target).name == name


def _kill(owner: Any, name: str, *, when: Callable[..., bool] = lambda *_: True, after: bool = False) -> Any:
    """Make the calls of `owner.name` that `when` picks kill the process, before their work or after it."""

    def arm() -> None:
        original = getattr(owner, name)

        def deadly(*values: Any, **named: Any) -> Any:
            chosen = when(*values, **named)
            if chosen and not after:
                _die()
            result = original(*values, **named)
            if chosen:
                _die()
            return result

        setattr(owner, name, deadly)

    return arm


def _nth(number: int) -> Callable[..., bool]:
    calls = iter(range(1_000_000))
    return lambda *_: next(calls) == number


def _plan_of_two_halves() -> None:
    """Dies with half a plan under its temporary name."""

    def half(path: Path, tree: object) -> None:
        path.write_text(repr(tree)[:100])
        _die()

    encode_plan.write_json = half


PLACES = {
    "mid plan": _plan_of_two_halves,
    "plan without its name": _kill(encode_plan, "claim_name"),
    "before the temporary": _kill(commit, "write_latent_shard", when=lambda _, index, *__: index == SHARD),
    "mid temporary": _kill(shard_writer, "_add", when=_nth(25)),
    "after the temporary": _kill(shard_writer, "claim_name", when=_of_the_shard),
    "after the tar has its name": _kill(shard_writer, "claim_name", when=_of_the_shard, after=True),
    "before the index": _kill(shard_writer, "write_dali_index", when=lambda path, _: path.stem == f"{SHARD:06d}"),
    "after the index": _kill(
        shard_writer, "write_dali_index", when=lambda path, _: path.stem == f"{SHARD:06d}", after=True
    ),
    "before the marker has its name": _kill(os, "replace", when=_replacing(f"{SHARD:06d}.json")),
    "after the marker": _kill(os, "replace", when=_replacing(f"{SHARD:06d}.json"), after=True),
    "before the list of errors": _kill(os, "replace", when=_replacing("errors.jsonl")),
    "before the manifest": _kill(os, "replace", when=_replacing("manifest.json")),
}
