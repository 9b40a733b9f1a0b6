"""Parts shared by the transformers: projections, embeddings, adaLN, patches and positions.

Every part initialises its own weights in its own constructor, so a module whose weights are partitioned as soon as it
is built (ZeRO-3) starts from the same distribution. Norms, positions and times are float32 for weights of any type.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ecar_dist.compiled_constants import constant_when_compiled

# Initialisation and norms.
INIT_STD = 0.02
NORM_EPS = 1e-6

# Embeddings of time and position.
TIME_FREQUENCIES = 128  # each for cos and sin
TIME_SCALE = 1000.0  # scales model time from [0, 1] to DiT's range before the sinusoid
POSITION_SPAN = 32.0  # radians across the image at the highest frequency: one radian per token on a 32 x 32 grid
POSITION_RATIO = 100.0  # highest over lowest frequency


class Linear(nn.Linear):
    """A projection with N(0, 0.02^2) weights and zero bias. It casts its input down to the type of its weights.

    width_ratio: under muP, the width of its input over that in the base model; 1 where the input does not grow with
        the model. The weights have variance 0.02^2 / width_ratio, and `parameter_groups` divides their
        learning rate by it (Yang et al., arXiv 2203.03466, table 3).

    DeepSpeed's bf16 mode has bf16 weights without autocast, while norms and latents are float32.
    """

    def __init__(self, inputs: int, outputs: int, width_ratio: float = 1.0) -> None:
        self.width_ratio = width_ratio  # torch's constructor initialises the weights
        super().__init__(inputs, outputs)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD / math.sqrt(self.width_ratio))
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Float32 weights, as under autocast, accept any input unchanged.
        if self.weight.dtype.itemsize < x.dtype.itemsize:
            x = x.to(self.weight.dtype)
        return super().forward(x)


class ZeroLinear(Linear):
    """A projection that starts at zero: adaLN and the velocity output."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """A learned table with N(0, 0.02^2) entries."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD)


class ClassEmbedding(Embedding):
    """A row for each of `num_classes` labels, and a last row for the null label.

    Fine-tuning matches the rows of this table and of the two below by their meaning (runtime/initial/rows.py).
    """

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__(num_classes + 1, width)


class StageEmbedding(Embedding):
    """A row for each stage. `sides`: the sides of the stages' token grids, coarse to fine."""

    def __init__(self, sides: Sequence[int], width: int) -> None:
        super().__init__(len(sides), width)
        self.sides = tuple(sides)


class PositionEmbedding(Embedding):
    """A row for each token of one or several square grids, one grid after another. `sides`: the grids' sides."""

    def __init__(self, sides: Sequence[int], width: int) -> None:
        super().__init__(sum(side**2 for side in sides), width)
        self.sides = tuple(sides)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the last axis, computed in float32, returned in the input's type."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=NORM_EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Under DeepSpeed's bf16 the weights may be bf16 too.
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


class MLP(nn.Sequential):
    """D -> 4 D -> D with tanh-approximated GELU."""

    def __init__(self, width: int, width_ratio: float = 1.0) -> None:
        super().__init__(
            Linear(width, 4 * width, width_ratio),
            nn.GELU(approximate="tanh"),
            Linear(4 * width, width, width_ratio),
        )


class AdaLN(nn.Module):
    """`parts` modulation vectors from a conditioning vector: [B, D] -> [B, parts * D]. Zero before training."""

    def __init__(self, width: int, parts: int, width_ratio: float = 1.0) -> None:
        super().__init__()
        self.project = ZeroLinear(width, parts * width, width_ratio)

    def forward(self, conditioning: torch.Tensor) -> torch.Tensor:
        return self.project(F.silu(conditioning))


class AdaLNOffset(nn.Module):
    """One block's learned offset to modulation vectors shared by all blocks: [B, N] -> [B, N]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(size))

    def forward(self, shared: torch.Tensor) -> torch.Tensor:
        return shared + self.offset


def modulated_norm(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, segments: Sequence[int] = ()
) -> torch.Tensor:
    """Layer norm without weights, then (1 + scale) and shift, each segment with its own. float32 out.

    x [B, T, D]; shift and scale [B, S, D], one for each of S segments of tokens. `segments` are their lengths, omitted
    if S = 1.
    """
    # 1 + scale: a zero modulation is the plain norm.
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=NORM_EPS)
    return _by_segment(normed, segments, lambda part, s: part * (1.0 + scale[:, s]) + shift[:, s])


def gated(branch: torch.Tensor, gate: torch.Tensor, segments: Sequence[int] = ()) -> torch.Tensor:
    """gate * branch [B, T, D], each segment with its own gate; gate [B, S, D], segments as in `modulated_norm`."""
    return _by_segment(branch, segments, lambda part, s: gate[:, s] * part)


def _by_segment(
    x: torch.Tensor, segments: Sequence[int], function: Callable[[torch.Tensor, slice], torch.Tensor]
) -> torch.Tensor:
    # Slices, not vectors expanded over the tokens: those would be as large as x.
    if len(segments) <= 1:
        return function(x, slice(None))
    parts = x.split(list(segments), dim=1)
    return torch.cat([function(part, slice(s, s + 1)) for s, part in enumerate(parts)], dim=1)


class TimeEmbedding(nn.Module):
    """Model time in [0, 1], float32 [B] -> [B, D]. Rounding the time to bf16 first would merge neighbouring steps.

    zero: the output is zero before training.
    """

    def __init__(self, width: int, *, zero: bool = False, width_ratio: float = 1.0) -> None:
        super().__init__()
        last = ZeroLinear(width, width, width_ratio) if zero else Linear(width, width, width_ratio)
        self.mlp = nn.Sequential(Linear(2 * TIME_FREQUENCIES, width), nn.SiLU(), last)

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        # Scaled in float32: between 512 and 1024 the spacing of bf16 is 4.
        return self.mlp(sinusoid(time.float() * TIME_SCALE, TIME_FREQUENCIES, ratio=10_000.0))


def sinusoid(x: torch.Tensor, num_frequencies: int, ratio: float) -> torch.Tensor:
    """cos and sin of x at geometric frequencies 1 .. 1/ratio: float32 [N] -> [N, 2 * num_frequencies]."""
    exponents = torch.arange(num_frequencies, dtype=torch.float32, device=x.device) / num_frequencies
    # [N, 1] x [F]: every x at every frequency.
    angles = x[:, None] * torch.exp(-math.log(ratio) * exponents)
    return torch.cat((torch.cos(angles), torch.sin(angles)), dim=-1)


@constant_when_compiled
def position_table(side: int, width: int, device: torch.device) -> torch.Tensor:
    """Fixed 2-D sin-cos positions of a side x side token grid, float32 [side * side, width]; width a multiple of 4.

    Half the channels encode the row, half the column, as the token's centre in (0, 1): the centre of a coarse token is
    the mean of the centres of the four finer ones it covers. Not a buffer, because casting a module casts its buffers.
    """
    return _position_table(side, width, device)


@functools.lru_cache(maxsize=64)
def _position_table(side: int, width: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # a table first made while sampling must also work in training
        # One axis: cos and sin of the token's centre, at frequencies that fall geometrically.
        centres = (torch.arange(side, dtype=torch.float32, device=device) + 0.5) / side
        axis = sinusoid(centres * POSITION_SPAN, width // 4, POSITION_RATIO)  # [side, D / 2]
        # Two axes: the encoding of a token's row, then that of its column.
        rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
        return torch.cat((rows, columns), dim=-1).reshape(side * side, width)  # [T, D]


def weight_decay_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(decay, no_decay): the matrices of linear maps, and everything else (embeddings, biases, norms, offsets)."""
    # By identity, since parameters compare elementwise.
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    decay = [parameter for parameter in model.parameters() if id(parameter) in matrices]
    no_decay = [parameter for parameter in model.parameters() if id(parameter) not in matrices]
    return decay, no_decay


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for the optimizer: `params`, `weight_decay`, and `rate`, by which the learning rate is multiplied.

    Weight decay applies to the matrices of linear maps only. Under muP each has the rate 1 / width_ratio; its decay is
    multiplied by width_ratio, so that the decay of a weight per step does not depend on the width.
    """
    ratios = {id(module.weight): module.width_ratio for module in model.modules() if isinstance(module, Linear)}
    decay, no_decay = weight_decay_groups(model)

    # One group for each ratio; without muP there is only one.
    by_ratio: dict[float, list[nn.Parameter]] = {}
    for parameter in decay:
        by_ratio.setdefault(ratios.get(id(parameter), 1.0), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": weight_decay * ratio, "rate": 1.0 / ratio}
        for ratio, parameters in sorted(by_ratio.items())
    ]
    return [*groups, {"params": no_decay, "weight_decay": 0.0, "rate": 1.0}]


def patchify(x: torch.Tensor, patch_size: int) -> torch.Tensor:
    """[B, C, H, W] -> [B, T, C * p * p], tokens in row-major order."""
    batch, channels, height, width = x.shape
    # Split both axes into (token, pixel within the token), then move the two token axes to the front.
    rows, columns = height // patch_size, width // patch_size
    x = x.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch_size**2)  # [B, T, C * p * p]


def unpatchify(tokens: torch.Tensor, patch_size: int) -> torch.Tensor:
    """The inverse of `patchify` on a square grid: [B, T, C * p * p] -> [B, C, H, W]."""
    batch, count, size = tokens.shape
    side, channels = math.isqrt(count), size // patch_size**2
    # The steps of `patchify` in reverse.
    x = tokens.reshape(batch, side, side, channels, patch_size, patch_size).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(batch, channels, side * patch_size, side * patch_size)  # [B, C, H, W]
