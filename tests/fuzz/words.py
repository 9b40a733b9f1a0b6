"""Commands that work on the artefacts, and the values of a config that overrides may set."""

from __future__ import annotations

from dataclasses import dataclass

from tests.fuzz.artefacts import RUN

OVERRIDDEN = (
    "run.name",
    "run.dir",
    "run.seed",
    "model.kind",
    "model.preset",
    "model.patch_size",
    "model.ar_depth",
    "flow.num_stages",
    "flow.ends",
    "flow.gamma",
    "flow.context.tau",
    "flow.stage_weights",
    "vae.kind",
    "vae.path",
    "vae.downsample",
    "data.latents",
    "data.images",
    "data.mixture",
    "data.num_classes",
    "data.latent_channels",
    "data.latent_size",
    "data.train_images",
    "data.cache.dir",
    "data.cache.gib",
    "data.max_bad",
    "batch.global_batch_size",
    "batch.micro_batch_size",
    "optim.learning_rate",
    "optim.betas",
    "ema.half_life_samples",
    "ema.sigma_rel",
    "deepspeed.zero_stage",
    "deepspeed.raw",
    "deepspeed.raw.bf16",
    "deepspeed.raw.zero_optimization",
    "train.total_samples",
    "train.hang_seconds",
    "train.bad_steps.window",
    "checkpoint.dir",
    "checkpoint.every_samples",
    "checkpoint.keep",
    "sample.guidance_scale",
    "log.every_steps",
)


@dataclass(frozen=True)
class Base:
    words: tuple[str, ...]
    needs: tuple[str, ...]


def _base(line: str, *needs: str) -> Base:
    return Base(tuple(line.split()), needs)


_ENCODED = "--vae dct-f8 --image-size 16 --samples-per-shard 12 --seed 0 --decoder pil --resize cubic --device cpu"
# Commands that would run for longer than a case may last lack an input, so that they end early.
BASES = (
    _base("ecar-dist check config.yaml run.name=x train.total_samples=96", "config.yaml"),
    _base("ecar-dist check config.yaml --job 2 4", "config.yaml"),
    _base("ecar-dist plan config.yaml --world-size 2 --device H100", "config.yaml"),
    _base("ecar-dist train missing.yaml --new-data-order --adopt run.name=x"),
    _base("ecar-dist preflight missing.yaml run.name=x"),
    _base(f"ecar-dist sample {RUN} --labels 0,1 --count 2 --out out --seed 1 --guidance-scale 1.5", "runs"),
    _base("ecar-dist sample export --labels 2 --count 1 --out out --batch-size 2", "export"),
    _base(
        f"ecar-dist evaluate {RUN} --train-images missing --heldout-images images --count 2 --out scores.json", "runs"
    ),
    _base(f"ecar-dist checkpoint list {RUN}", "runs"),
    _base(f"ecar-dist checkpoint verify {RUN}", "runs"),
    _base(f"ecar-dist checkpoint inspect {RUN} --step 4 --json", "runs"),
    _base(f"ecar-dist checkpoint diff {RUN} {RUN}/checkpoints/step-00000004", "runs"),
    _base(f"ecar-dist checkpoint export {RUN} --out out --half-life 100 --dtype bf16 --max-shard-gib 1", "runs"),
    _base(f"ecar-dist checkpoint export {RUN} --sigma-rel 0.1", "runs"),
    _base(
        "ecar-dist submit config.yaml --nodes 2 --min-nodes 1 --gpus-per-node 0 --ranks-per-node 2 --time 1:00:00 "
        "--dry-run --chain 2 --sbatch=--partition=gpu",
        *("config.yaml", "latents"),
    ),
    _base(
        "ecar-dist submit config.yaml --nodes 1 --gpus-per-node 0 --pipeline folder --holdout 0.1 --encode-tasks 2 "
        "--shards shards --encode-option=--flip=store --dry-run",
        *("config.yaml", "folder"),
    ),
    _base(
        "ecar-dist submit config.yaml --nodes 1 --after 12 --launcher srun --max-requeues 3 --dry-run", "config.yaml"
    ),
    _base(f"ecar-dist status {RUN} --json", "runs"),
    _base(f"ecar-dist status {RUN} missing", "runs"),
    _base("ecar-dist tensorboard missing --port 6006 --login host"),
    _base("ecar-dist drill kill-one missing.yaml --ranks 2 --skip s3-503 --json table.json"),
    _base("ecar-data index folder made --label cls --classes classes.txt", "folder", "classes.txt"),
    _base("ecar-data index foreign.tar made --label cls", "foreign.tar"),
    _base("ecar-data shard folder made --holdout 0.2 --shuffle --seed 1 --samples-per-shard 5 --max-bad 0.1", "folder"),
    _base("ecar-data shard foreign.tar made --label none", "foreign.tar"),
    _base(
        "ecar-data train-vae images made --image-size 16 --steps 1 --batch-size 2 --channels 8 --latent-channels 2 "
        "--learning-rate 0.001 --kl-weight 0.001 --device cpu",
        "images",
    ),
    _base(f"ecar-data plan images made {_ENCODED} --tasks 2", "images"),
    _base(f"ecar-data encode images made {_ENCODED} --task 0 --tasks 2 --batch-size 4 --max-bad 0.5", "images"),
    _base(f"ecar-data encode images latents {_ENCODED} --flip none", "images", "latents"),
    _base("ecar-data status latents --tasks 2", "latents"),
    _base("ecar-data finalize latents --max-bad 0.1", "latents"),
    _base("ecar-data verify latents", "latents"),
    _base("ecar-data verify images", "images"),
    _base("ecar-data stats latents", "latents"),
    _base("ecar-data preview latents --out sheet.png --vae dct-f8", "latents"),
    _base("ecar-data push latents memory://pushed/set --threads 2", "latents"),
    _base("ecar-data push images s3://bucket/set", "images"),
)
