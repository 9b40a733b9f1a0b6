import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ecar_dist.errors import ConfigError
from ecar_dist.kinds.table import kind_of
from ecar_dist.plan.communication import bus_bandwidth, step_traffic
from ecar_dist.plan.duration import _kernels, known_device, model_flops_utilisation, step_time
from ecar_dist.runtime.devices import ATTAINABLE_SHARE, DEVICES, find_device

H100 = DEVICES["H100"]
BATCH = {"global_batch_size": 2048, "micro_batch_size": 32}


def time_of(config, world_size=64, zero_stage=2, *, compiled=False, bandwidth=50.0):
    return step_time(
        config,
        world_size,
        H100,
        zero_stage=zero_stage,
        compiled=compiled,
        gpus_per_node=8,
        bandwidth=bandwidth,
    )


def test_devices_are_found_by_their_full_names():
    assert find_device("NVIDIA H200") is DEVICES["H200"]
    assert find_device("abacus") is None
    assert DEVICES["H200"].attainable_flops == pytest.approx(790e12)
    with pytest.raises(ConfigError, match=r"'TPU' .*A100, H100, H200") as error:
        known_device("TPU")
    assert "\n" not in str(error.value)


def test_gradients_are_reduced_once_a_step_or_at_every_micro_batch(make_config):
    """In units of the weights in bf16, as seen by one of many ranks."""
    config = make_config("XL", batch=BATCH)
    unit = 2 * 911_557_168 * 15 / 16
    traffic = [step_traffic(config, 16, zero_stage) for zero_stage in range(4)]  # four micro-batches
    assert [each.gradients / unit for each in traffic] == pytest.approx([2, 2, 8, 4], rel=1e-4)
    assert [each.weights / unit for each in traffic] == pytest.approx([0, 0, 0, 8], rel=1e-4)
    assert [each.update / unit for each in traffic] == pytest.approx([0, 1, 1, 0], rel=1e-4)


def test_zero_3_gathers_a_large_velocity_network_once_a_pass(make_config):
    """All stages are in one pass, so weights that ZeRO-3 releases are not needed again before the backward pass."""
    traffic = step_traffic(make_config("3B", batch=BATCH), 64, 3)
    ar, flow = 1245e6, 1856e6
    assert traffic.weights == pytest.approx(2 * 2 * (ar + flow) * 63 / 64, rel=2e-3)


def test_links_inside_a_node_and_adapters_between_nodes():
    assert bus_bandwidth(H100, 8, 8, 50.0) == 0.8 * 450e9
    assert bus_bandwidth(H100, 16, 8, 50.0) == 0.8 * 400e9
    assert bus_bandwidth(H100, 16, 8, 100.0) == 0.8 * 450e9
    assert bus_bandwidth(H100, 16, 1, 50.0) == 0.8 * 50e9


def test_a_step_is_compute_optimizer_and_the_communication_that_nothing_hides(make_config):
    config = make_config("XL", batch=BATCH)
    time = time_of(config)
    assert time.total == time.compute + time.optimizer + time.exposed

    # Two thirds of the bytes of ZeRO-2 are gradients, and 70 % of their time is hidden. ZeRO-1 in bf16 hides nothing.
    assert time.exposed == pytest.approx((0.3 * 2 / 3 + 1 / 3) * time.communication)
    first = time_of(config, zero_stage=1)
    assert first.exposed == first.communication
    told = make_config("XL", batch=BATCH, deepspeed={"raw": {"zero_optimization": {"overlap_comm": False}}})
    assert time_of(told).exposed == time.communication
    assert time_of(config, bandwidth=25.0).communication == pytest.approx(2 * time.communication)
    assert time_of(config, 1).communication == 0
    third = time_of(config, zero_stage=3)
    assert third.exposed == pytest.approx(0.3 * third.communication)

    # A slow network is hidden for as long as the compute lasts.
    slow = time_of(config, zero_stage=3, bandwidth=0.5)
    assert slow.exposed == pytest.approx(slow.communication - slow.compute)


def test_fusion_saves_traffic_and_recomputation_costs_a_forward_pass(make_config):
    config = make_config("XL", batch=BATCH)
    recomputed = make_config("XL", batch=BATCH, train={"total_samples": 10, "activation_checkpointing": True})
    assert time_of(config, compiled=True).compute < 0.75 * time_of(config).compute
    assert time_of(recomputed).compute == pytest.approx(4 / 3 * time_of(config).compute)


def test_a_small_model_waits_for_launches_of_its_kernels(make_config):
    """Preset T: 4 AR blocks, and 3 of the velocity network, whose three stages are segments of one pass."""
    config = make_config("T", batch={"global_batch_size": 64, "micro_batch_size": 16})
    launches = 4e-6 * (40 * (4 + 3) + 60 * (4 + 3 * 3) + 540)
    assert time_of(config, 4).compute == pytest.approx(launches)
    assert time_of(config, 1).compute == pytest.approx(4 * launches)  # four micro-batches


class KernelCount(TorchDispatchMode):
    """Counts operations that compute; a slice's backward pass is two, zeros and a copy."""

    def __init__(self):
        super().__init__()
        self.kernels = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        is_view = any(result.alias_info and not result.alias_info.is_write for result in function._schema.returns)
        if not is_view and not name.startswith(("empty", "new_empty", "_unsafe_view", "detach")):
            self.kernels += 2 if name == "slice_backward" else 1
        return function(*args, **(kwargs or {}))


def kernels_of(config):
    """Kernels as planned and as counted, in one eager micro-batch in bf16."""
    kind = kind_of(config)
    model = kind.build_model(config).bfloat16()
    objective = kind.objective(model, lambda values, noise: values, config, "bf16")
    inputs = (torch.zeros(2, 4, 16, 16), torch.zeros(2, dtype=torch.int64), torch.arange(2))
    objective(*inputs)  # the first call also builds tables
    with KernelCount() as counted:
        loss, *_ = objective(*inputs)
        loss.backward()
    return _kernels(kind.activations(config, "bf16"), False), counted.kernels


def test_eager_kernels_are_those_that_a_micro_batch_runs(monkeypatch, make_config):
    """With an RMS norm of few kernels, as on a GPU. Its backward pass has five here, and two there."""
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: x * weight)

    def counts(kind, num_stages, **depths):
        return kernels_of(
            make_config(
                model={"kind": kind, "preset": "T", **depths},
                flow={"num_stages": num_stages},
                data={"latents": "nowhere", "num_classes": 10, "latent_size": 16},
            )
        )

    # All kernels.
    planned, counted = counts("ecar", 3)
    assert planned == pytest.approx(counted, rel=0.1)

    # The kernels of two more blocks, in a velocity network of three stages and of one, and in an AR transformer.
    for kind, num_stages, depth in (("pyramid", 3, "flow_depth"), ("dit", 1, "flow_depth"), ("ecar", 3, "ar_depth")):
        fewer, more = (counts(kind, num_stages, **{depth: blocks}) for blocks in (1, 3))
        assert more[0] - fewer[0] == pytest.approx(more[1] - fewer[1], rel=0.2), (kind, more, fewer)


def test_the_optimizer_moves_its_bytes_and_buckets_those_of_each_micro_batch(make_config):
    config = make_config("XL", batch=BATCH)
    parameters, rate = 911_557_168, 0.85 * 3.35e12
    one_rank = 64 * (12 + 22) + (4 + 20 + 32 + 6) + 12  # 64 micro-batches, one step, one EMA
    assert time_of(config, 1).optimizer == pytest.approx(one_rank * parameters / rate)
    assert time_of(config, 64).optimizer == pytest.approx((12 + (22 + 62 + 12) / 64) * parameters / rate)
    two = make_config("XL", batch=BATCH, ema={"half_life_samples": [1000, 2000]})
    assert time_of(two, 1).optimizer - time_of(config, 1).optimizer == pytest.approx(12 * parameters / rate)


def test_mfu_is_of_the_rate_that_is_given(make_config):
    config = make_config("XL", batch=BATCH)
    flops = 2 * 700.05e9 * 2048
    assert model_flops_utilisation(config, 64, 0.2, 989e12) == pytest.approx(flops / (0.2 * 64 * 989e12), rel=1e-3)
    sheet = model_flops_utilisation(config, 64, time_of(config).total, H100.peak_flops)
    attainable = model_flops_utilisation(config, 64, time_of(config).total, H100.attainable_flops)
    assert sheet / attainable == pytest.approx(ATTAINABLE_SHARE)
    assert 0.15 < sheet < attainable < 0.75  # below the share of matrix products
