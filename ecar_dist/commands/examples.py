"""The examples at the end of each command's help, for both programs. tests/commands/test_help.py parses them all."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "ecar-dist init": (
        "ecar-dist init data/latents > mine.yaml",
        "ecar-dist init --slurm slurm --examples configs",
    ),
    "ecar-dist check": ("ecar-dist check mine.yaml train.total_samples=1e6",),
    "ecar-dist plan": ("ecar-dist plan mine.yaml --world-size 64 --device H100",),
    "ecar-dist train": (
        "ecar-dist train mine.yaml",
        "torchrun --nproc-per-node 8 -m ecar_dist train mine.yaml optim.learning_rate=2e-4",
    ),
    "ecar-dist preflight": ("torchrun --nproc-per-node 8 -m ecar_dist preflight mine.yaml",),
    "ecar-dist sample": (
        "ecar-dist sample runs/mine --out samples --labels cats,dogs --count 16",
        "ecar-dist sample runs/mine --out older --step 5000 --ema raw --solver heun --steps-per-stage 4,8,16",
        "ecar-dist sample runs/mine --out sweep --sweep guidance-scale=1,1.5,2,4",
    ),
    "ecar-dist preview": (
        "ecar-dist preview runs/mine",
        "ecar-dist preview runs/mine --watch 60",
    ),
    "ecar-dist evaluate": ("ecar-dist evaluate runs/mine --guidance-scale 1.5 --out scores-1.5.json",),
    "ecar-dist quantize": (
        "ecar-dist quantize runs/mine mine-w8a8 --weights 8 --activations 8",
        "torchrun --nproc-per-node 8 -m ecar_dist quantize runs/mine mine-w4a8 --weights 4 --images 256",
        "ecar-dist quantize runs/mine mine-5-bits --mean-bits 5.0 --sensitivity mine-sensitivity",
    ),
    "ecar-dist sensitivity": (
        "ecar-dist sensitivity runs/mine mine-sensitivity",
        "ecar-dist sensitivity runs/mine mine-sensitivity --task 3 --tasks 16",
    ),
    "ecar-dist checkpoint": (
        "ecar-dist checkpoint list runs/mine",
        "ecar-dist checkpoint export runs/mine",
    ),
    "ecar-dist checkpoint list": ("ecar-dist checkpoint list runs/mine",),
    "ecar-dist checkpoint verify": ("ecar-dist checkpoint verify runs/mine",),
    "ecar-dist checkpoint inspect": ("ecar-dist checkpoint inspect runs/mine --step 5000",),
    "ecar-dist checkpoint diff": ("ecar-dist checkpoint diff runs/mine runs/other",),
    "ecar-dist checkpoint export": (
        "ecar-dist checkpoint export runs/mine --out mine-bf16 --dtype bf16",
        "ecar-dist checkpoint export runs/mine --step 5000 --ema raw --out older",
        "ecar-dist checkpoint export runs/mine --push-to-hub somebody/mine",
    ),
    "ecar-dist submit": (
        "ecar-dist submit mine.yaml --nodes 8 --dry-run",
        "ecar-dist submit mine.yaml --nodes 8 --sbatch=--partition=gpu",
    ),
    "ecar-dist tensorboard": ("ecar-dist tensorboard runs --port 6006",),
    "ecar-dist drill": ("ecar-dist drill all mine.yaml --ranks 2",),
    "ecar-dist status": ("ecar-dist status runs/mine",),
    "ecar-dist compare": ("ecar-dist compare runs/mine runs/other --plot curves.png",),
    "ecar-data prepare": ("ecar-data prepare pictures data --holdout 0.02 --image-size 256",),
    "ecar-data import": ("ecar-data import other/latents data/latents --vae stabilityai/sd-vae-ft-ema",),
    "ecar-data index": ("ecar-data index 's3://bucket/train-{000..123}.tar' data/index",),
    "ecar-data shard": ("ecar-data shard pictures data/images --holdout 0.02",),
    "ecar-data train-vae": ("ecar-data train-vae data/images/train data/vae --latent-channels 4",),
    "ecar-data pyramid-check": ("ecar-data pyramid-check data/images/train --vae data/vae --image-size 32",),
    "ecar-data plan": ("ecar-data plan data/images/train data/latents --vae data/vae --tasks 16",),
    "ecar-data encode": (
        "ecar-data encode data/images/train data/latents --vae stabilityai/sd-vae-ft-ema --image-size 256",
        "ecar-data encode data/images/train data/latents --vae data/vae --task 3 --tasks 16",
    ),
    "ecar-data status": ("ecar-data status data/latents",),
    "ecar-data finalize": ("ecar-data finalize data/latents",),
    "ecar-data fit-codebook": (
        "ecar-data fit-codebook data/latents --size 1024",
        "ecar-data fit-codebook data/latents --size 1024 --hybrid data/images/train",
    ),
    "ecar-data verify": ("ecar-data verify data/latents",),
    "ecar-data stats": ("ecar-data stats data/latents",),
    "ecar-data preview": ("ecar-data preview data/latents --out sheet.png",),
    "ecar-data push": ("ecar-data push data/latents s3://bucket/latents",),
}
