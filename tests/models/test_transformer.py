import pytest
import torch

from ecar_dist.models.attention import full_attention
from ecar_dist.models.transformer import Transformer


def run(transformer: Transformer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, conditioning = torch.randn(2, 4, 16, generator=generator), torch.randn(2, 16, generator=generator)
    return transformer(x, conditioning, [full_attention] * 2)


@pytest.mark.parametrize("adaln", ["per_block", "shared"])
def test_blocks_start_as_identity(adaln):
    """With its gates at zero, whatever a block computes is left out."""
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
        transformer.blocks[1].modulation.offset[32:48] = 1.0  # the gate of this block's attention alone
    moved = run(transformer)
    assert not torch.allclose(moved, before, atol=1e-4)
    with torch.no_grad():
        transformer.blocks[0].attention.out.weight.add_(1.0)
    assert torch.equal(run(transformer), moved)
