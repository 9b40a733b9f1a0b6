"""The closed form of activations against what autograd saves, with the RMS norm that a GPU has."""

import pytest
import torch
import torch.nn.functional as F

from ecar_dist.config.read import config_from_dict
from ecar_dist.kinds.activations import block_bytes
from ecar_dist.kinds.presets import PRESETS, Preset
from ecar_dist.kinds.table import kind_of

SHAPES = [  # kind, preset, depths, K; the smallest stage has 4 tokens
    ("ecar", "T", {}, 3),
    ("ecar", "T", {}, 1),
    ("ecar", "S", {"ar_depth": 2, "flow_depth": 2}, 3),
    ("pyramid", "T", {}, 3),
    ("dit", "T", {}, 1),
    ("mar", "T", {}, 1),
    ("par", "T", {}, 1),
    ("par_cont", "T", {}, 1),
    ("hybrid", "T", {}, 1),
]


class FusedRMSNorm(torch.autograd.Function):
    """Saves what the CUDA kernel saves: the input, the weight, and one number per row."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return x * scale * weight


@pytest.fixture(autouse=True)
def fused_norm(monkeypatch):
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: FusedRMSNorm.apply(x, weight, eps))


def make_config(kind, preset, depths, num_stages, *, recompute=False, mode="noisy_state"):
    return config_from_dict(
        {
            "run": {"name": "test"},
            "model": {"kind": kind, "preset": preset, **depths},
            "flow": {"num_stages": num_stages, "context": {"mode": mode}},
            "vae": {"kind": "dct"},
            "data": {"latents": "nowhere", "num_classes": 10, "latent_size": 16},
            "train": {"total_samples": 1000, "activation_checkpointing": recompute},
        }
    )


def saved_bytes(config, precision, batch):
    """Bytes of all distinct storages that a forward pass saves."""
    kind = kind_of(config)
    model = kind.build_model(config).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    objective = kind.objective(model, lambda values, noise: values, config, precision)
    saved = {}  # storages by address; kept alive, so that no address is used twice

    def keep(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage
        return tensor

    # The graph lives as long as its outputs.
    values = torch.zeros(batch, config.data.latent_channels, config.data.latent_size, config.data.latent_size)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = objective(values, torch.zeros(batch, dtype=torch.int64), torch.arange(batch))
    assert loss[0].requires_grad
    return sum(storage.nbytes() for storage in saved.values())


def bytes_per_image(config, precision):
    """The difference of two batches: parameters and position tables do not depend on the batch."""
    return (saved_bytes(config, precision, 3) - saved_bytes(config, precision, 1)) / 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("kind", "preset", "depths", "num_stages"), SHAPES)
def test_the_closed_form_is_what_autograd_saves(kind, preset, depths, num_stages, precision):
    for recompute in (False, True):
        config = make_config(kind, preset, depths, num_stages, recompute=recompute)
        counted = kind_of(config).activations(config, precision)
        kept = (counted.block_inputs if recompute else counted.blocks) + counted.rest
        assert kept == pytest.approx(bytes_per_image(config, precision), rel=0.001), recompute


def test_shared_modulation_and_networks_of_two_widths(monkeypatch):
    monkeypatch.setitem(PRESETS, "T", Preset(2, 96, 3, 2, 128, 4, "shared"))
    for precision in ("fp32", "bf16"):
        test_the_closed_form_is_what_autograd_saves("ecar", "T", {}, 2, precision)


def test_contexts_that_are_not_fed_are_not_kept():
    configs = [make_config("ecar", "T", {}, 3, mode=mode) for mode in ("noisy_state", "class_only")]
    fed, unfed = (kind_of(config).activations(config, "fp32").rest for config in configs)
    assert fed - unfed == (16 + 64) * configs[0].token_channels * 4
    assert bytes_per_image(configs[1], "fp32") == pytest.approx(
        kind_of(configs[1]).activations(configs[1], "fp32").blocks + unfed, rel=0.001
    )


def test_a_block_keeps_60_bytes_per_token_and_width_in_bf16_and_88_in_fp32():
    for precision, numbers in (("bf16", 60), ("fp32", 88)):
        one, two = (block_bytes(t, 1152, 16, "per_block", precision, joined=False) for t in (256, 512))
        assert (two - one) // 256 // 1152 == numbers


def test_the_largest_block_is_that_of_the_velocity_network_whose_stages_differ_in_their_modulation():
    """Both transformers see all stages. The AR transformer has one conditioning, the class."""
    config = make_config("ecar", "T", {}, 3)
    counted = kind_of(config).activations(config, "bf16")
    ar = block_bytes(4 + 16 + 64, 128, 4, "shared", "bf16", joined=True)
    assert counted.largest_block == block_bytes(4 + 16 + 64, 128, 4, "per_block", "bf16", joined=True, segments=3) > ar
    assert (counted.block_calls, counted.block_segments) == (4 + 3, 4 + 3 * 3)


def test_xl_keeps_nearly_a_gibibyte_an_image():
    config = make_config("ecar", "XL", {}, 3)
    config = config.model_copy(update={"data": config.data.model_copy(update={"latent_size": 32})})
    counted = kind_of(config).activations(config, "bf16")
    assert (counted.blocks + counted.rest) / 2**30 == pytest.approx(0.95, abs=0.02)
