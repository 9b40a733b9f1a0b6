import subprocess
import sys

import pytest

from ecar_dist.errors import ConfigError
from ecar_dist.plan.report import plan_lines


def line(lines, start):
    (found,) = [text for text in lines if text.strip().startswith(start)]
    return found


def test_report_states_the_run(make_config):
    lines = plan_lines(make_config(), world_size=8, device="H100")
    said = "model ecar XL: 911.6 M parameters = 235.4 M AR + 676.2 M velocity network"
    assert line(lines, "model ecar XL") == said
    assert line(lines, "tokens") == "tokens per stage: 16 + 64 + 256 = 336"
    assert "256 = 32 micro x 1 accumulation x 8 ranks; 3907 optimizer steps" in line(lines, "batch")
    assert "700.1 GMAC (1400 GFLOP) per image, forward and backward" in line(lines, "training")
    assert "16 velocity calls in each of 3 stages (midpoint), guidance 2 (linear)" in line(lines, "sampling")
    assert line(lines, "checkpoint:").startswith("checkpoint: 13.6 GiB")
    assert line(lines, "activations").startswith("activations per image, bf16: 0.96 GiB eager, 0.66 GiB compiled, 0.0")
    assert line(lines, "host").startswith("host memory per rank: 3.4 GiB while the model is built, 1.7 GiB")
    state, traffic = (text for text in lines if "<- this config" in text)
    assert state.startswith("  zero_stage 2: 3.82 GiB")
    assert traffic.startswith("  zero_stage 2: 4.79 GB, 13.3 ms alongside 114 ms of compute, 7.09 ms not hidden")


def test_what_the_device_decides_is_a_forecast_that_names_both_rates(make_config):
    lines = plan_lines(make_config(), world_size=8, device="H100")
    assert line(lines, "memory at").endswith("fits")
    assert "25.3 GiB of 73 GiB on an H100" in line(lines, "memory at")
    assert line(lines, "largest micro-batch").startswith("largest micro-batch: 71 eager, 104 compiled, 6")
    assert "of the data sheet's 989 TFLOP/s" in line(lines, "MFU")
    assert "of the attainable 790" in line(lines, "MFU")
    assert all("forecast" in line(lines, start) for start in ("step:", "MFU:", "time:", "forecast, not a measurement"))
    assert "assumed: compiled blocks" in line(lines, "forecast, not a measurement")
    too_large = plan_lines(make_config("7B"), world_size=8, device="H100")
    assert line(too_large, "memory at").endswith("does not fit")


def test_nodes_and_their_network_count(make_config):
    config = make_config(batch={"global_batch_size": 512, "micro_batch_size": 32})
    fast, slow = (
        line(plan_lines(config, 16, "H100", gpus_per_node=gpus, bandwidth=bandwidth), "step:")
        for gpus, bandwidth in ((16, 50.0), (8, 5.0))
    )
    assert " 7.6 ms communication" in fast
    assert " 85.5 ms communication" in slow  # at a ninth of the rate


def test_eager_training_takes_more_memory_and_time(make_config):
    """On a GPU `auto` compiles."""
    compiled, told, eager = (
        plan_lines(make_config(train={"total_samples": 1_000_000, "compile": value}), 8, "H100")
        for value in ("auto", True, False)
    )
    assert compiled == told
    assert "34.9 GiB of 73 GiB" in line(eager, "memory at")
    assert line(eager, "step:").startswith("step: 197 ms")
    assert "assumed: eager blocks" in line(eager, "forecast, not a measurement")


def test_fp32_has_no_forecast(make_config):
    lines = plan_lines(make_config(deepspeed={"precision": "fp32"}), 8, "H100")
    assert "no forecast in fp32" in line(lines, "time")
    assert line(lines, "memory at")


def test_one_rank_is_one_rank(make_config):
    lines = plan_lines(make_config(), world_size=1, device=None)
    assert "256 = 32 micro x 8 accumulation x 1 rank; 3907" in line(lines, "batch")
    assert line(lines, "model state").startswith("model state per rank, 1 rank, bf16")


def test_unguided_ratio_is_the_headline(make_config):
    lines = plan_lines(make_config(sample={"guidance_scale": 1.0}), 1, None)
    assert "11.6x at 250 steps and 2.32x at 50 steps as many MACs (both unguided" in line(lines, "DiT-XL/2 needs")
    guided = plan_lines(make_config(sample={"guidance_scale": 2.0, "guidance_ramp": "constant"}), 1, None)
    assert "11.6x at 250 steps and 2.32x at 50 steps as many MACs (both guided" in line(guided, "DiT-XL/2 needs")


@pytest.mark.parametrize(
    ("kind", "num_stages", "model", "calls", "ratio"),
    [
        ("dit", 1, "674.8 M parameters = 674.8 M velocity network", "16 velocity calls in one stage", "15.6x"),
        ("pyramid", 3, "674.8 M parameters = 674.8 M velocity network", "16 velocity calls in each of 3", "12x"),
        ("mar", 1, "682 M trunk + 72.06 M head", "64 passes of the trunk and 16 calls of the head for", "2.54x"),
    ],
)
def test_every_kind_has_a_plan(make_config, kind, num_stages, model, calls, ratio):
    sample = {"guidance_scale": 1.0}
    config = make_config(model={"kind": kind, "preset": "XL"}, flow={"num_stages": num_stages}, sample=sample)
    lines = plan_lines(config, 8, "H200")
    assert model in line(lines, f"model {kind} XL")
    assert calls in line(lines, "sampling")
    assert f"{ratio} at 250 steps and " in line(lines, "DiT-XL/2 needs")
    assert len([text for text in lines if text.startswith("  zero_stage")]) == 8
    assert line(lines, "time").startswith("time: ")


def test_ratio_needs_the_same_latent(make_config):
    config = make_config(data={"latents": "nowhere", "num_classes": 10, "latent_size": 16})
    assert not any("DiT" in text for text in plan_lines(config, 1, None))


def test_no_device_no_time(make_config):
    assert not any(text.startswith("time") for text in plan_lines(make_config(), 1, None))
    with pytest.raises(ConfigError, match=r"'abacus' .*H100"):
        plan_lines(make_config(), 1, "abacus")


def test_impossible_batch_is_refused(make_config):
    with pytest.raises(ConfigError, match="32 x 3 = 96"):
        plan_lines(make_config(), 3, None)


@pytest.mark.parametrize(("solver", "calls"), [("euler", 5), ("midpoint", 10), ("heun", 10)])
def test_solver_sets_the_calls(make_config, solver, calls):
    config = make_config("T", sample={"solver": solver, "steps_per_stage": 5, "guidance_scale": 1.0})
    assert f"{calls} velocity calls in each of 3 stages ({solver})" in line(plan_lines(config, 1, None), "sampling")


def test_stages_with_different_steps_are_listed(make_config):
    config = make_config("T", sample={"steps_per_stage": [4, 8, 16], "time_shift": 3})
    assert "8, 16, 32 velocity calls in stages 0 to 2 (midpoint, time shift 3)" in line(
        plan_lines(config, 1, None), "sampling"
    )


def test_planning_imports_no_torch():
    script = "import sys, ecar_dist.plan.report; print({'torch', 'numpy', 'deepspeed'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
