"""The integer path: equal to the simulated one, and never a product of too few rows."""

import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ecar_dist.quantize.integer_product import SMALLEST_ROWS, integer_product
from ecar_dist.quantize.linear import QuantizedLinear
from ecar_dist.quantize.quantizer import quantize_rows, sqnr
from ecar_dist.quantize.transform import balance_factors, random_signs


class Products(TorchDispatchMode):
    """Records the sizes of every integer product."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_int_mm" in str(func):
            self.sizes.append((*args[0].shape, args[1].shape[1]))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def integer_kernel(monkeypatch):
    """torch's integer product, even on a CPU where it is slow."""
    monkeypatch.setattr("ecar_dist.quantize.integer_product.CPU_HAS_INT8", True)


@pytest.fixture
def linear():
    torch.manual_seed(0)
    made = nn.Linear(48, 40)
    return made.requires_grad_(False)


@pytest.mark.parametrize("shape", [(1, 8, 8), (16, 12, 20), (17, 63, 9), (40, 64, 24)])
def test_the_integer_product_is_exact_and_padded(integer_kernel, shape):
    rows, inner, outputs = shape
    generator = torch.Generator().manual_seed(rows)
    x = torch.randint(-127, 128, (rows, inner), generator=generator, dtype=torch.int8)
    weight = torch.randint(-127, 128, (outputs, inner), generator=generator, dtype=torch.int8)
    with Products() as products:
        found = integer_product(x, weight)
    assert torch.equal(found, (x.int() @ weight.int().t()))
    ((m, k, n),) = products.sizes
    assert m >= SMALLEST_ROWS == 17
    assert k % 8 == n % 8 == 0


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("inner", [8, 1024, 1025, 5000])
def test_the_largest_sums_are_exact_either_way(monkeypatch, kernel, inner):
    monkeypatch.setattr("ecar_dist.quantize.integer_product.CPU_HAS_INT8", kernel)
    generator = torch.Generator().manual_seed(inner)
    x = torch.randint(-127, 128, (20, inner), generator=generator, dtype=torch.int8)
    weight = torch.randint(-127, 128, (16, inner), generator=generator, dtype=torch.int8)
    x[0] = weight[0] = weight[1] = 127
    x[1] = -127
    x[2] = torch.where(torch.arange(inner) % 2 == 0, 127, 126)
    expected = x.long() @ weight.long().t()
    found = integer_product(x, weight)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), expected)


def test_the_kernel_is_called_in_one_place_only():
    package = Path(__file__).parents[2] / "ecar_dist"
    found = subprocess.run(["grep", "-rl", "_int_mm", "--include=*.py", package], capture_output=True, text=True)
    assert [Path(line).name for line in found.stdout.split()] == ["integer_product.py"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 16, 17, 50])
def test_the_integer_path_is_the_simulated_one(linear, bits, rows):
    x = torch.randn(rows, 3, 48, generator=torch.Generator().manual_seed(rows))[:, 0] * 3
    s = balance_factors(x.abs().amax(0), linear.weight.abs().amax(0), 0.5)
    made = QuantizedLinear.of(linear, bits, balance=s, signs=random_signs(48, 1))
    codes, scale = quantize_rows(made.transformed(x), 8)
    weight = made.codes().double() * made.weight_scale.double()[:, None]
    expected = (codes.double() * scale.double()) @ weight.t() + linear.bias.double()
    found = made(x)
    assert found.shape == (rows, 40)
    assert ((found - expected).norm() / expected.norm()).item() < 1e-6
    assert sqnr(linear(x), found) > (12 if bits == 4 else 35)


def test_four_bits_take_half_the_memory(linear):
    eight, four = QuantizedLinear.of(linear, 8), QuantizedLinear.of(linear, 4)
    assert eight.weight.numel() == 2 * four.weight.numel() == 48 * 40


def test_the_output_has_the_type_of_a_linear_map(linear):
    made = QuantizedLinear.of(linear, 8)
    x = torch.randn(2, 5, 48)
    assert made(x).dtype == torch.float32
    assert made(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x).dtype == linear(x).dtype == torch.bfloat16
        assert sqnr(linear(x), made(x)) > 35


@torch.no_grad()
def test_layers_of_two_widths_compile_to_the_same_numbers_in_one_graph():
    torch.manual_seed(0)
    made = [QuantizedLinear.of(nn.Linear(a, b), 8, signs=random_signs(a, 0)) for a, b in ((8, 32), (32, 4))]
    layers, x = nn.Sequential(*made), torch.randn(20, 8)
    whole = torch.compile(layers, backend="aot_eager", fullgraph=True)  # traces as inductor does, without its compiler
    torch.testing.assert_close(whole(x), layers(x))
