"""The losses of `par` and `par_cont`: what they compute, and that a small model memorises 32 images."""

import math

import pytest
import torch
import torch.nn.functional as F

from ecar_dist.config.read import config_from_dict
from ecar_dist.kinds.table import kind_of
from ecar_dist.models.layers import patchify
from ecar_dist.rng import Purpose, normal
from tests.train.test_objective import batch, make_model, objective
from tests.train.test_objective import make_config as make_usual_config

IMAGES = 32
USUAL = {"kind": "par", "ar_depth": 1, "patch_size": 1, "codebook_size": 16, "label_dropout": 0.0}


def make_config(group, model=None):
    return config_from_dict(
        {
            "run": {"name": "test"},
            "model": model or USUAL,
            "par": {"group": group},
            "flow": {"num_stages": 1},
            "vae": {"kind": "dct"},
            "data": {"latents": "none", "num_classes": 10, "latent_channels": 4, "latent_size": 4},
            "train": {"total_samples": 1},
        }
    )


@pytest.mark.parametrize("group", [1, 4])
def test_it_learns_32_images_by_heart(group):
    """Random codes, which can only be memorised: from ln 16 = 2.77 nats to below 0.7."""
    config = make_config(group)
    torch.manual_seed(0)
    kind = kind_of(config)
    compute = kind.objective(kind.build_model(config), lambda values, noise: values, config, "fp32")
    positions = torch.arange(IMAGES)
    latents = normal(1, positions, Purpose.GENERATE_START, (4, 4, 4))
    optimizer = torch.optim.AdamW(compute.parameters(), lr=1e-2, weight_decay=0)
    found = []
    for _ in range(60):
        loss, *_ = compute(latents, positions % 10, positions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[0] == pytest.approx(math.log(16), abs=1e-5)  # logits are zero at the start
    assert found[-1] < 0.7, found[::10]


def test_the_loss_of_codes_is_the_cross_entropy_of_the_models_logits():
    config = make_usual_config("par", num_stages=1)
    model = make_model(config)
    with torch.no_grad():
        _, per_stage, times = objective(config, model)(*batch(range(6)))
        moments, labels, positions = batch(range(6))
        latents = (moments[:, :4].float() + torch.exp(0.5 * moments[:, 4:].float()) * _posterior(positions) - 0.1) * 0.5
        shown = torch.where(_dropped(positions), 10, labels)
        logits, codes = model(patchify(latents, 1), shown)
    expected = F.cross_entropy(logits.transpose(1, 2), codes, reduction="none").mean(1)
    torch.testing.assert_close(per_stage[:, 0], expected)
    assert times.shape == (6, 1)
    assert times.isnan().all()


def _posterior(positions):
    return normal(0, positions, Purpose.POSTERIOR, (4, 8, 8))


def _dropped(positions):
    from ecar_dist.rng import uniform

    return uniform(0, positions, Purpose.LABEL_DROP) < 0.1


def test_residuals_bring_the_codes_nearer_to_the_images():
    """`hybrid` memorises 16 images. Its residuals, drawn from noise, bring its codes closer to them by 3 dB."""
    model = {"kind": "hybrid", "ar_depth": 1, "patch_size": 1, "codebook_size": 16, "label_dropout": 0.0}
    config = make_config(1, model)
    torch.manual_seed(0)
    kind = kind_of(config)
    network = kind.build_model(config)
    compute = kind.objective(network, lambda values, noise: values, config, "fp32")
    positions = torch.arange(16)
    latents = normal(1, positions, Purpose.GENERATE_START, (4, 4, 4))
    tokens = patchify(latents, 1)
    codes, vectors, _ = network.split(tokens)
    network.residual_scale.scale.data.fill_((tokens - vectors).std())
    optimizer = torch.optim.AdamW(compute.parameters(), lr=5e-3, weight_decay=0)
    for step in range(60):
        loss, *_ = compute(latents, positions % 10, positions + 16 * step)  # different masks, noise and times
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        mask = torch.zeros_like(codes, dtype=torch.bool)
        condition = network.conditions(network.hidden(codes, mask, positions % 10), vectors)
        x = normal(2, positions, Purpose.NOISE, tuple(tokens.shape[1:]))
        for step in range(16):
            x = x + network.velocity(x, torch.full((1, 1), step / 16), condition) / 16
        error_on = (network.join(vectors, x) - tokens).square().mean()
        error_off = (vectors - tokens).square().mean()
    assert error_on < 0.5 * error_off
