"""`ecar-dist`: parse, build, call. Every command imports what it needs when it runs, so --help and check are instant.

Exit status: 0 done; 1 an error the user can fix, one line on stderr; 75 stopped early on a signal with a committed
checkpoint (EX_TEMPFAIL: run the same command again).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ecar_dist.command_line import EX_TEMPFAIL, run_command
from ecar_dist.config_file import config_to_yaml, load_config
from ecar_dist.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from ecar_dist.evaluate.score import LabelledImages
    from ecar_dist.sample.load import TrainedModel


def entry() -> NoReturn:
    """The console script: `main`, then out at once.

    When a rank's work is done and on disk, the interpreter's teardown of communication threads can still abort the
    process (SIGABRT, about once in 15 CPU runs), and the launcher would take the whole job for failed.
    """
    status = main()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = _parser().parse_args(arguments)
    return run_command("ecar-dist", lambda: parsed.run(parsed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ecar-dist", description="Train, sample and score ECAR image generators.")
    # The deepspeed launcher passes this to whatever it starts; the rank is read from LOCAL_RANK, under every launcher.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help)
        added.set_defaults(run=run)
        return added

    for name, run, help in (
        ("check", check, "validate a config and print its arithmetic (no torch)"),
        ("plan", plan, "parameters, FLOPs, memory per rank, time and checkpoint size (no torch)"),
        ("train", train, "train, or go on training: alone, or under torchrun, deepspeed or srun"),
    ):
        with_config = command(name, run, help)
        with_config.add_argument("config", help="YAML file of the run")
        with_config.add_argument("overrides", nargs="*", metavar="a.b=c", help="overrides of single config values")
        if name == "plan":
            with_config.add_argument("--world-size", type=_positive, default=8, help="ranks (default 8)")
            with_config.add_argument("--device", help="A100, H100 or H200: adds a time estimate")
        if name == "train":
            with_config.add_argument(
                "--new-data-order", action="store_true", help="go on although the data, or their order, have changed"
            )

    drawing = command("sample", sample, "draw images with the EMA weights of a run or an export")
    drawing.add_argument("--labels", help="class numbers, e.g. 0,1,2 (default: all)")
    drawing.add_argument("--count", type=_positive, help="images in all, over the labels in turn (default: 8 of each)")
    drawing.add_argument("--out", required=True, type=Path, help="folder for grid.png, stages.png and images/")

    scoring = command("evaluate", evaluate, "score samples against held-out real images; writes scores.json")
    scoring.add_argument("--train-images", help="image shards that train the classifier (default: data.train_images)")
    scoring.add_argument("--heldout-images", help="image shards to compare with (default: data.heldout_images)")
    scoring.add_argument("--count", type=_positive, help="samples to draw (default: as many as there are train images)")
    scoring.add_argument("--out", type=Path, help="file for the scores (default: scores.json in the run)")
    for sampling in (drawing, scoring):
        sampling.add_argument("run_or_export", type=Path, metavar="RUN|EXPORT")
        sampling.add_argument("--seed", type=int, default=0)
        sampling.add_argument("--guidance-scale", type=float, help="default: sample.guidance_scale of the run")
        sampling.add_argument("--batch-size", type=_positive, default=64)

    _add_checkpoint_verbs(commands.add_parser("checkpoint", help="look into a run's checkpoints, or export one"))

    drilling = command(
        "drill", drill, "let a fault strike a small copy of a run, and see whether it survives as promised"
    )
    drilling.add_argument("names", metavar="NAME", help="all, one drill, or several with commas")
    drilling.add_argument("config", type=Path, help="YAML file of the run")
    drilling.add_argument("overrides", nargs="*", metavar="a.b=c", help="overrides of single config values")
    drilling.add_argument("--ranks", type=_positive, default=2, help="processes to start (default 2)")
    drilling.add_argument("--keep", type=Path, help="folder for the runs and their logs (default: removed at the end)")
    drilling.add_argument("--skip", default="", help="drills to leave out, with commas")
    drilling.add_argument("--json", type=Path, help="file for the table as JSON")
    drilling.add_argument("--markdown", type=Path, help="file for the table as Markdown")
    return parser


def _add_checkpoint_verbs(checkpoint: argparse.ArgumentParser) -> None:
    verbs = checkpoint.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, run: Any, help: str, *places: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=help, description=help)
        added.set_defaults(run=run)
        for place in places or ("RUN",):
            added.add_argument("run_directory" if place == "RUN" else place.lower(), type=Path, metavar=place)
        return added

    verb("list", checkpoint_list, "committed checkpoints, newest first")
    verb("verify", checkpoint_verify, "check every file of every checkpoint against its hash")
    inspecting = verb("inspect", checkpoint_inspect, "what a checkpoint holds")
    inspecting.add_argument("--step", type=int, help="default: the newest whole one")
    inspecting.add_argument("--json", action="store_true", help="its manifest as it is")
    verb("diff", checkpoint_diff, "how two checkpoints differ: each a run (its newest one) or a checkpoint", "A", "B")
    exporting = verb("export", checkpoint_export, "an average of the newest checkpoint's weights as safetensors")
    exporting.add_argument("--out", type=Path, help="folder to make (default: export in the run directory)")
    wanted = exporting.add_mutually_exclusive_group()
    wanted.add_argument("--half-life", type=_positive, help="in samples; one that was not tracked is fitted post hoc")
    wanted.add_argument("--sigma-rel", type=float, help="the same, by relative width (EDM2)")
    exporting.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    exporting.add_argument("--max-shard-gib", type=float, default=5.0, help="of one file of weights (default 5)")


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


def check(parsed: argparse.Namespace) -> int:
    from ecar_dist.flow.schedule import StageSchedule

    config = load_config(parsed.config, parsed.overrides)
    schedule = StageSchedule(config.flow.resolved_ends, config.flow.gamma)
    print(config_to_yaml(config))
    for k, (size, tokens) in enumerate(zip(config.stage_sizes, config.stage_tokens, strict=True)):
        window = f"[{schedule.starts[k]:.4f}, {schedule.ends[k]:.4f}]"
        print(f"# stage {k}: {size}x{size} latent, {tokens} tokens, data coefficient {window}")
    batch = config.batch
    print(f"# {config.total_steps:,} steps of {batch.global_batch_size} samples; micro-batches on R ranks:")
    for world_size in (2**power for power in range(11)):
        if batch.global_batch_size % (batch.micro_batch_size * world_size) == 0:
            print(
                f"#   R = {world_size}: {batch.global_batch_size} = {batch.micro_batch_size} x "
                f"{config.grad_accum_steps(world_size)} x {world_size}"
            )
    return 0


def plan(parsed: argparse.Namespace) -> int:
    from ecar_dist.plan.report import plan_lines

    print("\n".join(plan_lines(load_config(parsed.config, parsed.overrides), parsed.world_size, parsed.device)))
    return 0


def train(parsed: argparse.Namespace) -> int:
    try:
        config = load_config(parsed.config, parsed.overrides)
    except ConfigError:
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":  # all ranks read this file; one says so
            raise
        return 1
    from ecar_dist.plan.flops import FLOPS_PER_MAC
    from ecar_dist.plan.report import training_macs
    from ecar_dist.runtime.parent_death import die_with_parent
    from ecar_dist.runtime.peers import RemoteError, lost_peer
    from ecar_dist.runtime.stop import StoppedEarlyError
    from ecar_dist.runtime.watchdog import longest_wait
    from ecar_dist.runtime.world import COLLECTIVE_TIMEOUT, start_world, stop_world
    from ecar_dist.sample.preview import make_preview
    from ecar_dist.train.loop import train as run_training
    from ecar_dist.train.start import start_training

    if _is_launched():
        die_with_parent()
    world = start_world(collective_timeout=longest_wait(config.train.hang_seconds, COLLECTIVE_TIMEOUT))
    try:
        with contextlib.ExitStack() as ends:
            run, progress = start_training(
                config,
                world,
                ends,
                training_flops_per_sample=FLOPS_PER_MAC * training_macs(config),
                preview_factory=make_preview,
                allow_new_data=parsed.new_data_order,
            )
            end = run_training(run, progress)
        finished = end.samples_seen >= config.train.total_samples
        if world.is_first:
            print(f"{'done' if finished else 'stopped on a signal'} at step {end.step:,}: {config.run_directory}")
    except RemoteError:
        return 1
    except StoppedEarlyError as stopped:
        print(f"ecar-dist: {stopped}; run the same command again", file=sys.stderr)
        return EX_TEMPFAIL
    except RuntimeError as error:
        if (said := lost_peer(error)) is None:
            raise
        print(f"ecar-dist: rank {world.rank} lost another rank ({said}); run the same command again", file=sys.stderr)
        return 1
    stop_world()
    return 0 if finished else EX_TEMPFAIL


def _is_launched() -> bool:
    """Whether torchrun, deepspeed or srun started this process as one of several."""
    return "RANK" in os.environ or "SLURM_PROCID" in os.environ


def sample(parsed: argparse.Namespace) -> int:
    from PIL import Image

    from ecar_dist.sample.pictures import decode_stages, labelled_grid
    from ecar_dist.sample.preview import SMALLEST_SIDE, stage_strip

    if parsed.out.exists() and any(parsed.out.iterdir()):
        raise ConfigError(f"{parsed.out} is not empty; choose another --out, or remove it")
    trained = _open(parsed)
    classes = _labels(parsed.labels, trained.config.data.num_classes)
    count = parsed.count or 8 * len(classes)
    labels = [classes[i % len(classes)] for i in range(count)]
    columns: dict[int, list[Any]] = {label: [] for label in classes}
    first_stages: list[Any] = []
    (parsed.out / "images").mkdir(parents=True)
    done = 0
    for stages in _draw(trained, parsed, labels):
        pictures = decode_stages(trained.codec, stages)
        first_stages = first_stages or [stage[: len(classes)] for stage in pictures]
        for picture in pictures[-1]:
            Image.fromarray(picture).save(parsed.out / "images" / f"{done:06d}-class{labels[done]}.png")
            columns[labels[done]].append(picture)
            done += 1
    scale = max(1, SMALLEST_SIDE // first_stages[-1].shape[1])
    drawn = [label for label in classes if columns[label]]  # fewer images than classes leave some out
    grid = labelled_grid([columns[label] for label in drawn], [str(label) for label in drawn], scale)
    Image.fromarray(grid).save(parsed.out / "grid.png")
    Image.fromarray(stage_strip(first_stages)).save(parsed.out / "stages.png")
    print(f"{done} images of {trained.source}: {parsed.out / 'grid.png'}, {parsed.out / 'stages.png'}")
    return 0


def evaluate(parsed: argparse.Namespace) -> int:
    from ecar_dist.evaluate.images import read_images, reconstruct
    from ecar_dist.evaluate.score import score
    from ecar_dist.runtime.metrics import log_scores
    from ecar_dist.runtime.run_directory import RunDirectory
    from ecar_dist.storage.atomic import write_json

    trained = _open(parsed)
    config = trained.config
    folders = {
        "--train-images": parsed.train_images or config.data.train_images,
        "--heldout-images": parsed.heldout_images or config.data.heldout_images,
    }
    for flag, folder in folders.items():
        if folder is None:
            raise ConfigError(f"evaluate needs real images: give {flag} or set data.{flag[2:].replace('-', '_')}")
    size = config.data.latent_size * trained.codec.identity.downsample
    (real, source), (heldout, _) = (read_images(str(folder), size) for folder in folders.values())
    if real.labels.max() >= config.data.num_classes:
        raise DataError(
            f"{folders['--train-images']} has label {real.labels.max()}, the model knows 0.."
            f"{config.data.num_classes - 1}; give images of its classes"
        )
    labels = [int(real.labels[i % len(real.labels)]) for i in range(parsed.count or len(real.labels))]
    samples = _drawn_images(trained, parsed, labels)
    scores = score(samples, reconstruct(trained.codec, real, trained.device), real, heldout, source)
    scale = config.sample.guidance_scale if parsed.guidance_scale is None else parsed.guidance_scale
    scores.update(
        guidance_scale=scale, seed=parsed.seed, model=str(trained.source), samples_seen=trained.progress.samples_seen
    )
    out = parsed.out or parsed.run_or_export / "scores.json"
    print(json.dumps(scores, indent=1))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, scores)
    if (directory := RunDirectory(parsed.run_or_export)).lineage.exists():
        log_scores(directory, trained.progress.step, scores)
    print(f"scores written to {out}")
    return 0


def checkpoint_list(parsed: argparse.Namespace) -> int:
    from ecar_dist.runtime.checkpoint_files import read_manifest

    for path in _committed(parsed.run_directory):
        manifest = read_manifest(path)
        size = sum(entry["bytes"] for entry in manifest["files"]) / 2**20
        print(
            f"{path}  {manifest['progress']['samples_seen']:,} samples  {size:.1f} MiB  {len(manifest['files'])} files"
        )
    return 0


def checkpoint_inspect(parsed: argparse.Namespace) -> int:
    from ecar_dist.runtime.checkpoint_files import read_manifest
    from ecar_dist.runtime.checkpoint_report import find_checkpoint, inspect_lines

    path = find_checkpoint(parsed.run_directory, parsed.step)
    print(json.dumps(read_manifest(path), indent=1) if parsed.json else "\n".join(inspect_lines(path)))
    return 0


def checkpoint_diff(parsed: argparse.Namespace) -> int:
    from ecar_dist.runtime.checkpoint_diff import diff_checkpoints
    from ecar_dist.runtime.checkpoint_report import find_checkpoint

    print("\n".join(diff_checkpoints(find_checkpoint(parsed.a), find_checkpoint(parsed.b)).lines))
    return 0


def checkpoint_verify(parsed: argparse.Namespace) -> int:
    from ecar_dist.runtime.checkpoint_files import verify

    damaged = 0
    for path in _committed(parsed.run_directory):
        try:
            verify(path)
            print(f"{path}  whole")
        except CheckpointError as error:
            damaged += 1
            print(f"ecar-dist: {error}", file=sys.stderr)
    return 1 if damaged else 0


def _committed(run: Path) -> list[Path]:
    """The committed checkpoints of a run, newest first. Raises ConfigError or CheckpointError where there are none."""
    from ecar_dist.runtime.checkpoint_files import committed
    from ecar_dist.runtime.run_directory import RunDirectory

    directory = RunDirectory(run)
    directory.load_config()
    found = committed(directory.checkpoints)
    if not found:
        raise CheckpointError(f"{directory.checkpoints} holds no checkpoint; train first, or wait for the first save")
    return found


def checkpoint_export(parsed: argparse.Namespace) -> int:
    from ecar_dist.runtime.averages import Wanted
    from ecar_dist.runtime.export import export_run
    from ecar_dist.sample.parity import parity_report

    exported = export_run(
        parsed.run_directory,
        parsed.out or parsed.run_directory / "export",
        wanted=Wanted(parsed.half_life, parsed.sigma_rel),
        dtype=parsed.dtype,
        max_shard_gib=parsed.max_shard_gib,
    )
    print(exported.summary)
    print(parity_report(exported))
    print(exported.path)
    return 0


def drill(parsed: argparse.Namespace) -> int:
    from ecar_dist.drills.run import run_drills

    return run_drills(
        parsed.names.split(","),
        parsed.config,
        parsed.overrides,
        ranks=parsed.ranks,
        keep=parsed.keep,
        skip=parsed.skip.split(",") if parsed.skip else (),
        json_file=parsed.json,
        markdown_file=parsed.markdown,
    )


def _open(parsed: argparse.Namespace) -> TrainedModel:
    import torch

    from ecar_dist.sample.load import open_trained

    return open_trained(parsed.run_or_export, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _labels(text: str | None, num_classes: int) -> list[int]:
    try:
        classes = list(range(num_classes)) if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--labels {text!r} must be class numbers with commas, e.g. 0,1,2") from None
    outside = [label for label in classes if not 0 <= label < num_classes]
    if outside:
        raise ConfigError(
            f"--labels {outside[0]} is outside 0..{num_classes - 1}; the model knows {num_classes} classes"
        )
    return classes


def _draw(trained: TrainedModel, parsed: argparse.Namespace, labels: list[int]) -> Any:
    """Stages of batch after batch, with a progress bar."""
    import torch
    from tqdm import tqdm

    from ecar_dist.sample.generate import SamplingPlan, generate_in_batches

    settings = SamplingPlan.from_config(trained.config, trained.device, guidance_scale=parsed.guidance_scale)
    wanted = torch.tensor(labels, device=trained.device)
    with tqdm(total=len(labels), unit="image", desc="sampling", mininterval=2) as bar:
        for stages in generate_in_batches(trained.model, settings, wanted, parsed.seed, parsed.batch_size):
            yield stages
            bar.update(stages[-1].shape[0])


def _drawn_images(trained: TrainedModel, parsed: argparse.Namespace, labels: list[int]) -> LabelledImages:
    import numpy as np

    from ecar_dist.evaluate.score import LabelledImages
    from ecar_dist.vae.pixels import to_pixels

    pixels = [to_pixels(trained.codec.decode(stages[-1])) for stages in _draw(trained, parsed, labels)]
    return LabelledImages(np.concatenate(pixels), np.array(labels))
