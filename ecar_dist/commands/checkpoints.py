"""`ecar-dist checkpoint`: inspect, verify or export checkpoints. Each verb imports what it needs when it runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecar_dist.command_line import positive
from ecar_dist.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from ecar_dist.runtime.checkpoint.storage import CheckpointStorage


def add_verbs(checkpoint: argparse.ArgumentParser) -> None:
    verbs = checkpoint.add_subparsers(required=True, metavar="VERB")

    def add(name: str, run: Any, help: str, *arguments: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=help, description=help)
        added.set_defaults(run=run)
        for argument in arguments:
            added.add_argument(
                argument.lower(), type=Path, metavar=argument, help="run directory, or folder of a checkpoint"
            )
        if not arguments:
            added.add_argument("run_directory", type=Path, metavar="RUN", help="run directory")
        return added

    # Verbs that read.
    add("list", checkpoint_list, "list the committed checkpoints, newest first")
    add("verify", checkpoint_verify, "check every file of every checkpoint against its hash")
    inspecting = add("inspect", checkpoint_inspect, "print the contents of a checkpoint")
    inspecting.add_argument(
        "--step", type=int, help="optimizer step of the checkpoint (default: the newest complete one)"
    )
    inspecting.add_argument("--json", action="store_true", help="print the manifest of the checkpoint as JSON")
    add("diff", checkpoint_diff, "compare two checkpoints; for a run, its newest one", "A", "B")

    # Export.
    exporting = add("export", checkpoint_export, "write the EMA weights of a checkpoint as safetensors")
    exporting.add_argument("--step", help="optimizer step of the checkpoint or EMA snapshot (default: the newest)")
    exporting.add_argument("--out", type=Path, help="folder to create (default: export in the run directory)")
    wanted = exporting.add_mutually_exclusive_group()
    wanted.add_argument(
        "--half-life",
        type=positive,
        help="half-life of the EMA in samples, computed post hoc if not tracked (default: the first one in the config)",
    )
    wanted.add_argument(
        "--sigma-rel", type=float, help="relative width of a power-function EMA, as in EDM2 (default: use a half-life)"
    )
    wanted.add_argument(
        "--ema",
        metavar="NAME",
        help="weights: ema, ema1, ... of the checkpoint, or raw for the weights without an EMA (default: ema, the "
        "first one)",
    )
    exporting.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="upload the export to this repository on the Hugging Face hub, created as private if new; RUN may then be "
        "an export (default: none)",
    )
    exporting.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="data type of the weights")
    exporting.add_argument("--max-shard-gib", type=float, default=5.0, help="maximum size of one weight file, in GiB")


def checkpoint_list(parsed: argparse.Namespace) -> int:
    from ecar_dist.runtime.checkpoint.files import DamagedError

    storage, names = _committed(parsed.run_directory)
    for name in names:
        # A damaged checkpoint does not hide the others.
        try:
            manifest = storage.manifest(name)
        except DamagedError as damage:
            print(f"{storage.where}/{name}  damaged: {damage.problem}")
            continue

        size = sum(file.bytes for file in manifest.files) / 2**20
        samples = manifest.progress.samples_seen
        print(f"{storage.where}/{name}  {samples:,} samples  {size:.1f} MiB  {len(manifest.files)} files")
    return 0


def checkpoint_inspect(parsed: argparse.Namespace) -> int:
    from ecar_dist.runtime.checkpoint.files import manifest_as_it_is
    from ecar_dist.runtime.checkpoint.inspect import find_checkpoint, inspect_lines

    _refuse_exports(parsed.run_directory)
    path = find_checkpoint(parsed.run_directory, parsed.step)
    print(json.dumps(manifest_as_it_is(path), indent=1) if parsed.json else "\n".join(inspect_lines(path)))
    return 0


def checkpoint_diff(parsed: argparse.Namespace) -> int:
    from ecar_dist.runtime.checkpoint.inspect import diff_checkpoints, find_checkpoint

    _refuse_exports(parsed.a, parsed.b)
    print("\n".join(diff_checkpoints(find_checkpoint(parsed.a), find_checkpoint(parsed.b)).lines))
    return 0


def checkpoint_verify(parsed: argparse.Namespace) -> int:
    from ecar_dist.runtime.checkpoint.files import DamagedError

    # All are verified, even after a damaged one. Those in a bucket are downloaded one at a time.
    damaged = 0
    storage, names = _committed(parsed.run_directory)
    for name in names:
        try:
            storage.fetch(name)
            print(f"{storage.where}/{name}  intact")
        except DamagedError as damage:
            damaged += 1
            print(f"{storage.where}/{name}  damaged: {damage.problem}")
        finally:
            storage.release(name)

    if damaged:
        raise CheckpointError(f"{damaged} of {len(names)} checkpoints are damaged; use an older one, or a backup")
    return 0


def _committed(run: Path) -> tuple[CheckpointStorage, list[str]]:
    """The checkpoint storage of a run, and the names of its checkpoints, newest first.

    Raises ConfigError if it is not a run directory, CheckpointError if there is no checkpoint.
    """
    from ecar_dist.runtime.checkpoint.storage import open_storage
    from ecar_dist.runtime.run.directory import RunDirectory

    _refuse_exports(run)
    storage = open_storage(RunDirectory(run).load_config(), run)
    names = storage.committed()
    if not names:
        raise CheckpointError(f"{storage.where} contains no checkpoint; train first, or wait for the first save")
    return storage, names


def _refuse_exports(*paths: Path) -> None:
    """Raises ConfigError for an export, which has a config.yaml like a run."""
    from ecar_dist.runtime.export.files import is_export

    for path in paths:
        if is_export(path):
            raise ConfigError(f"{path} is an export, which has no checkpoints; give the run that it was made from")


def checkpoint_export(parsed: argparse.Namespace) -> int:
    from ecar_dist.runtime.export.ema import WantedEma
    from ecar_dist.runtime.export.files import is_export
    from ecar_dist.runtime.export.hub import check_hub, push_to_hub
    from ecar_dist.runtime.export.write import export_run
    from ecar_dist.sample.load import find_weights
    from ecar_dist.sample.options import parse_step
    from ecar_dist.sample.parity import parity_report

    # An existing export can still be pushed.
    if parsed.push_to_hub is not None:
        check_hub(parsed.push_to_hub)
    if is_export(parsed.run_directory):
        if parsed.push_to_hub is None:
            raise ConfigError(f"{parsed.run_directory} is an export already; give the run that it was made from")
        print(push_to_hub(parsed.run_directory, parsed.push_to_hub))
        return 0

    # Which weights.
    step = None if parsed.step is None else parse_step(parsed.step)
    run, checkpoint = find_weights(parsed.run_directory, step)
    exported = export_run(
        run,
        parsed.out or run / "export",
        wanted=WantedEma.parse(parsed.ema) if parsed.ema else WantedEma(parsed.half_life, parsed.sigma_rel),
        checkpoint=checkpoint,
        dtype=parsed.dtype,
        max_shard_gib=parsed.max_shard_gib,
    )

    # Compare the export with the checkpoint before anyone uses it.
    print(exported.summary)
    print(parity_report(exported))
    print(exported.path)
    if parsed.push_to_hub is not None:
        print(push_to_hub(exported.path, parsed.push_to_hub))
    return 0
