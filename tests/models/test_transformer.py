import pytest
import torch

from ecar_dist.models.attention import full_attention
from ecar_dist.models.transformer import Transformer


def run(transformer: Transformer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, conditioning = torch.randn(2, 4, 16, generator=generator), torch.randn(2, 1, 16, generator=generator)
    return transformer(x, conditioning, [full_attention] * 2)


@pytest.mark.parametrize("adaln", ["per_block", "shared"])
def test_blocks_start_as_identity(adaln):
    """With its gates at zero, a block's computation has no effect."""
    transformer = Transformer(2, 16, 2, adaln)
    before = run(transformer)
    with torch.no_grad():
        for block in transformer.blocks:
            block.attention.out.weight.add_(1.0)
            block.mlp[2].weight.add_(1.0)
    assert torch.equal(run(transformer), before)


def test_shared_adaln_is_one_matrix_and_an_offset_a_block():
    transformer = Transformer(2, 16, 2, "shared")
    before = run(transformer)
    matrices = [name for name, p in transformer.named_parameters() if "modulation" in name and p.ndim == 2]
    assert matrices == ["shared_modulation.project.weight", "head_modulation.project.weight"]
    with torch.no_grad():
        transformer.blocks[1].modulation.offset[32:48] = 1.0  # only the gate of this block's attention
    moved = run(transformer)
    assert not torch.allclose(moved, before, atol=1e-4)
    with torch.no_grad():
        transformer.blocks[0].attention.out.weight.add_(1.0)
    assert torch.equal(run(transformer), moved)


def backward(transformer: Transformer) -> tuple[list[torch.Tensor], int]:
    """Output and gradients, and the bytes that the forward pass kept for them."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = run(transformer)
    gradients = torch.autograd.grad(out.square().sum(), list(transformer.parameters()))
    weights = {parameter.untyped_storage().data_ptr() for parameter in transformer.parameters()}
    return [out, *gradients], sum(size for pointer, size in kept.items() if pointer not in weights)


@pytest.mark.parametrize("adaln", ["per_block", "shared"])
def test_recomputed_blocks_give_the_same_numbers_and_keep_less(adaln):
    torch.manual_seed(0)
    transformer = Transformer(2, 16, 2, adaln)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    kept, whole = backward(transformer)
    transformer.recompute = True
    recomputed, left = backward(transformer)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(recomputed, kept, strict=True))
    assert 0 < left < whole / 4


def test_nothing_is_recomputed_without_gradients(monkeypatch):
    """The cached attention of sampling stores what it sees, so a block must run only once."""
    monkeypatch.setattr("ecar_dist.models.transformer.checkpoint", None)
    transformer = Transformer(2, 16, 2, "shared", recompute=True)
    with torch.no_grad():
        assert run(transformer).shape == (2, 4, 16)
