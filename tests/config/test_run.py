"""The rules between the sections of RunConfig, and the numbers that follow from them."""

import subprocess
import sys
from pathlib import Path

import pytest

from ecar_dist.config.read import config_from_dict, load_config
from ecar_dist.errors import ConfigError

SHIPPED = sorted(Path(__file__).parents[2].glob("configs/*.yaml"))


def test_the_unsafe_context_needs_explicit_permission(path):
    config = load_config(path, ["flow.context.tau=0", "flow.context.allow_unsafe=true"])
    assert config.flow.context.tau == 0
    assert load_config(path, ["flow.context.tau=0", "flow.context.mode=gamma_relaxed", "flow.gamma=-0.2"])
    assert load_config(path, ["flow.context.tau=0", "flow.num_stages=1"])  # one stage feeds nothing back


def test_a_model_without_context_may_have_any_tau(path):
    config = load_config(path, ["model.kind=pyramid", "flow.context.tau=0"])
    assert config.context_tau is None
    assert load_config(path, ["flow.context.tau=0.4"]).context_tau == 0.4


def test_batch_arithmetic_over_ranks(path):
    config = load_config(path)
    assert [config.grad_accum_steps(world) for world in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(ConfigError, match=r"=256 .* 32 x 3 = 96"):
        config.grad_accum_steps(3)


def test_every_shipped_config_is_valid_and_says_how_to_run_it():
    assert len(SHIPPED) >= 6
    for path in SHIPPED:
        load_config(path)
        header = path.read_text().split("\nrun:")[0]
        assert [word for word in ("Command", "Runtime", "Result") if f"# {word}:" not in header] == [], path


def test_the_sizes_of_the_stages(path):
    config = load_config(path)
    assert config.stage_sizes == (8, 16, 32)
    assert config.stage_tokens == (16, 64, 256)
    assert config.token_channels == 16
    assert config.total_steps == 40


def test_solver_steps_are_one_number_or_one_for_each_stage(path):
    assert load_config(path).stage_steps == (8, 8, 8)
    for given, steps in (("5", (5, 5, 5)), ("5.0", (5, 5, 5)), ("[4]", (4, 4, 4)), ("[4, 8, 16]", (4, 8, 16))):
        config = load_config(path, [f"sample.steps_per_stage={given}"])
        assert config.stage_steps == steps
        assert config_from_dict(config.model_dump(mode="json")) == config
    for given, said in (
        ("[4, 8]", r"=\[4, 8\] has 2 values, flow.num_stages=3"),
        ("[]", "has 0 values"),
        ("0", r"steps_per_stage\.0=0: .*equal to 1"),
        ("[4, 0, 2]", r"steps_per_stage\.1=0: .*equal to 1"),
        ("2.5", r"steps_per_stage\.0=2\.5: .*integer"),
        ("many", "steps_per_stage='many'"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_config(path, [f"sample.steps_per_stage={given}"])


def test_check_and_plan_import_neither_torch_nor_deepspeed(path):
    script = (
        "import sys; from ecar_dist.cli import main\n"
        f"codes = [main(['check', {str(path)!r}]), main(['plan', {str(path)!r}])]\n"
        "assert codes == [0, 0], codes\n"
        "heavy = {'torch', 'deepspeed', 'diffusers', 'nvidia'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "# stage 2: 32x32 latent, 256 tokens" in done.stdout


RELAXED = "flow.context.mode=gamma_relaxed"


@pytest.mark.parametrize(
    "overrides",
    [
        [RELAXED, "flow.gamma=-0.2"],  # tau is still 0.3
        [RELAXED, "flow.context.tau=0"],  # gamma is still -1/3
        ["flow.stage_weights=[1, -1, 1]"],
        ["deepspeed.offload_params=true"],
        ["sample.solver=mean"],  # the network learns velocities
        ["model.kind=mar", "flow.num_stages=1", "flow.objective=mean_velocity"],
        ["model.kind=mar", "flow.num_stages=1", "flow.times=logit_normal"],
    ],
)
def test_values_that_only_work_together(path, overrides):
    with pytest.raises(ConfigError):
        load_config(path, overrides)


def test_the_last_partial_batch_counts_as_a_step(path):
    assert load_config(path, ["train.total_samples=257"]).total_steps == 2


@pytest.mark.parametrize(
    "override",
    [
        "model.kind=pyramid",
        "model.preset=S",
        "model.ar_depth=5",
        "model.flow_depth=5",
        "model.patch_size=1",
        "data.num_classes=11",
        "data.latent_channels=5",
        "data.latent_size=64",
        "flow.num_stages=2",
        "flow.ends=[0.2, 0.5, 1.0]",
        "flow.gamma=-0.2",
        "flow.context.mode=class_only",
        "flow.context.tau=0.4",
    ],
)
def test_every_knob_of_the_model_is_in_its_identity(path, override):
    key = override.partition("=")[0]
    assert load_config(path).model_identity[key] != load_config(path, [override]).model_identity[key]


@pytest.mark.parametrize(
    "override",
    [
        "flow.ends=[]",
        "flow.stage_weights=[]",
        "flow.stage_weights=[.nan, 1, 1]",
        "flow.stage_weights=[0, 0, 0]",
        "flow.context.tau=.inf",
        "optim.betas=[2, 3]",
        "vae.downsample=0",
        "optim.schedule=cooldown",
        "optim.cooldown_samples=100",
        "deepspeed.raw={zero_optimization: {stage: 3}}",
        "deepspeed.raw={bf16: {enabled: true}}",
    ],
)
def test_values_that_would_be_ignored_or_make_no_sense(path, override):
    with pytest.raises(ConfigError):
        load_config(path, [override])
