"""A micro-batch is computed on its device only: the host reads nothing, and nothing is copied from it.

The meta device stands in for a GPU. It raises if the host reads a number, or if one operation mixes two devices.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ecar_dist.kinds.table import kind_of
from ecar_dist.models.tokens.codebook import CODEBOOK, RESIDUAL_SCALE
from tests.train.test_objective import KINDS, make_config

META = torch.device("meta")


class Copies(TorchDispatchMode):
    """Finds operations with tensors on two devices; on a GPU the host waits for each of them."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        devices = {one.device.type for one in tree_leaves((args, kwargs, result)) if isinstance(one, torch.Tensor)}
        if len(devices) > 1:
            self.found.append(str(function))
        return result


@pytest.fixture(autouse=True)
def _without_autocast(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **more: contextlib.nullcontext())  # there is none on meta


@pytest.mark.parametrize(("kind", "num_stages"), KINDS)
def test_forward_and_backward_stay_on_the_device(kind, num_stages, monkeypatch):
    config = make_config(kind, num_stages=num_stages)
    with META:
        model = kind_of(config).build_model(config)
        moments = torch.empty(4, 8, 8, 8)
        labels = torch.empty(4, dtype=torch.int64)
    compute = kind_of(config).objective(model, lambda values, noise: values[:, :4] + noise, config, "fp32")
    compute(moments, labels, labels)  # creates what is cached: positions, weights of the stages

    with Copies() as copies, monkeypatch.context() as patch:
        for maker in ("tensor", "as_tensor", "from_numpy"):
            patch.setattr(torch, maker, lambda *arguments, **more: pytest.fail("numbers of the host"))
        loss, per_stage, times = compute(moments, labels, labels)
        loss.backward()
    assert copies.found == []
    assert {one.device for one in (loss, per_stage, times)} == {META}
    fitted = {CODEBOOK, RESIDUAL_SCALE}  # before training
    assert all(one.grad is not None for name, one in model.named_parameters() if one.numel() and name not in fitted)


def test_a_host_read_and_a_copy_would_be_found():
    number = torch.ones((), device=META)
    with pytest.raises(RuntimeError, match="meta"):
        float(number)
    with Copies() as copies:
        torch.as_tensor([1.0, 2.0]).to(META)
    assert copies.found == ["aten._to_copy.default"]
