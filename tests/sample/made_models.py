"""Runs with untrained weights: everything that a user does with a trained model, within seconds."""

import torch

from ecar_dist.kinds.table import kind_of
from ecar_dist.vae.build import open_codec
from tests.runtime.made_runs import DATA, make_checkpoint, make_run

NAMES = ["flags", "faces", "Food, drink", "2019", "twin", "twin", "dogs", "cats", "Über", "nine"]
STEPS = (6, 12)
KINDS = ("ema", "ema1", "master")


def make_model_run(folder, *, names=NAMES, **sections):
    """A run of the smallest ECAR, with checkpoints of two steps that have two EMAs and the raw weights."""
    sections = {"ema": {"half_life_samples": [1000, 2000]}, **sections}
    sections.setdefault("model", {"preset": "T", "patch_size": 1, "ar_depth": 1, "flow_depth": 1})
    run, config = make_run(folder, **sections)
    weights_sha256 = open_codec(config.vae, "cpu").identity.weights_sha256
    identity = {"model": {**config.model_identity, "encoder.weights_sha256": weights_sha256}, "data": DATA}
    for step in STEPS:
        state = {kind: random_weights(config, step + seed) for seed, kind in enumerate(KINDS)}
        notes = {} if names is None else {"class_names": names}
        make_checkpoint(run / "checkpoints", step, state, identity=identity, ema=config.ema, notes=notes)
    return run


def random_weights(config, seed):
    """For every parameter of the config's model; as if trained: none is zero."""
    model = kind_of(config).build_model(config)
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.05 * torch.randn(value.shape, generator=generator) for name, value in model.state_dict().items()}
