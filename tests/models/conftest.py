from collections.abc import Callable

import pytest
import torch

from ecar_dist.kinds.presets import Preset
from ecar_dist.models.ecar import ECAR

NUM_CLASSES = 5
CHANNELS = 3


def _make(
    num_stages: int = 3, *, seed: int = 0, trained: bool = True, feeds_state: bool = True, adaln: str = "per_block"
) -> ECAR:
    torch.manual_seed(seed)
    model = ECAR(
        Preset(2, 32, 2, 2, 48, 4, adaln),
        stage_sizes=[4 * 2**k for k in range(num_stages)],
        latent_channels=CHANNELS,
        patch_size=2,
        num_classes=NUM_CLASSES,
        context_scales=[0.8] * (num_stages - 1),
        feeds_state=feeds_state,
    )
    if trained:  # gates and output start at zero and would hide every dependence
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def make_model() -> Callable[..., ECAR]:
    """A tiny ECAR with latents of 3 x (4, 8, 16, ...)^2 in patches of 2; `trained` gives all weights random values."""
    return _make


@pytest.fixture
def make_batch() -> Callable[..., tuple]:
    """(contexts, states, times, labels) for that model, the last label null."""

    def make(num_stages: int = 3, batch: int = 2) -> tuple:
        generator = torch.Generator().manual_seed(1)
        states = [torch.randn(batch, CHANNELS, 4 * 2**k, 4 * 2**k, generator=generator) for k in range(num_stages)]
        contexts = [torch.randn(state.shape, generator=generator) for state in states[:-1]]
        times = [torch.rand(batch, generator=generator) for _ in states]
        labels = torch.arange(NUM_CLASSES + 1 - batch, NUM_CLASSES + 1)
        return contexts, states, times, labels

    return make
