"""Run directories made without training: checkpoints of given tensors, split as ranks would split them."""

import dataclasses
import json

import torch
import xxhash

from ecar_dist.config.knobs_training import EmaSection
from ecar_dist.config.read import config_from_dict, config_to_yaml
from ecar_dist.runtime.checkpoint.files import MANIFEST, MARKER
from ecar_dist.runtime.checkpoint.manifest import SCHEMA
from ecar_dist.runtime.checkpoint.tensor_file import TensorEntry, write_tensor_file
from ecar_dist.runtime.ema import ema_kinds

DATA = {"dataset_ids": ["sha-of-the-data"], "run.seed": 0}


def make_run(folder, **sections):
    """A run directory with a config and no checkpoint; returns it and the config."""
    tree = {
        "run": {"name": "tiny", "dir": str(folder)},
        "model": {"preset": "T", "patch_size": 1},
        "vae": {"kind": "dct", "downsample": 8},
        "data": {
            "latents": "s3://key:hunter2@bucket/latents",
            "num_classes": 10,
            "latent_channels": 12,
            "latent_size": 4,
        },
        "batch": {"global_batch_size": 16, "micro_batch_size": 4},
        "train": {"total_samples": 16_000},
        "sample": {"steps_per_stage": 2},
    }
    config = config_from_dict({**tree, **{name: {**tree.get(name, {}), **more} for name, more in sections.items()}})
    run = config.run_directory
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(config_to_yaml(config))
    (run / "lineage.json").write_text(json.dumps([{"precision": "fp32", "torch": "2.13.0"}]))
    return run, config


def make_checkpoint(folder, step, state, *, ranks=2, identity=None, batch=16, ema=None, since=None, notes=None):
    """`folder`/step-..., committed. state: kind -> name -> tensor; each rank gets an equal slice of every parameter."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    files = [
        write_tensor_file(path / f"state-{rank:05d}-of-{ranks:05d}.safetensors", _share(state, rank, ranks))
        for rank in range(ranks)
    ]
    first = next(iter(state.values()))
    averages = ema_kinds(ema or EmaSection())
    manifest = {
        "schema": SCHEMA,
        "progress": {"samples_seen": step * batch, "step": step},
        "run": "made",
        "notes": notes or {},
        "averages": averages,
        "averages_since": dict.fromkeys(averages, 0) | (since or {}),
        "identity": identity or {"model": {}, "data": DATA},
        "world_size": ranks,
        "zero_stage": 2,
        "precision": "fp32",
        "shapes": {name: list(value.shape) for name, value in first.items()},
        "files": [
            {**dataclasses.asdict(file), "fragments": _held(first, rank, ranks)} for rank, file in enumerate(files)
        ],
    }
    commit(path, manifest)
    return path


def commit(path, manifest):
    text = json.dumps(manifest)
    (path / MANIFEST).write_text(text)
    (path / MARKER).write_text(xxhash.xxh3_128_hexdigest(text.encode()))


def _pieces(tensors, rank, ranks):
    for name, value in tensors.items():
        share = -(-value.numel() // ranks)
        piece = value.flatten()[rank * share : (rank + 1) * share]
        if piece.numel():
            yield f"{name}:{rank * share}", piece


def _share(state, rank, ranks):
    return [
        TensorEntry(f"{kind}:{key}", torch.float32, tuple(piece.shape), lambda piece=piece: piece)
        for kind, tensors in state.items()
        for key, piece in _pieces(tensors, rank, ranks)
    ]


def _held(tensors, rank, ranks):
    return [f"{key}:{piece.numel()}" for key, piece in _pieces(tensors, rank, ranks)]
