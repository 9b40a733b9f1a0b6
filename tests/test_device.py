"""What must be equal on every device: random numbers, the objective and its gradients, samples, refused steps, resume.

`ECAR_TEST_DEVICE=cuda` compares a GPU with the CPU. By default the CPU is compared with itself, which keeps these tests
working. Only those of refused steps and of resume can then find a fault.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ecar_dist.config.read import config_from_dict
from ecar_dist.kinds.table import KINDS, kind_of
from ecar_dist.models.tokens.codebook import CODEBOOK, RESIDUAL_SCALE
from ecar_dist.rng import Purpose, normal, uniform
from ecar_dist.runtime.optimizer import ADAM_MOMENTS
from ecar_dist.runtime.start.rendezvous import start_world, stop_world
from ecar_dist.sample.generate import generate
from ecar_dist.sample.preview import StripPreview
from ecar_dist.sample.sampling_plan import SamplingPlan
from ecar_dist.train.loop import train
from ecar_dist.train.start import build_engine, start_training
from tests.conftest import free_port, losses
from tests.fork_server import run_ranks

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

CPU, DEVICE = torch.device("cpu"), torch.device(os.environ.get("ECAR_TEST_DEVICE", "cpu"))
BATCH, CHANNELS, SIDE, CLASSES = 4, 4, 8, 10
ROUNDING = 1e-4  # relative, in L2: fp32, sums in a different order


def make_config(kind="ecar", **sections):
    return config_from_dict(
        {
            "run": {"name": "device"},
            "model": {"kind": kind, "preset": "T", "patch_size": 2},
            "flow": {"num_stages": 2 if kind in ("ecar", "pyramid") else 1},
            "vae": {"kind": "dct", "downsample": 8},
            "data": {"latents": "none", "num_classes": CLASSES, "latent_channels": CHANNELS, "latent_size": SIDE},
            "batch": {"global_batch_size": BATCH, "micro_batch_size": BATCH},
            "train": {"total_samples": 1000},
            "sample": {"steps_per_stage": 2, "guidance_scale": 2.0},
            **sections,
        }
    )


def make_model(config, device):
    """No weight is zero, so that every part of the network counts."""
    torch.manual_seed(0)
    model = kind_of(config).build_model(config)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model.to(device)


def batch_on(device):
    positions = torch.arange(BATCH, device=device)
    values = normal(1, torch.arange(BATCH), Purpose.POSTERIOR, (CHANNELS, SIDE, SIDE)).to(device)
    return values, positions % CLASSES, positions


def distance(found, expected):
    found, expected = (
        torch.cat([part.detach().cpu().double().flatten() for part in parts]) for parts in (found, expected)
    )
    return float((found - expected).norm() / expected.norm())


def test_random_numbers_are_those_of_the_cpu():
    """The words are equal bit for bit, and so are uniform numbers; normal ones as far as log, sine and cosine are."""
    positions = torch.tensor([0, 1, 77, 2**31, 2**40 + 5])
    for purpose, stream in ((Purpose.NOISE, 0), (Purpose.TIME, 2)):
        draws = [uniform(7, positions.to(device), purpose, (4, 33), stream=stream).cpu() for device in (CPU, DEVICE)]
        assert torch.equal(*draws)
        draws = [normal(7, positions.to(device), purpose, (4, 33), stream=stream).cpu() for device in (CPU, DEVICE)]
        torch.testing.assert_close(*draws, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_cpu(kind):
    config = make_config(kind)
    found = []
    for device in (CPU, DEVICE):
        model = make_model(config, device)
        objective = kind_of(config).objective(model, lambda values, _: values, config, "fp32")
        loss, per_stage, _ = objective(*batch_on(device))
        loss.backward()
        trained = [one for name, one in model.named_parameters() if name not in (CODEBOOK, RESIDUAL_SCALE)]
        found.append([[per_stage], [parameter.grad for parameter in trained]])
    (cpu_losses, cpu_gradients), (device_losses, device_gradients) = found
    assert distance(device_losses, cpu_losses) < ROUNDING
    assert distance(device_gradients, cpu_gradients) < ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_of_the_cpu(kind):
    config = make_config(kind)
    drawn = []
    for device in (CPU, DEVICE):
        plan = SamplingPlan.from_config(config, CPU)  # fp32 on both
        indices = torch.arange(BATCH, device=device)
        drawn.append(generate(make_model(config, device).eval(), plan, indices % CLASSES, indices, 0))
    assert distance(drawn[1], drawn[0]) < ROUNDING


def report_steps():
    """The main of a separate process with a world: writes what its steps did to the file given as its argument."""
    from synthetic_run import write_latents

    path = Path(sys.argv[1])
    world = start_world()
    write_latents(path.parent / "latents", SIDE)
    refusals = {str(zero_stage): refuse_a_step(world, zero_stage) for zero_stage in range(4)}
    once = train_to(world, path.parent, "once", 6)
    resumed = [train_to(world, path.parent, "resumed", steps) for steps in (3, 6)][-1]
    stop_world()
    path.write_text(json.dumps({"refusals": refusals, "once": once, "resumed": resumed}))


def refuse_a_step(world, zero_stage):
    """A good step, one with a NaN, a good one: was each applied, and did it move weights or moments?"""
    config = make_config(deepspeed={"zero_stage": zero_stage})
    engine = build_engine(config, lambda values, _: values, world, config.precision_on(world.device.type))

    def state():
        moments = [moment for name in ADAM_MOMENTS for moment in engine.moments(name)]
        return [tensor.detach().clone() for tensor in (*engine.partitions, *moments)]

    applied, moved = [], []
    for factor in (1.0, math.nan, 1.0):
        before = state()
        loss = engine(*batch_on(world.device))[0] * factor
        engine.backward(loss)
        applied.append(engine.step(loss.detach().double().view(1)).read().applied)
        moved.append(not all(torch.equal(a, b) for a, b in zip(before, state(), strict=True)))
    return [applied, moved]


def train_to(world, folder, name, steps):
    """The losses of a run in fp32 up to this step. It continues from its last checkpoint."""
    from synthetic_run import run_config

    sections = {"log": {"every_steps": 1, "tensorboard": False}, "deepspeed": {"precision": "fp32"}}
    config = run_config(folder, name, "T", SIDE, BATCH, **sections, train={"total_samples": steps * BATCH})
    with contextlib.ExitStack() as ends:
        train(*start_training(config, world, ends, training_flops_per_sample=1.0, preview_factory=StripPreview))
    return losses(json.loads(line) for line in (config.run_directory / "metrics.jsonl").read_text().splitlines())


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """What `report_steps` reports. A fork could not use the GPU."""
    path = tmp_path_factory.mktemp("device") / "report.json"
    if DEVICE == CPU:
        (done,) = run_ranks(1, free_port(), str(path), main=report_steps)
    else:
        command = [sys.executable, "-c", "from tests.test_device import report_steps; report_steps()", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())


def test_a_step_with_a_nan_moves_nothing(steps):
    """Neither weights nor moments change by a bit, in any ZeRO stage. The steps before and after it move them."""
    assert steps["refusals"] == {str(zero_stage): [[True, False, True]] * 2 for zero_stage in range(4)}


def test_the_first_loss_after_a_resume_is_equal_to_the_bit(steps):
    """It depends only on what was restored. Later ones also depend on the order in which the device adds."""
    assert len(steps["once"]) == 6
    assert steps["resumed"][3] == steps["once"][3]
    assert steps["resumed"] == pytest.approx(steps["once"], rel=0 if DEVICE == CPU else 1e-4, abs=0)
