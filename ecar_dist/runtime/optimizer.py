"""AdamW with steps that can be refused on the device, and what the host learns about a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepStatus:
    """What the host knows about one optimizer step; the same on every rank."""

    sums: tuple[float, ...]  # as passed to `Engine.step`
    grad_norm: float  # before clipping, over all ranks
    applied: bool  # whether weights moved


class PendingStatus:
    """The numbers of one optimizer step on their way from the device to the host, in one transfer.

    `row`: the sums, the norm of the gradients, and whether weights moved; float64 [n + 2].
    """

    def __init__(self, row: torch.Tensor) -> None:
        self._row = row
        self._arrived: Any = None

        # From a GPU they are copied to pinned memory, overlapped with the computation.
        if row.is_cuda:
            self._row = torch.empty(row.shape, dtype=row.dtype, pin_memory=True)
            self._row.copy_(row, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> StepStatus:
        """Wait until the device has computed the step's numbers. The only place where a step waits for the device."""
        if self._arrived is not None:
            self._arrived.synchronize()
        *sums, grad_norm, applied = self._row.tolist()
        return StepStatus(tuple(sums), grad_norm, bool(applied))


class Judgement(NamedTuple):
    """The decision about a step, on the device."""

    good: torch.Tensor  # bool []: whether weights may move
    clip: torch.Tensor | None  # []: what the gradients are divided by, at least 1; None: they are not clipped


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that clips the gradients, and moves nothing in a step that is not good. DeepSpeed's inner optimizer.

    In every ZeRO stage DeepSpeed averages the gradients and computes their norm over all ranks before it calls `step`,
    and afterwards only copies master weights. So a step can be refused here at no cost, based on numbers that are the
    same on all ranks. `step` counts the steps of the run, including refused ones.

    One kernel clips, decides and updates, so the host does not need to know the judgement. It is torch's fused AdamW,
    whose arguments for a gradient scaler are exactly what clipping and refusing need.
    """

    def __init__(self, parameter_groups: list[dict[str, Any]], **options: Any) -> None:
        super().__init__(parameter_groups, fused=True, **options)
        # While the engine is built, ZeRO 0 in bf16 takes a step with zero gradients, but with weight decay.
        self.judge: Callable[[], Judgement | None] = lambda: None

    def step(self, closure: Any = None) -> Any:
        judged = self.judge()
        if judged is None:
            return None
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            return None
        counters = [self.state_of(parameter)["step"] for parameter in parameters]

        # The kernel divides the gradients by `grad_scale`. If `found_inf` is 1 it moves nothing, not even the counters.
        # Both are moved to offloaded weights here, because torch would not wait until they have arrived there.
        device = parameters[0].device
        self.grad_scale = None if judged.clip is None else judged.clip.float().to(device)
        self.found_inf = (~judged.good).float().to(device)
        super().step(closure)
        torch._foreach_add_(counters, [self.found_inf] * len(counters))
        return None

    def state_of(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """Counter and moments of one parameter, as AdamW creates them in its first step, but available before it.

        A checkpoint may be loaded, or a step refused, before the first step.
        """
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state.update({name: torch.zeros_like(parameter, requires_grad=False) for name in ADAM_MOMENTS})
        return state
